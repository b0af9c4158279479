"""Finds a transformers model's decoder blocks, linear layers and input embedding."""

import inspect
import re
import sys
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantkit.core.errors import QuantkitError

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Last name components of layers that choose experts: tiny, and not worth a wrong choice."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight matrix that can be packed (Conv1D is GPT-2's linear)."""
    if type(module).forward not in (nn.Linear.forward, Conv1D.forward):
        return type(module).__name__ in _LINEAR_IN_OTHER_WORDS
    if isinstance(module, NonDynamicallyQuantizableLinear):  # whose weight nn.MultiheadAttention takes itself
        return False
    return isinstance(module, nn.Linear | Conv1D)


_LINEAR_IN_OTHER_WORDS = {"FalconLinear"}
"""Subclasses of nn.Linear whose own forward is x @ W^T + b all the same; others may do anything."""


def is_lookup(module: nn.Module) -> bool:
    """Whether a module gives rows of its weight, times `embed_scale` where it is one of transformers' scaled ones."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    scaled = type(module).__name__.endswith("ScaledWordEmbedding") and len(list(module.parameters())) == 1
    return scaled or type(module).forward is nn.Embedding.forward


def ends(model: nn.Module) -> tuple[str | None, str | None]:
    """Names of the input embedding and of the head, as the model gives them; None for what it does not give."""
    names = {module: name for name, module in model.named_modules()}
    found: list[str | None] = []
    for give in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            found.append(names.get(give()))  # type: ignore[operator]
        except NotImplementedError:
            found.append(None)
    return found[0], found[1]


def one_weight(model: nn.Module, embedding: str, head: str) -> bool:
    """Whether two modules have one parameter for a weight, as tied ends do."""
    first, second = (getattr(model.get_submodule(name), "weight", None) for name in (embedding, head))
    return first is second


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a Linear, Conv1D or Embedding as [out_features, in_features]."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks: of all module lists with linear layers inside, the one with most parameters.

    Of a model that sees or hears too, those of its language model.

    Returns:
        (name of the list in the model, the list).

    Raises:
        QuantkitError: there is none, or the model is an encoder-decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise QuantkitError(f"{type(model).__name__} is an encoder-decoder; quantkit quantizes decoder-only models")
    inside = language_modules(model)
    candidates = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and module in inside and any(map(is_linear, module.modules()))
    ]
    if not candidates:
        raise QuantkitError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers; "
            "quantkit quantizes decoder-only transformers models such as Llama, Qwen2 or GPT-2"
        )
    _, name, blocks = max(candidates, key=lambda candidate: candidate[0])
    return name, blocks


def refuse_rescaled(model: nn.Module) -> None:
    """Raises QuantkitError where a model's own code divides its weights in place when it runs, as RWKV's does."""
    config = getattr(model, "config", None)
    if every := getattr(config, "rescale_every", 0):
        raise QuantkitError(
            f"{type(model).__name__} halves the weights of its deeper blocks in place when it runs (rescale_every="
            f"{every} in config.json), and packed weights do not change; RWKV is packed with rescale_every 0, which "
            "gives the same but for the range that fp16 needs"
        )


def language_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of what turns embeddings into the last hidden states of text; all where that cannot be told."""
    give = getattr(model, "get_decoder", None)
    try:
        found = None if give is None else give()
    except (AttributeError, NotImplementedError):  # of models that give it in no way
        found = None
    root = found if isinstance(found, nn.Module) and any(True for _ in found.children()) else model
    own = {type(config) for config in (getattr(model, "config", None), _text_config(model)) if config is not None}
    beside = {
        inner
        for tower in root.modules()
        if isinstance(tower, PreTrainedModel) and own and type(tower.config) not in own
        for inner in tower.modules()
    }
    return set(root.modules()) - beside


def _text_config(model: nn.Module) -> Any:
    try:
        return model.config.get_text_config()  # type: ignore[union-attr, operator]
    except (AttributeError, ValueError):  # no config, or one with several texts
        return None


