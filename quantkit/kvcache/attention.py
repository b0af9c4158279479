"""Attention over a compressed cache, registered with transformers as "quantkit".

A prompt attends to its exact keys and values, and is compressed right after, weighted by its queries. Later tokens
attend to the packed form, decoded layer by layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from quantkit.errors import QuantkitError
from quantkit.kvcache.cache import GearCache, LazyKV
from quantkit.kvcache.config import KVCacheConfig

NAME = "quantkit"


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention function.

    Args:
        module: the attention layer.
        query: [batch, heads, new tokens, channels].
        key, value: [batch, kv_heads, tokens, channels], `LazyKV` where the cache compresses.
        attention_mask: bool [batch, 1, new tokens, tokens], or None.
        kwargs: handed on.

    Returns:
        ([batch, new tokens, heads, channels], None).
    """
    if not isinstance(key, LazyKV) or not isinstance(value, LazyKV):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    layer = key.layer
    if not layer.k.chunks:
        layer.observe(query)
    output, _ = sdpa_attention_forward(module, query, key.dense(), value.dense(), attention_mask, **kwargs)
    if query.shape[2] > 2 * layer.config.buffer:
        layer.compress(layer.config.buffer)  # a prompt is packed layer by layer, so that it is never there as a whole
    return output, None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def compressed_kv(
    model: PreTrainedModel, bits: int | None = None, config: KVCacheConfig | None = None
) -> Iterator[Callable[[], GearCache]]:
    """Lets `model.generate` use a compressed cache; restores the model after.

    Args:
        model: any decoder with layers of full attention.
        bits: 2, 3, 4 or 8, for `KVCacheConfig.gear(bits)`; 4 by default.
        config: all settings instead.

    Yields:
        A function that makes a new cache; `generate` inside the context makes its own, where it is given none.

    Raises:
        QuantkitError: the model's cache cannot be compressed.
    """
    if bits is not None and config is not None:
        raise QuantkitError("give bits or a config, not both")
    chosen = config or KVCacheConfig.gear(4 if bits is None else bits)
    GearCache(model, chosen)  # refused before anything is generated
    before, generate = model.config._attn_implementation, cast(Any, model.generate)

    def made(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("cache_implementation")
        if wanted is not None:
            raise QuantkitError(
                f"cache_implementation={wanted!r} is given inside compressed_kv, which brings its own cache"
            )
        if kwargs.get("past_key_values") is None and kwargs.get("use_cache") is not False:
            kwargs["past_key_values"] = GearCache(model, chosen)
        return generate(*args, **kwargs)

    model.set_attn_implementation(NAME)
    model.generate = made  # type: ignore[assignment]
    try:
        yield lambda: GearCache(model, chosen)
    finally:
        del model.generate
        model.set_attn_implementation(before)
