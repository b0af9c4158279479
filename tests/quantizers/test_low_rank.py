"""Low-rank correction: the closed form is the optimum, in every metric and storage."""

import pytest
import torch

import quantkit
from quantkit import GPTQ, RTN, VPTQ, Hadamard, LowRank, Pyramid
from quantkit.core.metrics import proxy_loss
from quantkit.core.stats import LayerStats
from quantkit.evals.recovery import InMetric
from quantkit.formats.low_rank import LowRankWeight
from quantkit.quantizers.low_rank import leading_vectors
from quantkit.run.recipe import core, make_quantizer


def layer(rows=96, columns=64, seed=0):
    """A weight, and statistics of inputs with a few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) * torch.logspace(0.5, -1.5, columns)
    x = torch.randn(600, columns, generator=generator, dtype=torch.float64) @ mix
    return weight, LayerStats(x.T @ x / 600, num_tokens=600)


def best_of(error, hessian, rank):
    """B A by the route of QERA and EoRA: singular vectors of E S, with a Cholesky root S of H."""
    root = torch.linalg.cholesky(hessian)
    u, s, v = torch.linalg.svd(error @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ torch.linalg.solve_triangular(root, v[:rank], upper=False, left=False), s


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (48, 48)])
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_what_is_left_is_the_tail_energy(shape, rank):
    weight, stats = layer(*shape)
    error = weight - RTN(3, 32).quantize(weight, None).dequantize().double()
    vectors = leading_vectors(error, stats.hessian, rank)
    correction = vectors @ (vectors.T @ error)
    expected, values = best_of(error, stats.hessian, rank)
    torch.testing.assert_close(correction, expected, rtol=1e-8, atol=1e-9)
    left = proxy_loss(error - correction, stats.hessian)
    assert left == pytest.approx(float(values[rank:].square().sum()), rel=1e-8, abs=1e-12)


def test_singular_statistics_have_a_solution():
    x = torch.randn(10, 64, dtype=torch.float64)
    hessian = x.T @ x
    for shape in ((40, 64), (80, 64)):
        error = torch.randn(shape, dtype=torch.float64)
        vectors = leading_vectors(error, hessian, 10)
        assert proxy_loss(error - vectors @ (vectors.T @ error), hessian) < 1e-9 * proxy_loss(error, hessian)


def loss(method, weight, stats):
    return proxy_loss(weight - method.quantize(weight, stats).dequantize().double(), stats.hessian)


@pytest.mark.parametrize(
    "inner", [RTN(2, 32), GPTQ(2, 32), VPTQ(2.0, 2), Pyramid(2.0, 8)], ids=lambda q: type(q).__name__
)
def test_exact_beats_other_metrics_and_none_at_every_rank(inner):
    weight, stats = layer()
    last = loss(inner, weight, stats)
    for rank in (1, 4, 16):
        exact, diagonal, plain = (
            loss(InMetric(inner, rank, metric=metric), weight, stats) for metric in ("exact", "diagonal", "plain")
        )
        assert exact == loss(LowRank(inner, rank), weight, stats)
        assert exact < last  # monotone in the rank, and better than none
        assert exact < diagonal
        assert exact < plain
        last = exact


@pytest.mark.parametrize("bits", [16, 8])
def test_full_rank_gives_the_weight_back(bits):
    weight, stats = layer(48, 48)
    packed = LowRank(RTN(2, 16), 1000, adapter_bits=bits).quantize(weight, stats)
    assert packed.rank == 48
    left = float((packed.dequantize().double() - weight).norm() / weight.norm())
    assert left < (2e-3 if bits == 16 else 3e-2)


def test_stored_factors_lose_little():
    weight, stats = layer()
    exact = {bits: loss(LowRank(GPTQ(2, 32), 8, adapter_bits=bits), weight, stats) for bits in (16, 8)}
    error = weight - GPTQ(2, 32).quantize(weight, stats).dequantize().double()
    ideal = float(best_of(error, stats.hessian, 8)[1][8:].square().sum())
    assert exact[16] < 1.001 * ideal
    assert exact[8] < 1.05 * ideal


def test_every_byte_is_counted():
    base = GPTQ(2, 32).layout(96, 64).nbytes
    assert LowRank(GPTQ(2, 32), 5).layout(96, 64).nbytes == base + 2 * 5 * (96 + 64)
    assert LowRank(GPTQ(2, 32), 5, adapter_bits=8).layout(96, 64).nbytes == base + 5 * (96 + 64) + 4 * 5
    assert LowRank(GPTQ(2, 32), 500).layout(96, 64).nbytes == base + 2 * 64 * (96 + 64)


@pytest.mark.parametrize("inner", [GPTQ(2, 32), VPTQ(2.0, 2), Pyramid(2.0, 8), Pyramid(3.0, 16), Hadamard(GPTQ(2, 32))])
def test_one_launch_multiplies_both(inner, monkeypatch):
    """Kernels that can add a correction get it; corrections nest."""
    weight, stats = layer()
    packed = LowRank(LowRank(inner, 3), 2).quantize(weight.float(), stats)
    x, bias = torch.randn(2, 5, 64), torch.randn(96)
    expected = torch.nn.functional.linear(x, packed.dequantize(), bias)
    torch.testing.assert_close(packed.matmul(x, bias), expected, rtol=1e-4, atol=1e-4)
    calls = []
    packed.base.base.__class__.matmul, original = (
        lambda self, x, bias=None, up=None, down=None: calls.append(up.shape[1]) or original(self, x, bias, up, down),
        packed.base.base.__class__.matmul,
    )
    try:
        torch.testing.assert_close(packed.matmul(x, bias), expected, rtol=1e-4, atol=1e-4)
    finally:
        packed.base.base.__class__.matmul = original
    assert calls == [5]


def test_a_correction_of_zeros_changes_nothing():
    weight, _ = layer()
    base = RTN(3, 32).quantize(weight, None)
    packed = LowRankWeight(base, torch.randn(96, 4).half(), torch.zeros(4, 64).half())
    x = torch.randn(3, 64)
    assert torch.equal(packed.dequantize(), base.dequantize())
    torch.testing.assert_close(packed.matmul(x), base.matmul(x), rtol=0, atol=1e-6)


def test_damaged_factors_are_refused():
    weight, stats = layer()
    packed = LowRank(RTN(3, 32), 4).quantize(weight, stats)
    packed.validate()
    for damaged in (
        LowRankWeight(packed.base, packed.up[:, :3], packed.down),
        LowRankWeight(packed.base, packed.up[:50], packed.down),
        LowRankWeight(packed.base, packed.up.float(), packed.down),
        LowRankWeight(packed.base, packed.up[:, :0], packed.down[:0]),
        LowRankWeight(packed.base, packed.up, packed.down, torch.ones(4)),
        LowRankWeight(packed.base, torch.full_like(packed.up, torch.nan), packed.down),
    ):
        with pytest.raises(ValueError):
            damaged.validate()


@pytest.mark.parametrize(
    "settings",
    [{"rank": 0}, {"adapter_bits": 4}],
    ids=lambda s: next(iter(s)),
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        LowRank(RTN(3, 32), **settings)


def test_by_name():
    assert make_quantizer("gptq", None, 8, bits=3) == LowRank(GPTQ(3), 8)
    assert make_quantizer("vptq", None, 8, bits=3) == Hadamard(LowRank(VPTQ(3), 8))
    assert core(make_quantizer("vptq", None, 8, bits=3)) == VPTQ(3)
    with pytest.raises(quantkit.core.errors.QuantkitError, match="rank=0"):
        make_quantizer("gptq", None, 0, bits=3)
