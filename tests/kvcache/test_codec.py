"""The codec: codes come back, every part lowers the error it is for, and nothing depends on how keys are scaled."""

import itertools
from dataclasses import replace

import pytest
import torch

from quantkit.core.errors import QuantkitError
from quantkit.evals.kv_prefix import PerToken
from quantkit.kvcache import codec
from quantkit.kvcache.config import KVCacheConfig
from quantkit.kvcache.storage import Side


def keys(tokens=128, heads=2, channels=64, batch=2, outliers=1.0):
    """Keys with channels that have means, directions that many tokens share, and a few channels that are larger."""
    generator = torch.Generator().manual_seed(7)
    shared = torch.randn(batch, heads, 6, channels, generator=generator)
    x = torch.randn(batch, heads, tokens, 6, generator=generator) @ shared
    x = x + 3 * torch.randn(channels, generator=generator)
    x = x + 0.5 * torch.randn(batch, heads, tokens, channels, generator=generator)
    x[..., ::16] *= outliers
    return x


def error(x, config, name="k", weights=None):
    side = Side(config, name)
    side.append(x)
    side.compress(0, weights)
    return float((side.dense(torch.float32) - x).square().sum() / x.square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("channels", [16, 64, 80, 128])
def test_codes_come_back(bits, channels):
    codes = torch.randint(0, 2**bits, (2, 3, 5, channels), dtype=torch.uint8)
    packed = codec.pack(codes, bits)
    assert packed.shape[-1] * 8 == channels * bits
    assert torch.equal(codec.unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_code_is_within_half_a_step(bits):
    x = keys()
    for grid, by_token in (
        (codec.groups_of_tokens(x, bits, 32), False),
        (codec.groups_of_channels(x, bits, 32), True),
        (codec.groups_of_channels(x, bits, None), True),
    ):
        step = float(grid.scale.float().max())
        assert float((codec.values(grid, bits, by_token) - x).abs().max()) < 0.51 * step + 2e-3


def test_constant_vectors_survive():
    x = torch.full((1, 1, 64, 64), 3.0)
    assert error(x, KVCacheConfig(2, 2)) < 1e-6


def test_what_counts_as_an_outlier():
    x = torch.tensor([[[[5.0, -9.0, 1.0, 2.0, 3.0, 0.0, 7.0, -1.0]]]])
    places = codec.extremes(x, 2, 3)
    assert set(places.flatten().tolist()) == {1, 6}
    plain = codec.without(x, places, 3)
    assert plain[0, 0, 0, 1] == plain[0, 0, 0, 6] == pytest.approx(10 / 6)
    assert sorted(codec.extremes(x, 8, 3).flatten().tolist()) == list(range(8))


@pytest.mark.parametrize("outliers", [1.0, 8.0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_part_lowers_the_error_of_keys(bits, outliers):
    """KVCACHE's safe order: per token >= KIVI >= GEAR-L >= GEAR, strictly where channels have outliers."""
    x = keys(outliers=outliers)
    plain = {"rank": 4, "factor_bits": 16}
    errors = [
        float((PerToken(bits).decoded(x) - x).square().sum() / x.square().sum()),
        error(x, KVCacheConfig(bits, bits)),
        error(x, KVCacheConfig(bits, bits, **plain)),
        error(x, KVCacheConfig(bits, bits, **plain, outliers=0.1)),
    ]
    assert all(b < a if outliers > 1 else b <= 1.001 * a for a, b in itertools.pairwise(errors)), errors


def test_more_bits_rank_and_outliers_mean_less_error():
    x = keys()
    for settings in (
        [KVCacheConfig(bits, bits) for bits in (2, 3, 4, 8)],
        [KVCacheConfig(2, 2, rank=rank, iterations=12) for rank in (0, 1, 2, 4, 8, 16)],
        [KVCacheConfig(2, 2, outliers=fraction) for fraction in (0, 0.05, 0.1, 0.3, 1)],
    ):
        errors = [error(x, config) for config in settings]
        assert all(b < a for a, b in itertools.pairwise(errors)), errors


def test_full_rank_and_all_outliers_are_exact():
    x = keys()
    assert error(x, KVCacheConfig(2, 2, rank=64, factor_bits=16)) < 1e-6
    assert error(x, KVCacheConfig(2, 2, outliers=1.0)) < 1e-6


def test_the_correction_is_nearly_the_best_of_its_rank():
    x = keys()
    grid = codec.groups_of_tokens(x, 2, 64)
    lost = x - codec.values(grid, 2, by_token=False)
    down = codec.basis(lost, 4, None, 8)
    kept = lost - codec.coordinates(lost, down, None) @ down.mT
    best = torch.linalg.svdvals(lost)[..., 4:].square().sum()
    assert float(kept.square().sum()) <= 1.01 * float(best)


def test_weighted_corrections_do_not_depend_on_how_keys_are_scaled():
    """Keys times c, weights by c: the same logits. Unweighted ones spend their rank on what is large."""
    x, weights = keys(tokens=256), torch.rand(2, 2, 64) + 0.5
    scales = torch.where(torch.rand(64) < 0.2, 8.0, 1.0)
    weighted = KVCacheConfig(2, 2, rank=4, weighted=True, factor_bits=16)

    def logits_error(config, by):
        side = Side(config, "k")
        side.append(x * by)
        side.compress(0, weights / by if config.weighted else None)
        return float(((side.dense(torch.float32) / by - x) * weights[:, :, None]).square().sum())

    ones = torch.ones(64)
    assert logits_error(weighted, scales) == pytest.approx(logits_error(weighted, ones), rel=5e-3)
    plain = KVCacheConfig(2, 2, rank=4, factor_bits=16)
    assert logits_error(plain, scales) > 1.03 * logits_error(plain, ones)


@pytest.mark.parametrize(
    "config",
    [
        KVCacheConfig(2, 2), KVCacheConfig(3, 3, group_size=32, buffer=32), KVCacheConfig(4, 4, "kcvt", buffer=20),
        KVCacheConfig.gear(2), KVCacheConfig.gear(4, paper=True), KVCacheConfig.gear(2, paper=True),
        replace(KVCacheConfig.gear(3, paper=True), outliers=0.0), KVCacheConfig(2, 4, outliers=0.05, sink=4),
    ],
    ids=lambda config: f"{config.backbone}-{config.k_bits}-{config.rank}-{config.outliers}",
)  # fmt: skip
def test_storage_is_what_the_closed_form_says(config):
    """A prompt that fills whole buffers; fp16, so that what is not packed counts 16 bits."""
    tokens = config.sink + 15 * 64 * 5
    x = keys(tokens, heads=2, batch=1).half()
    total = 0
    for name in ("k", "v"):
        side = Side(config, name)
        side.append(x)
        side.compress(0)
        total += side.nbytes
    assert 8 * total / (2 * x.numel()) == pytest.approx(config.bits_per_element(64, 2, tokens), rel=0.01)


def test_settings():
    for wrong in (
        {"k_bits": 5}, {"backbone": "none"}, {"rank": -1}, {"outliers": 2}, {"group_size": 20}, {"buffer": 20},
        {"targets": ("q",)}, {"factor_bits": 4}, {"decode_rank": -1},
    ):  # fmt: skip
        with pytest.raises(QuantkitError):
            KVCacheConfig(**wrong)
    config = KVCacheConfig.gear(2, paper=True)
    assert (config.k_bits, config.group_size, config.rank, config.decode_rank, config.outliers, config.buffer) == (
        2, 64, 4, 2, 0.02, 64,
    )  # fmt: skip
    assert KVCacheConfig.gear(4, paper=True).buffer == 20
    assert KVCacheConfig.from_json(config.to_json()) == config
    with pytest.raises(QuantkitError, match="no settings"):
        KVCacheConfig.from_json("[]")


def test_a_budget_buys_the_best_that_fits():
    bought = [KVCacheConfig.for_budget(bits) for bits in (2.6, 3.2, 3.6, 4.2, 4.7, 16)]
    assert [(config.k_bits, config.v_bits) for config in bought] == [(2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (8, 8)]
    for bits in (2.6, 3, 3.5, 4.3, 5, 8):
        assert KVCacheConfig.for_budget(bits).bits_per_element(128, 8, 8192) <= bits
    with pytest.raises(QuantkitError, match="the least is 2"):
        KVCacheConfig.for_budget(2)
