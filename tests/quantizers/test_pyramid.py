"""Pyramid vector quantization: the search, the gains, the rates, and what error feedback makes of them."""

from itertools import product

import pytest
import torch

from quantkit.core.metrics import proxy_loss
from quantkit.core.stats import LayerStats
from quantkit.formats.pyramid import PyramidWeight
from quantkit.kernels.hadamard import random_signs, rotate
from quantkit.kernels.pyramid import count, decode
from quantkit.quantizers.hadamard import Hadamard
from quantkit.quantizers.pyramid import (
    Pyramid,
    PyramidCode,
    best_code,
    fit_gains,
    gain_levels,
    gaussian_error,
    nearest_level,
    search,
    shape,
)

from ..helpers.methods import problem

GAUSSIAN = {(64, 2): 0.0979, (64, 3): 0.0248, (64, 4): 0.0061, (16, 2): 0.1047, (16, 3): 0.0271, (16, 4): 0.0065}


def project_and_round(x, pulses):
    """The baseline: x scaled to sum |x| = pulses, rounded, and the missing added where most was lost."""
    a = x.abs() + (x.abs().sum(-1, keepdim=True) == 0)
    scaled = a * (pulses / a.sum(-1, keepdim=True))
    y = scaled.floor()
    lost = (scaled - y).sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    return torch.where(x < 0, -1.0, 1.0) * (y + (lost < pulses - y.sum(-1, keepdim=True)))


def cosine(x, y):
    return (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)


@pytest.mark.parametrize(("dimension", "pulses"), [(2, 3), (8, 6), (16, 11), (32, 48), (64, 5)])
def test_search_stays_on_the_pyramid_and_beats_rounding(dimension, pulses):
    x = torch.randn(4000, dimension)
    x[0], x[1, 1:], x[2] = 0, 0, 1e-30
    found, rounded = search(x, pulses), project_and_round(x, pulses)
    for y in (found, rounded):
        assert torch.equal(y, y.round())
        assert (y.abs().sum(-1) == pulses).all()
    assert torch.equal(search(-x[3:], pulses), -found[3:])
    assert (cosine(x, found)[3:] >= cosine(x, rounded)[3:] - 1e-6).all()


def test_search_is_nearly_exhaustive():
    everything = decode(torch.arange(count(4, 4)).unsqueeze(-1), 4, 4).float()
    x = torch.randn(2000, 4)
    best = (x @ everything.T / everything.norm(dim=1)).amax(1) / x.norm(dim=1)
    assert float((best.square() - cosine(x, search(x, 4)).square()).mean()) < 1e-3


def test_more_pulses_come_closer():
    x = torch.randn(3000, 16)
    closeness = [float(cosine(x, search(x, pulses)).mean()) for pulses in (2, 4, 8, 16, 32, 64)]
    assert closeness == sorted(closeness)


@pytest.mark.parametrize(("dimension", "bits"), GAUSSIAN)
def test_error_on_gaussian_weights(dimension, bits):
    """The table of source-coding references, within 2%, at rates that count every bit of the field."""
    code = best_code(bits, dimension)
    assert code.field_bits <= bits * dimension
    x = torch.randn(6000, dimension, generator=torch.Generator().manual_seed(5))
    assert gaussian_error(code, x) == pytest.approx(GAUSSIAN[dimension, bits], rel=0.02) or (
        gaussian_error(code, x) < GAUSSIAN[dimension, bits]
    )


def test_any_rate_is_used_up():
    for bits in (0.75, 1.5, 2.0, 2.5, 3.25, 5.1):
        code = best_code(bits, 32)
        assert bits * 32 - 2 < code.field_bits <= bits * 32
    errors = [gaussian_error(best_code(bits, 16), torch.randn(2000, 16)) for bits in (1, 1.5, 2, 2.25, 2.5, 3)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("dimension", "length"), [(8, 256), (16, 512), (32, 4096)])
def test_group_norms_of_a_rotated_weight_follow_beta(dimension, length):
    """|group|^2 / |row|^2 ~ Beta(D / 2, (n - D) / 2) after a rotation, not before (Kolmogorov-Smirnov test)."""
    rows = 1000 if length < 4096 else 300
    weight = torch.distributions.Laplace(0.0, 1.0).sample((rows, length))
    rotated = rotate(weight, random_signs(length, 1))
    limit = 1.63 / rows**0.5  # exceeded by chance in 1% of cases
    assert _distance_from_beta(rotated, dimension) < limit < _distance_from_beta(weight, dimension)


def _distance_from_beta(weight, dimension):
    rows, length = weight.shape
    share = weight[:, :dimension].square().sum(1) / weight.square().sum(1)
    a, b = dimension / 2, (length - dimension) / 2
    grid = torch.linspace(0, 1, 200001, dtype=torch.float64)[1:-1]
    density = ((a - 1) * grid.log() + (b - 1) * torch.log1p(-grid)).exp()
    cumulative = density.cumsum(0) / density.sum()
    ordered = share.double().sort().values
    expected = cumulative[torch.searchsorted(grid, ordered).clamp_max(len(grid) - 1)]
    return float((expected - (torch.arange(rows) + 0.5) / rows).abs().max())


