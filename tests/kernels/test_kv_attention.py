"""Attention on packed keys and values: the Triton kernel, through the interpreter, against the decoded cache."""

import itertools
import math

import pytest
import torch

from quantkit.kernels import kv_attention
from quantkit.kvcache.attention import on_packed, packed_form
from quantkit.kvcache.cache import GearLayer
from quantkit.kvcache.config import KVCacheConfig

from ..helpers import ptx

CASES = [
    *[(bits, rank, outliers, 2, 64) for bits, rank, outliers in itertools.product((2, 3, 4), (0, 4), (0.0, 0.05))],
    *[(4, 4, 0.02, siblings, size) for siblings, size in itertools.product((1, 4, 8), (64, 128))],
    (8, 0, 0.0, 1, 32),
]


def layer_of(config, batch=2, heads=2, tokens=150, size=64, weights=True):
    """A layer that holds some tokens, packed as far as they fill buffers."""
    generator = torch.Generator().manual_seed(tokens + size)
    layer = GearLayer(config)
    shared = torch.randn(1, heads, 1, size, generator=generator)
    k, v = (torch.randn(batch, heads, tokens, size, generator=generator) + shared for _ in range(2))
    k[..., 3] *= 4
    layer.update(k, v)
    if weights:
        layer.observe(torch.randn(batch, heads, 5, size, generator=generator))
    layer.compress(0)
    return layer


def exact(query, layer, mask, scaling):
    """In fp64, on what the cache decodes to."""
    k, v = (side.dense(torch.float32).double() for side in (layer.k, layer.v))
    repeat = query.shape[1] // k.shape[1]
    k, v = (one.repeat_interleave(repeat, 1) for one in (k, v))
    scores = (query.double() @ k.mT * scaling).masked_fill(~mask, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


def causal(batch, new, tokens):
    return torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)[None, None].repeat(batch, 1, 1, 1)


def assert_near(found, wanted):
    assert float((found.double() - wanted).norm() / wanted.norm()) < 2e-3


@pytest.mark.parametrize(("bits", "rank", "outliers", "siblings", "size"), CASES)
def test_the_kernel_reads_what_the_cache_holds(bits, rank, outliers, siblings, size):
    config = KVCacheConfig(
        bits, bits, group_size=32, buffer=32, rank=rank, outliers=outliers, targets=("k",), weighted=rank > 0
    )
    layer = layer_of(config, size=size)
    query = torch.randn(2, 2 * siblings, 1, size)
    found = on_packed(query, layer, packed_form(layer), size**-0.5, None)
    assert_near(found, exact(query, layer, causal(2, 1, 150), size**-0.5))


@pytest.mark.parametrize(
    ("tokens", "splits"), [(32, 1), (32, 2), (33, 3), (64, 2), (64, 3), (97, 1), (131, 2), (131, 3)]
)
def test_any_length_and_any_split(tokens, splits):
    layer = layer_of(KVCacheConfig(3, 3, group_size=32, buffer=32), tokens=tokens)
    form, query = packed_form(layer), torch.randn(2, 2, 4, 64)
    found = kv_attention.packed_attention(query, form, 0.125, splits=splits)
    packed = layer.k.packed
    k, v = (side.dense(torch.float32)[:, :, :packed] for side in (layer.k, layer.v))
    assert_near(found, (query @ k.mT * 0.125).double().softmax(-1) @ v.double())


@pytest.mark.parametrize(("new", "sink"), [(1, 0), (5, 4)])
def test_masks_several_queries_and_sinks(new, sink):
    config = KVCacheConfig(4, 4, group_size=32, buffer=32, rank=2, targets=("k",), sink=sink, factor_bits=16)
    layer = layer_of(config, tokens=100)
    layer.update(torch.randn(2, 2, new, 64), torch.randn(2, 2, new, 64))
    query = torch.randn(2, 4, new, 64)
    mask = causal(2, new, 100 + new)
    assert_near(on_packed(query, layer, packed_form(layer), 0.125, None), exact(query, layer, mask, 0.125))
    mask[0, :, :, :70] = False  # left padding, over whole blocks
    assert_near(on_packed(query, layer, packed_form(layer), 0.125, mask), exact(query, layer, mask, 0.125))


