"""Memory that generation takes beside the weights: of a pass over the whole prompt, followed without computing it.

Every operation of the model's own forward pass runs on tensors without data, and the bytes of those that live at the
same time are added up. So the figure follows the architecture (masks, experts, sliding windows, fp32 norms). Where a
model's code looks at the data, a formula has to do.
"""

import inspect
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from quantkit.core.errors import first_line
from quantkit.kernels.int_group_matmul import AT_ONCE, CROSSOVERS
from quantkit.kvcache.config import KVCacheConfig
from quantkit.models.experts import routed
from quantkit.models.structure import key_heads, linear_weight

logger = logging.getLogger(__name__)

ALLOCATOR = {"cpu": 1.6, "cuda": 1.15}
"""What allocators hold over what lives in them. CPU: glibc, measured 1.3 to 1.5 (README); CUDA: an allowance."""
LIBRARIES = {"cpu": 40 * 2**20, "cuda": 512 * 2**20}
"""What libraries take once they run: thread buffers and kernels; on a GPU its context and workspaces too."""
DEQUANTIZED = {"cpu": 24, "cuda": 2}
"""Bytes per weight of the largest packed layer while a prompt is multiplied with it; on a CPU in fp32, by parts, and
with what glibc keeps of earlier ones."""


@dataclass(frozen=True)
class Beside:
    """Bytes beside the weights.

    Attributes:
        cache: keys and values of the full context.
        activations: the rest of the prompt's pass at its widest, with one layer's dequantized weight.
        reserve: what allocators and libraries hold beyond.
    """

    cache: int
    activations: int
    reserve: int

    @property
    def total(self) -> int:
        """All bytes of it."""
        return self.cache + self.activations + self.reserve


def beside_weights(
    model: PreTrainedModel,
    packed: Sequence[str],
    context: int,
    batch: int,
    kv: KVCacheConfig | None,
    device: torch.device,
    head: str | None = None,
) -> Beside:
    """What generation needs beside the weights, at its peak.

    Args:
        model: on the meta device, in the dtype in which it will run; has no use afterwards.
        packed: its layers that are packed, in the blocks.
        context: tokens of each sequence.
        batch: sequences.
        kv: of a compressed cache; None for a plain one.
        device: of its kind generation will take place on.
        head: that is packed too, in an integer format: each sequence's last token alone is multiplied with it.
    """
    itemsize = model.dtype.itemsize
    largest = max((linear_weight(model.get_submodule(name)).numel() for name in packed), default=0)
    if head is not None and (device.type == "cpu" or batch > CROSSOVERS["default"][1]):
        weights = linear_weight(model.get_submodule(head)).numel()
        largest = max(largest, min(weights, AT_ONCE) if device.type == "cpu" else weights)
    try:
        peak, left = prompt_bytes(model, context, batch)
        cache, activations = left, peak - left
    except Exception as error:  # data-dependent code has many ways to fail without data
        logger.warning("the prompt's memory is taken from a formula (%s)", first_line(error))
        cache = kv_cache_bytes(model.config, context, batch, 8 * itemsize)
        activations = activation_bytes(model.config, context, batch, itemsize)
    if kv is not None:  # a compressed cache packs a layer's prompt right after its attention; sliding layers stay plain
        kinds, lengths = _cached_tokens(model.config, context)
        plain = sum(length for kind, length in zip(kinds, lengths, strict=True) if kind == "sliding_attention")
        fraction = 1 - plain / sum(lengths)
        activations += int(cache * fraction) // max(1, len(kinds) - kinds.count("sliding_attention"))
        heads, size = key_heads(model.config)
        packed_fraction = fraction * kv.bits_per_element(size, heads, context) / (8 * itemsize)
        cache = int(cache * (1 - fraction + packed_fraction))
    activations += DEQUANTIZED[device.type] * largest
    reserve = LIBRARIES[device.type] + int((ALLOCATOR[device.type] - 1) * (cache + activations))
    return Beside(cache, activations, reserve)


def prompt_bytes(model: PreTrainedModel, context: int, batch: int) -> tuple[int, int]:
    """(peak during a pass over the prompt, what is left after it: the cache and the last token's logits).

    Args:
        model: on the meta device; has no use afterwards.
        context, batch: of the prompt.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.to_empty(device="cpu")  # type: ignore[operator]
        tokens = torch.zeros(batch, context, dtype=torch.int64, device="cpu")
        live = LiveBytes([*model.parameters(), *model.buffers()])
        few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        with live, routed(model, sizes_only=True):
            outputs = model(input_ids=tokens, use_cache=True, **few)
        left = live.bytes
        del outputs
    return live.peak, left


def kv_cache_bytes(config: Any, context: int, batch: int, bits: float = 16) -> int:
    """Bytes of keys and values at a full context; layers with a sliding window keep no more than it.

    Args:
        config: the model's.
        context: tokens of each sequence.
        batch: sequences.
        bits: of a cached number, with all that a compressed cache stores beside it.
    """
    heads, size = key_heads(config)
    return int(2 * sum(_cached_tokens(config, context)[1]) * batch * heads * size * bits / 8)


def _cached_tokens(config: Any, context: int) -> tuple[list[str], list[int]]:
    """(kinds of the layers, the tokens that each keeps at a full context)."""
    config = config.get_text_config()
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    window = getattr(config, "sliding_window", None) or context
    return kinds, [min(context, window) if kind == "sliding_attention" else context for kind in kinds]


def activation_bytes(config: Any, context: int, batch: int, itemsize: int = 2) -> int:
    """Bytes of a pass over the whole context, at most: a block's widest moment, and a token's logits in fp32.

    Residual, its normed copy, queries, keys, values and attention's output, or the MLP's two halves and their product.
    """
    config = config.get_text_config()
    hidden, wide = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    heads, (_, size) = config.num_attention_heads, key_heads(config)
    attention = 2 * hidden + 6 * heads * size
    tokens = context * batch
    return tokens * itemsize * max(attention, 2 * hidden + 3 * wide) + 3 * 4 * batch * config.vocab_size


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, as long as they live.

    Args:
        known: tensors whose storages do not count.

    Attributes:
        bytes, peak: alive now, and at most.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and looks at what it returns."""
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size
