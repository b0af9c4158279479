"""What a GGUF file says of a model beside its weights: its sizes, its positions and its tokenizer, for llama.cpp.

llama.cpp has code for each architecture, and each has needs of its own, which are said here. Facts are those of ggml's
GGUF specification and of llama.cpp's readers; keys are written by the package gguf.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import QuantkitError
from quantkit.exchange.packed import DENSE
from quantkit.io.gguf import LLAMA3
from quantkit.models.experts import unnumbered

logger = logging.getLogger(__name__)

OTHERS = f"{DENSE}, which llama.cpp's own convert_hf_to_gguf.py takes"
"""What helps where a GGUF file cannot be written."""


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp has a model type.

    Attributes:
        name: its name there.
        says: adds what is its own to a writer, given the text model's config.
        act: the activation function that its code has.
        interleaved: whether rows of queries and keys are in the order of interleaved rotary pairs.
        norm_shift: what is added to the weights of norms.
        windowed: whether it has sliding windows.
        sums_to_one: whether the weights of the experts that a token chooses are scaled to a sum of 1; None where there
            are no experts.
    """

    name: str
    says: Callable[[Any, Any], None]
    act: str = "silu"
    interleaved: bool = False
    norm_shift: float = 0.0
    windowed: bool = False
    sums_to_one: bool | None = None


_LOCAL_BASE = 10000.0
"""Of rotary positions in Gemma 3's local layers."""


def _plain(_writer: Any, _config: Any) -> None:
    """Nothing beside what all say."""


def _gemma3(writer: Any, config: Any) -> None:
    kinds = list(getattr(config, "layer_types", None) or ())
    if kinds != ["full_attention" if nth % 6 == 5 else "sliding_attention" for nth in range(len(kinds))]:
        raise QuantkitError(
            f"llama.cpp has every sixth layer of gemma3 attend to all, and this model has not; {OTHERS}"
        )
    if config.query_pre_attn_scalar != config.head_dim and len(kinds) != 62:
        raise QuantkitError(f"llama.cpp scales gemma3's queries by head_dim, and this model does not; {OTHERS}")
    local = dict(getattr(config, "rope_parameters", None) or {}).get("sliding_attention", {})
    if float(local.get("rope_theta") or _LOCAL_BASE) != _LOCAL_BASE:
        raise QuantkitError(
            f"llama.cpp has a rotary base of 10000 in gemma3's local layers, this model another; {OTHERS}"
        )
    writer.add_sliding_window(config.sliding_window)


def _phi3(writer: Any, config: Any) -> None:
    original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(int(original))
    scale = config.max_position_embeddings / original
    if scale > 1:
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))


def _experts(writer: Any, config: Any, width: int) -> None:
    """Says how many experts there are, how many a token chooses, and how wide each is."""
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise QuantkitError(f"llama.cpp has experts in all layers of such models, this one in some; {OTHERS}")
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(width)


def _mixtral(writer: Any, config: Any) -> None:
    _experts(writer, config, config.intermediate_size)


def _qwen3_moe(writer: Any, config: Any) -> None:
    _experts(writer, config, config.moe_intermediate_size)


def _qwen2_moe(writer: Any, config: Any) -> None:
    _experts(writer, config, config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", _plain, interleaved=True),
    "mistral": Architecture("llama", _plain, interleaved=True),
    "qwen2": Architecture("qwen2", _plain),
    "qwen3": Architecture("qwen3", _plain),
    "gemma3_text": Architecture("gemma3", _gemma3, "gelu_pytorch_tanh", norm_shift=1.0, windowed=True),
    "phi3": Architecture("phi3", _phi3),
    "mixtral": Architecture("llama", _mixtral, interleaved=True, sums_to_one=True),
    "qwen2_moe": Architecture("qwen2moe", _qwen2_moe, sums_to_one=False),
    "qwen3_moe": Architecture("qwen3moe", _qwen3_moe, sums_to_one=True),
}
"""By transformers' model type."""


