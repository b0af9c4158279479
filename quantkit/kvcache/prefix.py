"""A model that reads the first tokens of every window from a compressed cache, for measuring what that costs."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.core.errors import QuantkitError
from quantkit.kvcache.attention import reading_packed
from quantkit.kvcache.cache import GearCache
from quantkit.kvcache.config import KVCacheConfig


class PrefixReader:
    """Called like the model; the tokens after the prefix attend to its compressed form.

    Args:
        model: in evaluation mode.
        config: of the cache.
        prefix: tokens of every window that are compressed, as far as they fill whole buffers.

    Attributes:
        bits: per cached number, of the last window's prefix, every byte counted.
    """

    def __init__(self, model: PreTrainedModel, config: KVCacheConfig, prefix: int) -> None:
        self.model, self.config, self.prefix, self.bits = model, config, prefix, 16.0

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """Logits of int64 [windows, tokens], all that come after the prefix with it compressed."""
        if input_ids.shape[1] <= self.prefix:
            raise QuantkitError(f"windows of {input_ids.shape[1]} tokens hold none after a prefix of {self.prefix}")
        cache = GearCache(self.model, self.config)
        first = self.model(input_ids=input_ids[:, : self.prefix], past_key_values=cache, use_cache=True).logits
        cache.compress()
        self.bits = cache.bits_per_element
        rest = self.model(input_ids=input_ids[:, self.prefix :], past_key_values=cache, use_cache=True).logits
        return SimpleNamespace(logits=torch.cat([first, rest], 1))


@contextmanager
def compressed_prefix(model: PreTrainedModel, config: KVCacheConfig, prefix: int) -> Iterator[PrefixReader]:
    """A `PrefixReader`; the model's attention is restored after.

    Raises:
        QuantkitError: the model's cache cannot be compressed.
    """
    GearCache(model, config)  # refused before anything is read
    with reading_packed(model):
        yield PrefixReader(model, config, prefix)