def test_gain_levels_are_lloyd_maxs():
    """Each level is the mean of what it stands for, and more of them leave less error."""
    x = torch.randn(20000, 32).norm(dim=1)
    errors = []
    for bits in range(6):
        levels = gain_levels(PyramidCode(32, 21, bits), 1 << 20)
        nearest = nearest_level(x, levels)
        errors.append(float((x - levels[nearest]).square().mean()))
        means = torch.stack([x[nearest == i].mean() for i in range(len(levels)) if (nearest == i).sum() > 300])
        used = torch.stack([levels[i] for i in range(len(levels)) if (nearest == i).sum() > 300])
        torch.testing.assert_close(means, used, rtol=0.02, atol=0)
    assert errors == sorted(errors, reverse=True)
    assert float(gain_levels(PyramidCode(32, 21, 0), 32)) == pytest.approx(32**0.5, rel=1e-3)


def test_amplitude_beats_the_norm_as_the_gain():
    """<x, y> / |y| is the best multiple of y; |x|, the norm, gives 2 to 3% more error at 2 bits."""
    x = torch.randn(4000, 32)
    _, amplitudes, directions = shape(x, 21)
    best = (x - amplitudes[:, None] * directions).square().mean()
    preserving = (x - x.norm(dim=1)[:, None] * directions).square().mean()
    assert 1.015 * best < preserving
    scale, gains = fit_gains(amplitudes[None], gain_levels(PyramidCode(32, 21, 4), 1 << 20))
    levels = gain_levels(PyramidCode(32, 21, 4), 1 << 20)
    assert float((x - (scale * levels[gains])[0, :, None] * directions).square().mean()) < 1.01 * best


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(("bits", "dimension"), [(2, 8), (2, 16), (3, 16)])
def test_feedback_beats_the_code_alone(bits, dimension, axis):
    weight, hessian = problem(out_features=64, in_features=96)
    with_feedback = Pyramid(bits, dimension, axis, refit=False).quantize(weight, LayerStats(hessian))
    alone = Pyramid(bits, dimension, axis, refit=False).quantize(weight, LayerStats(torch.eye(96).double()))
    losses = [proxy_loss(weight - q.dequantize(torch.float64), hessian) for q in (with_feedback, alone)]
    assert losses[0] < 0.9 * losses[1]


def test_groups_along_outputs_lose_no_feedback():
    weight, hessian = problem(out_features=128, in_features=128, seed=3)
    losses = {
        axis: proxy_loss(
            weight - Hadamard(Pyramid(2, 32, axis)).quantize(weight, LayerStats(hessian)).dequantize().double(), hessian
        )
        for axis in ("out", "in")
    }
    assert losses["out"] < losses["in"]


@pytest.mark.parametrize("axis", ["out", "in"])
def test_refit_lowers_the_loss(axis):
    weight, hessian = problem(out_features=64, in_features=96)
    losses = [
        proxy_loss(
            weight - Pyramid(2, 16, axis, refit=refit).quantize(weight, LayerStats(hessian)).dequantize().double(),
            hessian,
        )
        for refit in (True, False)
    ]
    assert losses[0] < losses[1]


def test_codes_do_not_depend_on_the_block_size():
    weight, hessian = problem(out_features=40, in_features=96)
    for axis, sizes in (("out", (1, 32, 96)), ("in", (16, 48, 96))):
        runs = [Pyramid(2, 16, axis, block_size=size).quantize(weight, LayerStats(hessian)) for size in sizes]
        for run in runs[1:]:
            assert torch.equal(run.codes, runs[0].codes)


def test_packed_fields_hold_what_was_found():
    for gain_bits, (dimension, pulses) in product((0, 1, 5, 8), ((8, 6), (8, 13), (16, 11), (32, 21), (64, 42))):
        points = search(torch.randn(3, 70, dimension), pulses).to(torch.int16)
        gains = torch.randint(0, 2**gain_bits, (3, 70))
        levels = torch.linspace(1, 2, 2**gain_bits).half()
        packed = PyramidWeight.pack(
            points, gains, torch.rand(70).half(), levels, pulses, "out", (3 * dimension - 1, 70)
        )
        packed.validate()
        assert torch.equal(packed.points()[0], points)
        assert torch.equal(packed.points()[1], gains)
        directions = points.float() / points.float().norm(dim=-1, keepdim=True)
        expected = (levels.float()[gains] * packed.scales.float()).unsqueeze(-1) * directions
        expected = expected.transpose(1, 2).flatten(0, 1)[: 3 * dimension - 1]
        torch.testing.assert_close(packed.dequantize(), expected, rtol=1e-3, atol=1e-7)


def test_a_field_out_of_range_is_refused():
    packed = Pyramid(2.0, 8).quantize(torch.randn(16, 32), LayerStats(torch.eye(32)))
    damaged = packed.map(lambda tensor: torch.full_like(tensor, -1) if tensor.dtype == torch.int32 else tensor)
    with pytest.raises(ValueError, match="not below 27008"):
        damaged.validate()
    with pytest.raises(ValueError, match="NaN or Inf"):
        packed.map(lambda tensor: tensor * torch.inf if tensor.is_floating_point() else tensor).validate()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0.1}, "0.5 to 8"),
        ({"bits": 9}, "0.5 to 8"),
        ({"dimension": 1}, "2 to 256"),
        ({"dimension": 16.0, "bits": 2, "axis": "up"}, "axis"),
        ({"dimension": 3, "bits": 0.9}, "too little"),
        ({"damp": 3}, "fraction"),
        ({"block_size": 0}, "at least one"),
    ],
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Pyramid(**settings)