def key_heads(config: Any) -> tuple[int, int]:
    """(heads of keys, channels of a head) of a model's config."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def tied_names(model: nn.Module) -> dict[str, str]:
    """Tensors that are other tensors by another name (a head tied to its embedding) and are not stored -> those."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def shared_layers(model: nn.Module) -> dict[str, str]:
    """Linear layers whose weight is that of a layer in another block, as where a block is called at several depths.

    Returns:
        Their names -> the name by which the weight is packed, the first place where it is called. Zamba 2's shared
        blocks hold adapters for all their places, and each place calls its own.
    """
    prefix, _ = find_blocks(model)
    places: dict[str, list[str]] = {}
    for tensor, origin in tied_names(model).items():
        name, _, kind = tensor.rpartition(".")
        if tensor.startswith(f"{prefix}.") and kind == "weight" and is_linear(model.get_submodule(name)):
            layer = origin.removesuffix(".weight")
            places.setdefault(layer, [layer]).append(name)
    found: dict[str, str] = {}
    for names in places.values():
        adapter = _ADAPTER.search(names[0])
        calling = model.config.hybrid_layer_ids[int(adapter[1])] if adapter else None  # type: ignore[union-attr, index]
        first = next((name for name in names if name.startswith(f"{prefix}.{calling}.")), names[0])
        found |= {name: first for name in names if name != first}
    return found


_ADAPTER = re.compile(r"_adapter_list\.(\d+)\.")


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers inside the decoder blocks by full name, in model order.

    But for routers, `bypassed` ones, and `shared_layers` in other places than their first.
    """
    prefix, blocks = find_blocks(model)
    left = {*bypassed(model), *shared_layers(model)}
    return {
        name: module
        for name, module in blocks.named_modules(prefix=prefix)
        if is_linear(module) and name.rsplit(".", 1)[-1] not in ROUTERS and name not in left
    }


def outer_linears(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers outside the decoder blocks but `bypassed` ones, e.g. lm_head, by full name."""
    prefix, _ = find_blocks(model)
    left = set(bypassed(model))
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and not name.startswith(f"{prefix}.") and name not in left
    }


def bypassed(model: nn.Module) -> list[str]:
    """Linear layers whose weight the module that they are in multiplies by itself, as Mamba's does with dt_proj's."""
    return [
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        for child in _bypassed(module.__class__)  # type: ignore[arg-type]
        if isinstance(getattr(module, child, None), nn.Linear)
    ]


@lru_cache
def _bypassed(cls: type) -> frozenset[str]:
    """Children whose weight a class's methods multiply by."""
    found: set[str] = set()
    for own in cls.__mro__:
        if own.__module__.partition(".")[0] not in ("torch", "builtins"):
            source = _class_sources(own.__module__).get(own.__name__, "")
            found |= {name for pair in _PRODUCT.findall(source) for name in pair if name}
    return frozenset(found)


@lru_cache
def _class_sources(module: str) -> dict[str, str]:
    """The text of a module's classes by name, each up to the next one; `inspect` would parse the file for each."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):  # made at run time
        return {}
    return {_CLASS_NAME.match(text)[1]: text for text in _CLASS.split(source)[1:]}  # type: ignore[index]


_CLASS, _CLASS_NAME = re.compile(r"^(?=class \w)", re.MULTILINE), re.compile(r"class (\w+)")
"""Where a class begins that is in no other, and its name."""


_PRODUCT = re.compile(r"self\.(\w+)\.weight @|F\.linear\([^\n]*?self\.(\w+)\.weight(?!\[)\b")
"""A weight as a factor; BLOOM's, which is sliced, is one only where a training on many devices is retraced."""


def fused_expert_parameters(model: nn.Module) -> dict[str, int]:
    """3-D parameters inside the blocks (fused experts) and their sizes: weights that no linear layer holds."""
    prefix, blocks = find_blocks(model)
    return {
        name: p.numel()
        for place, module in blocks.named_modules(prefix=prefix)
        for name, p in module.named_parameters(prefix=place, recurse=False)
        if p.dim() == 3 and len(p) > 1 and not isinstance(module, nn.Conv1d)
    }


def context_length(model: nn.Module) -> int | None:
    """The longest sequence that the model's positions allow; None where its config does not say."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_vocabulary(tokens: Tensor, model: nn.Module) -> None:
    """Raises QuantkitError where a token of int64 [...] has no row in the model's embedding."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows = embedding.weight.shape[0] if isinstance(embedding, nn.Embedding) else embedding.num_embeddings
    largest = int(tokens.max()) if tokens.numel() else -1
    if largest >= rows:
        raise QuantkitError(
            f"the tokenizer gives token {largest}, the model's embedding has {rows} rows; are they of the same model?"
        )


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers, shared ones once."""
    seen: dict[int, int] = {}
    for module in model.modules():
        stored = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for tensor in (*module._parameters.values(), *stored.values()):
            if tensor is not None:
                seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