def architecture(config: Any) -> Architecture:
    """The architecture of a model's config.

    Raises:
        QuantkitError: it is none of those.
    """
    kind = getattr(config, "model_type", "")
    if kind not in ARCHITECTURES:
        raise QuantkitError(f"GGUF files are written of {', '.join(ARCHITECTURES)}, and not of {kind!r}; {OTHERS}")
    own, found = ARCHITECTURES[kind], getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if found != own.act:
        raise QuantkitError(f"llama.cpp has {own.act} in {own.name}, and this model has {found}; {OTHERS}")
    if own.sums_to_one is not None and getattr(config, "norm_topk_prob", own.sums_to_one) != own.sums_to_one:
        scaled = "scales" if own.sums_to_one else "does not scale"
        raise QuantkitError(
            f"llama.cpp {scaled} the weights of chosen experts to a sum of 1 in {own.name}, and norm_topk_prob says "
            f"otherwise; {OTHERS}"
        )
    return own


def _window(config: Any) -> int | None:
    """Tokens that a layer looks back to, where it is not all."""
    kinds = getattr(config, "layer_types", None)
    used = getattr(config, "sliding_window", None) is not None
    if kinds is not None and "sliding_attention" not in kinds:
        used = False
    return int(config.sliding_window) if used else None


def _context(config: Any, own: Architecture) -> int:
    """Tokens of context: of a model whose windows llama.cpp does not have as many as one window sees."""
    whole, window = int(config.max_position_embeddings), None if own.windowed else _window(config)
    if window is None or window >= whole:
        return whole
    logger.warning("llama.cpp has no sliding windows in %s: the file says %s tokens of context", own.name, window)
    return window


def head_dim(config: Any) -> int:
    """Features of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def row_order(own: Architecture, config: Any, layer: str, rows: int) -> Tensor:
    """Rows as llama.cpp has them, int64 [rows]: of queries and keys pairs of features that turn together."""
    order = torch.arange(rows)
    if own.interleaved and layer.rpartition(".")[2] in ("q_proj", "k_proj"):
        order = order.view(-1, 2, head_dim(config) // 2).transpose(1, 2).flatten()
    return order


def tensor_names(own: Architecture, config: Any) -> Callable[[str], str | None]:
    """A function: the name of a model's tensor -> that in a GGUF file; None where llama.cpp has no such tensor."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[own.name], config.num_hidden_layers)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


def file_name(called: Callable[[str], str | None], own: Architecture, name: str) -> str:
    """The name in a GGUF file of a model's tensor; of an expert's that of the stack that it is in.

    Args:
        called: `tensor_names`.
        own: the architecture.
        name: of the tensor in transformers' files.

    Raises:
        QuantkitError: llama.cpp has no such tensor.
    """
    found = called(unnumbered(name))
    if found is None:
        raise QuantkitError(f"llama.cpp's {own.name} has no {name}; {OTHERS}")
    return found


def describe(writer: Any, config: Any, own: Architecture, name: str) -> dict[str, Tensor]:
    """Says what the model is like.

    Args:
        writer: gguf's.
        config: the text model's.
        own: its architecture.
        name: of the model.

    Returns:
        Tensors [...] that llama.cpp wants beside the model's own, by name: how rotary positions are scaled.
    """
    writer.add_name(name)
    writer.add_context_length(_context(config, own))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    size = head_dim(config)
    writer.add_key_length(size)
    writer.add_value_length(size)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope = dict(rope.get("full_attention", rope))
    turned = int(size * rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0))
    writer.add_rope_dimension_count(turned)
    base = float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    writer.add_rope_freq_base(base)
    own.says(writer, config)
    return _scaled_positions(writer, rope, base, turned, config)


def _scaled_positions(writer: Any, rope: Mapping[str, Any], base: float, size: int, config: Any) -> dict[str, Tensor]:
    from gguf import RopeScalingType

    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {}
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3(rope, base, size)}
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
            for length in ("long", "short")
        }
    types = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}
    if kind not in types:
        raise QuantkitError(f"rotary positions are scaled by {kind!r}, which is not written to GGUF files; {OTHERS}")
    writer.add_rope_scaling_type(types[kind])
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))
    return {}


