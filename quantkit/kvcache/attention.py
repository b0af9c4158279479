"""Attention over a compressed cache, registered with transformers as "quantkit".

A prompt attends to its exact keys and values, and is compressed right after, weighted by its queries. Later tokens
attend to the packed form: by a kernel on a GPU, else decoded layer by layer.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from quantkit.core.errors import QuantkitError
from quantkit.kernels import kv_attention, self_check
from quantkit.kvcache.cache import GearCache, GearLayer, LazyKV, cache_argument
from quantkit.kvcache.config import KVCacheConfig

logger = logging.getLogger(__name__)

NAME = "quantkit"


FEWEST = 1024
"""Packed tokens from which the kernel is used; below, decoding them costs less than its launches."""
DRAFT = 64
"""Tokens that assisted decoding may take back from a prompt's end, and that are not packed with it."""
_logged: set[str] = set()


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

    Raises:
        QuantkitError: the model's attention has parts of its own, which this one does not know.
    """
    own = next((name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None), None)
    if own is not None:  # not seen by `own_parts`
        raise QuantkitError(f"this model's attention has {own}; give its own attention a GearCache: past_key_values=")
    if not isinstance(key, LazyKV) or not isinstance(value, LazyKV):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    layer = key.layer
    if not layer.k.chunks:
        layer.observe(query)
    boolean = attention_mask is None or attention_mask.dtype == torch.bool
    form = packed_form(layer) if boolean and kernel_pays(query, layer) else None
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    if form is not None and kv_attention.supported(form, rows) and self_check.trusted("kv_attention", query.device):
        _log_once("attention reads the packed cache")
        return on_packed(query, layer, form, scaling, attention_mask).transpose(1, 2), None
    if layer.k.chunks:
        _log_once("attention decodes the cache layer by layer: it is short, on a CPU, or of a form without a kernel")
    output, _ = sdpa_attention_forward(module, query, key.dense(), value.dense(), attention_mask, **kwargs)
    if query.shape[2] > 2 * max(layer.config.buffer, DRAFT):
        # a prompt is packed layer by layer, so that it is never there as a whole
        layer.compress(max(layer.config.buffer, DRAFT))
    return output, None


def kernel_pays(query: Tensor, layer: GearLayer) -> bool:
    """Whether the kernel is faster than decoding the layer for a query [batch, heads, tokens, channels]."""
    return query.is_cuda and layer.k.packed >= FEWEST


def _log_once(message: str) -> None:
    """Logs a message once a process."""
    if message not in _logged:
        _logged.add(message)
        logger.info("%s", message)


def packed_form(layer: GearLayer) -> kv_attention.Packed | None:
    """A layer's packed tokens as the kernel reads them; None where it has no kernel for them."""
    config, k, v = layer.config, layer.k, layer.v
    plain = config.backbone == "kivi" and 16 not in (config.k_bits, config.v_bits)
    parts = config.rank > 0 or config.outliers > 0
    corrected = "v" in config.targets or config.decode_rank is not None or config.channel_outliers
    if not plain or (parts and corrected) or k.packed != v.packed or not k.packed:
        return None
    keys, values = ({name: one.data for name, one in side.grown.items()} for side in (k, v))
    up = "up codes" if config.factor_bits == 8 else "up"
    return kv_attention.Packed(
        keys["codes"], keys["scale"], keys["low"], values["codes"], values["scale"], values["low"],
        config.k_bits, config.v_bits, k.fixed.get("down"), keys.get(up), keys.get("up scale"), keys.get("up low"),
        keys.get("index"), keys.get("kept"),
    )  # fmt: skip


def on_packed(
    query: Tensor, layer: GearLayer, form: kv_attention.Packed, scaling: float, attention_mask: Tensor | None
) -> Tensor:
    """Attention over a layer's packed tokens by the kernel, and over its sink and buffer as they are, merged.

    Args:
        query: [batch, heads, new tokens, channels]; the newest of the layer's tokens are theirs.
        layer: whose keys and values.
        form: of its packed tokens.
        scaling: of the scores.
        attention_mask: bool [batch, 1, new tokens, tokens], or None.

    Returns:
        [batch, heads, new tokens, channels].
    """
    batch, _, new, size = query.shape
    q = query.reshape(batch, form.k.shape[1], -1, size)  # all queries that read a head of keys
    buffer, sink = (
        kv_attention.Plain(k.data, v.data) if k.length else None
        for k, v in ((layer.k.buffer, layer.v.buffer), (layer.k.sink, layer.v.sink))
    )
    mask = None if attention_mask is None else attention_mask[:, 0].expand(batch, -1, -1)
    return kv_attention.packed_attention(q, form, scaling, buffer, sink, new, mask).view(query.shape)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def own_parts(model: PreTrainedModel) -> str | None:
    """The part of the model's attention that this one lacks, in words; None where it lacks none."""
    if getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        return "soft caps"
    return "sinks" if any(name.endswith(".sinks") for name, _ in model.named_parameters()) else None


@contextmanager
def reading_packed(model: PreTrainedModel) -> Iterator[None]:
    """Lets the model's attention read packed caches, but for one with parts of its own, to which they are decoded."""
    own = own_parts(model)
    if own is not None:
        _log_once(f"the model keeps its own attention, which has {own}, and reads a decoded cache")
        yield
        return
    parts = {name: getattr(model.config, name, None) for name in model.config.sub_configs}  # a picture's reader, say
    before = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    before[""] = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


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
    chosen = KVCacheConfig.gear(4 if bits is None else bits) if config is None else config
    GearCache(model, chosen)  # refused before anything is generated
    generate = cast(Any, model.generate)
    outer: dict[str, Any] = {name: vars(model)[name] for name in ("generate", "generate_batch") if name in vars(model)}

    def made(*args: Any, **kwargs: Any) -> Any:
        """`generate` with a compressed cache, where none is given."""
        wanted = kwargs.get("cache_implementation")
        if wanted is not None:
            raise QuantkitError(
                f"cache_implementation={wanted!r} is given inside compressed_kv, which brings its own cache"
            )
        given, habits = kwargs.get("generation_config"), cast(Any, model.generation_config)
        if given is not None and given.cache_implementation is not None:  # a model's habit, nobody's wish
            kwargs["generation_config"] = copy.copy(given)
            kwargs["generation_config"].cache_implementation = None
        own = next((kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)
        if own is None and kwargs.get("use_cache") is not False:
            kwargs[cache_argument(model)] = GearCache(model, chosen)
        habit, habits.cache_implementation = habits.cache_implementation, None
        try:
            return generate(*args, **kwargs)
        finally:
            habits.cache_implementation = habit

    with reading_packed(model):
        vars(model).update(generate=made, generate_batch=_refused)
        try:
            yield lambda: GearCache(model, chosen)
        finally:
            del model.generate, model.generate_batch
            vars(model).update(outer)  # of a context around this one


def _refused(*_args: Any, **_kwargs: Any) -> None:
    raise QuantkitError("continuous batching keeps a paged cache of its own, which cannot be compressed; use generate")