@pytest.mark.parametrize(
    ("k_bits", "v_bits", "size"), [(2, 2, 64), (3, 3, 128), (4, 4, 64), (8, 8, 64), (8, 8, 128), (4, 3, 128)]
)
def test_the_assembly_that_a_gpu_runs(k_bits, v_bits, size, monkeypatch):
    ptx.Machine().install(monkeypatch)
    layer = layer_of(KVCacheConfig(k_bits, v_bits, group_size=size, buffer=size), batch=1, tokens=200, size=size)
    query = torch.randn(1, 4, 1, size)
    wanted = on_packed(query, layer, packed_form(layer), size**-0.5, None)
    monkeypatch.setattr(kv_attention.launching, "machine", lambda tensor: {"ASM": True, "INTERPRETED": True})
    assert torch.equal(on_packed(query, layer, packed_form(layer), size**-0.5, None), wanted)
    assert_near(wanted, exact(query, layer, causal(1, 1, 200), size**-0.5))


@pytest.mark.parametrize("heads", [2, 4])
def test_queries_as_models_hand_them_on(heads):
    """Heads and tokens are views of other orders, for queries as for the first keys."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 80, 2, 64, generator=generator).transpose(1, 2) for _ in range(2))
    layer = GearLayer(KVCacheConfig(4, 4, group_size=32, buffer=32, sink=4))
    layer.update(k, v)
    layer.compress(0)
    query = torch.randn(2, 3, heads, 64, generator=generator).transpose(1, 2)
    assert_near(on_packed(query, layer, packed_form(layer), 0.125, None), exact(query, layer, causal(2, 3, 80), 0.125))


@pytest.mark.parametrize("outliers", [0.0, 0.05])
def test_queries_are_cast_and_scaled_by_the_kernel(outliers, monkeypatch):
    """bf16, rows apart, 33 of them in programs of 16; nothing but the kernels is launched on them."""
    layer = layer_of(KVCacheConfig(4, 4, group_size=32, buffer=32, outliers=outliers, targets=("k",)), tokens=97)
    wide = torch.full((2, 2, 33, 80), float("nan"), dtype=torch.bfloat16)
    wide[..., :64] = torch.randn(2, 2, 33, 64)
    query, form = wide[..., :64], packed_form(layer)
    packed = layer.k.packed
    k, v = (side.dense(torch.float32)[:, :, :packed].double() for side in (layer.k, layer.v))
    wanted = (query.double() @ k.mT * 0.125).softmax(-1) @ v
    for name in ("to", "mul", "contiguous"):
        monkeypatch.setattr(torch.Tensor, name, None)
    monkeypatch.setattr(torch.nn.functional, "pad", None)
    found = kv_attention.packed_attention(query, form, 0.125, splits=2)
    monkeypatch.undo()
    assert found.dtype == torch.bfloat16
    assert float((found.double() - wanted).norm() / wanted.norm()) < 4e-3


def test_half_precision_queries():
    layer = layer_of(KVCacheConfig.gear(4), tokens=200)
    query = torch.randn(2, 4, 1, 64)
    wanted = exact(query.half().float(), layer, causal(2, 1, 200), 0.125)
    found = on_packed(query.half(), layer, packed_form(layer), 0.125, None)
    assert found.dtype == torch.float16
    assert_near(found, wanted)


def test_forms_without_a_kernel():
    for config in (
        KVCacheConfig(4, 4, "kcvt", buffer=20), KVCacheConfig.gear(2, paper=True), KVCacheConfig(4, 16),
        KVCacheConfig(4, 4, rank=2),
    ):  # fmt: skip
        assert packed_form(layer_of(config, tokens=140)) is None
    layer = layer_of(KVCacheConfig(4, 4), size=72 * 0 + 64, tokens=128)
    form = packed_form(layer)
    assert kv_attention.supported(form, 4) and not kv_attention.supported(form, 65)
    ranks = [KVCacheConfig(4, 4, rank=rank, targets=("k",)) for rank in (16, 17)]
    assert [kv_attention.supported(packed_form(layer_of(config, tokens=128)), 4) for config in ranks] == [True, False]
    with pytest.raises(ValueError, match="rows"):
        kv_attention.packed_attention(torch.randn(2, 2, 65, 64), form, 1.0)