def _llama3(rope: Mapping[str, Any], base: float, size: int) -> Tensor:
    """What each frequency is divided by: fp32 [size / 2]; see Llama 3.1's rope."""
    said = {**LLAMA3, **rope}
    low, high, original = (float(said[key]) for key in (
        "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    ))  # fmt: skip
    factor = float(said["factor"])
    waves = 2 * math.pi * base ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    smooth = ((original / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORTENED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLITS = {
    rf"{_SHORTENED}|{_WORD}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_SHORTENED}|{_WORD}|\p{{N}}|{_REST}": "qwen2",
}
"""llama.cpp's names of how text is split before it is merged, by the regular expressions that tokenizers name."""


def split_of(found: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer.json splits text, in words of bytes.

    Raises:
        QuantkitError: it is none of those that are known here.
    """
    steps = found.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        kinds = []  # llama.cpp puts no space in front of such text
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0].get("pattern", {}).get("Regex", "")
        if pattern in _SPLITS:
            return _SPLITS[pattern]
    raise QuantkitError(f"the tokenizer splits text in a way that llama.cpp's names are not known of here; {OTHERS}")


def check_tokenizer(folder: Path, config: Any) -> dict[str, Any]:
    """What tokenizer.json of a folder says, which llama.cpp has a tokenizer for.

    Args:
        folder: holds tokenizer.json.
        config: the text model's, whose vocabulary may be larger.

    Raises:
        QuantkitError: there is none, or llama.cpp has no such tokenizer.
    """
    try:
        found: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        model = found["model"]
        kind = model["type"]
        numbers = [*dict(model["vocab"] if kind == "BPE" else {}).values()]
        numbers += [entry["id"] for entry in found.get("added_tokens") or []]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise QuantkitError(f"{folder} has no tokenizer.json to write into a GGUF file ({error})") from error
    if kind != "BPE":
        raise QuantkitError(f"the tokenizer's model is {kind}, and GGUF files are written with BPE; {OTHERS}")
    most = max(numbers, default=0)
    if most >= config.vocab_size:
        raise QuantkitError(
            f"the tokenizer has {most + 1} tokens, and the model's embedding {config.vocab_size} rows; take the tokens "
            "beyond out of the tokenizer, or resize the model before it is packed"
        )
    if not model.get("byte_fallback"):
        split_of(found)
    return found


def add_tokenizer(writer: Any, folder: Path, config: Any) -> None:
    """Adds a model's tokenizer and its chat template.

    Args:
        writer: gguf's.
        folder, config: see `check_tokenizer`.
    """
    from gguf import SpecialVocab

    found = check_tokenizer(folder, config)
    model = found["model"]
    by_bytes = not model.get("byte_fallback")
    tokens, types = _tokens(dict(model["vocab"]), found.get("added_tokens") or [], config.vocab_size, by_bytes)
    if by_bytes:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_of(found))
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_add_space_prefix(_adds_space(found))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    SpecialVocab(folder, load_merges=by_bytes, n_vocab=len(tokens)).add_to_gguf(writer, quiet=True)


def _tokens(
    vocabulary: dict[str, int], added: list[dict[str, Any]], size: int, by_bytes: bool
) -> tuple[list[str], list[int]]:
    """Every token's text and type, by number; numbers that no token has are filled."""
    from gguf import TokenType

    kinds = {entry["id"]: TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED for entry in added}
    texts = {number: text for text, number in vocabulary.items()} | {entry["id"]: entry["content"] for entry in added}
    tokens, types = [], []
    for number in range(size):
        text = texts.get(number)
        tokens.append(f"[PAD{number}]" if text is None else text)
        if text is None:
            types.append(TokenType.UNUSED)
        elif number in kinds:
            types.append(TokenType.UNKNOWN if text == "<unk>" and not by_bytes else kinds[number])
        elif not by_bytes and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return tokens, [int(kind) for kind in types]


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Of each token how soon it is made, the sooner the higher: llama.cpp merges by scores, not by a list."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair) if isinstance(pair, list) else pair.replace(" ", "", 1), rank)
    last = len(merges)
    return [-float(ranks.get(token, last)) for token in tokens]


def _adds_space(found: Mapping[str, Any]) -> bool:
    """Whether text gets a space in front before it is split."""
    text = json.dumps([found.get("normalizer"), found.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
