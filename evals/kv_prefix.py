"""A model that reads the first tokens of every sequence from a compressed cache, for measuring what that costs.

Beside GEAR's caches there is the baseline that it is compared with: scales per token, with and without a rotation of
each head's channels, as fake quantization.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantkit.core.errors import QuantkitError
from quantkit.kernels.hadamard import rotate
from quantkit.kvcache import codec
from quantkit.kvcache.attention import reading_packed
from quantkit.kvcache.cache import GearCache, cache_argument
from quantkit.kvcache.config import KVCacheConfig


@dataclass(frozen=True)
class PerToken:
    """Settings of the baseline: keys and values share a scale per token and `group_size` channels.

    Attributes:
        bits: of a code.
        group_size: channels that share a scale; divides a head.
        hadamard: rotate a head's channels first.
        buffer: tokens are compressed in multiples of so many.
    """

    bits: int
    group_size: int = 64
    hadamard: bool = False
    buffer: int = 64

    def decoded(self, x: Tensor) -> Tensor:
        """What keys or values [batch, heads, tokens, channels] become."""
        signs = torch.zeros(-(-x.shape[-1] // 8), dtype=torch.uint8, device=x.device)
        turned = rotate(x.float(), signs) if self.hadamard else x.float()
        found = codec.values(codec.groups_of_channels(turned, self.bits, self.group_size), self.bits, by_token=True)
        return (rotate(found, signs, inverse=True) if self.hadamard else found).to(x.dtype)


class PerTokenCache(DynamicCache):
    """transformers' cache, whose tokens can be quantized in place.

    Args:
        model: whose cache it is.
        settings: of the quantization.

    Attributes:
        bits_per_element: of a cached number, scales included.
    """

    def __init__(self, model: PreTrainedModel, settings: PerToken) -> None:
        super().__init__(config=model.config)
        self.settings, self.bits_per_element = settings, 16.0

    def compress(self) -> None:
        """Quantizes what fills whole buffers."""
        settings = self.settings
        tokens = self.get_seq_length()
        packed = tokens // settings.buffer * settings.buffer
        layer: Any
        for layer in self.layers:
            layer.keys[:, :, :packed] = settings.decoded(layer.keys[:, :, :packed])
            layer.values[:, :, :packed] = settings.decoded(layer.values[:, :, :packed])
        self.bits_per_element = 16 + (settings.bits + 32 / settings.group_size - 16) * packed / tokens


class PrefixReader:
    """Called like the model; the tokens after the prefix attend to its compressed form.

    Args:
        model: in evaluation mode.
        config: of the cache.
        prefix: tokens of every sequence that are compressed, as far as they fill whole buffers.

    Attributes:
        bits: per cached number, of the last sequence's prefix, every byte counted.
    """

    def __init__(self, model: PreTrainedModel, config: KVCacheConfig | PerToken, prefix: int) -> None:
        self.model, self.config, self.prefix, self.bits = model, config, prefix, 16.0

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """Logits of int64 [sequences, tokens], all that come after the prefix with it compressed."""
        if input_ids.shape[1] <= self.prefix:
            raise QuantkitError(f"sequences of {input_ids.shape[1]} tokens hold none after a prefix of {self.prefix}")
        cache = _cache(self.model, self.config)
        settings = {cache_argument(self.model): cache, "use_cache": True}
        first = self.model(input_ids=input_ids[:, : self.prefix], **settings).logits
        cache.compress()
        self.bits = cache.bits_per_element
        rest = self.model(input_ids=input_ids[:, self.prefix :], **settings).logits
        return SimpleNamespace(logits=torch.cat([first, rest], 1))


def _cache(model: PreTrainedModel, config: KVCacheConfig | PerToken) -> GearCache | PerTokenCache:
    return PerTokenCache(model, config) if isinstance(config, PerToken) else GearCache(model, config)


@contextmanager
def compressed_prefix(model: PreTrainedModel, config: KVCacheConfig | PerToken, prefix: int) -> Iterator[PrefixReader]:
    """A `PrefixReader`; the model's attention is restored after.

    Raises:
        QuantkitError: the model's cache cannot be compressed.
    """
    _cache(model, config)  # refused before anything is read
    with reading_packed(model):
        yield PrefixReader(model, config, prefix)
