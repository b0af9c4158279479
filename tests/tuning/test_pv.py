"""PV-Tuning: formats taken apart and put together, and the invariants of a step."""

import copy
import dataclasses
import itertools
from functools import cache

import pytest
import torch

from quantkit import GPTQ, RTN, VPTQ, Hadamard, LowRank, Pyramid, Trellis
from quantkit.core.errors import QuantkitError
from quantkit.core.stats import LayerStats
from quantkit.formats.dense import DenseWeight
from quantkit.tuning.parts.base import tunable
from quantkit.tuning.pv import PVOptimizer, TunedLinear
from quantkit.tuning.settings import MODES, PVSettings

METHODS = {
    "int": GPTQ(2, 64),
    "int-asymmetric": GPTQ(3, 64, symmetric=False),
    "codebook": VPTQ(2.0, 3),
    "codebook-residual": VPTQ(2.0, 4, residual_bits=4),
    "codebook-outliers": VPTQ(1.5, 2, outliers=0.1, ranges=2, scale_inputs=True),
    "pyramid": Pyramid(2.0, 8),
    "pyramid-in": Pyramid(3.0, 16, axis="in"),
    "rotated": Hadamard(Pyramid(2.25, 16)),
    "trellis": Trellis(2, 10),
    "trellis-in": Hadamard(Trellis(3, 10, axis="in")),
    "corrected": LowRank(Hadamard(GPTQ(2, 64)), 4),
    "corrected-inside": Hadamard(LowRank(VPTQ(2.0, 3), 4)),
    "corrected-int8": LowRank(GPTQ(2, 64), 4, adapter_bits=8),
}
each = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def problem(rows=72, columns=132, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(500, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    hessian = x.T @ x / 500
    return weight, hessian / hessian.diagonal().mean()


@cache
def _packed(method):
    weight, hessian = problem()
    return method.quantize(weight, LayerStats(hessian))


def packed_by(method):
    """The problem's weight, packed once for all tests: a copy of its own."""
    return copy.deepcopy(_packed(method))


@each
def test_taken_apart_and_put_together_is_the_same(method):
    weight, hessian = problem(70, 130)
    packed = method.quantize(weight, LayerStats(hessian))
    parts = tunable(packed)
    torch.testing.assert_close(parts(), packed.dequantize(), rtol=1e-5, atol=1e-6)
    again = parts.packed()
    again.validate()
    assert again.metadata() == packed.metadata()
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in packed.state().items())


@each
def test_the_nearest_codes_of_a_weight_are_its_own(method):
    parts = tunable(packed_by(method))
    parts()
    for part in parts.coded():
        units = part.units(part.latest.detach())
        _, values = part.nearest(torch.arange(len(units)), units)
        same = torch.isclose(values, units, rtol=1e-5, atol=1e-5).all(1).float().mean()
        # stages are searched one after the other, points of a pyramid by angle before their length
        assert same > (0.5 if isinstance(method, VPTQ) and method.residual_bits else 0.99)


@each
def test_nearest_codes_are_assigned(method):
    """What `nearest` promises is what the weight becomes."""
    parts = tunable(packed_by(method))
    parts()
    for part in parts.coded():
        wanted = part.units(part.latest.detach() + 0.5 * torch.randn(part.latest.shape))
        index = torch.randperm(len(wanted))[: len(wanted) // 2]
        codes, values = part.nearest(index, wanted[index])
        before = part.units(part.decode().detach())
        part.assign(index, codes)
        after = part.units(part.decode().detach())
        torch.testing.assert_close(after[index], values, rtol=1e-5, atol=1e-5)
        others = torch.ones(len(wanted), dtype=torch.bool).index_fill_(0, index, False)
        assert torch.equal(after[others], before[others])
        assert float((values - wanted[index]).norm()) < float((before[index] - wanted[index]).norm())


def test_formats_that_cannot_be_tuned_are_named():
    with pytest.raises(QuantkitError, match="'dense' cannot be tuned: its schema marks no tensor"):
        tunable(DenseWeight(torch.randn(3, 4)))


def test_a_scale_of_zero_makes_no_wild_code():
    packed = RTN(2, 64).quantize(torch.randn(8, 64), None)
    parts = tunable(dataclasses.replace(packed, scales=torch.zeros_like(packed.scales)))
    index = torch.arange(8 * 64)
    codes, _ = parts.nearest(index, torch.randn(512, 1).masked_fill(index.unsqueeze(1) % 2 == 0, 0.0))
    assert int(codes.min()) >= 0
    assert int(codes.max()) <= 3


def step(layer, optimizer, weight, hessian):
    optimizer.open()
    error = layer.leaf - weight
    loss = ((error @ hessian) * error).sum()
    loss.backward()
    return float(loss.detach()), optimizer.step()


@pytest.mark.parametrize("method", [METHODS["int-asymmetric"], METHODS["codebook"], METHODS["rotated"]])
@pytest.mark.parametrize("mode", MODES)
def test_no_rate_and_no_share_change_nothing(method, mode):
    weight, hessian = problem()
    packed = packed_by(method)
    layer = TunedLinear(tunable(packed), None)
    settings = PVSettings(mode, lr=0, code_lr=0, fraction=0)
    optimizer = PVOptimizer([layer], settings)
    for _ in range(3):
        assert step(layer, optimizer, weight, hessian)[1] == 0
    again = layer.parts.packed()
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in packed.state().items())


@pytest.mark.parametrize(
    ("method", "some"),
    [(METHODS["trellis"], 0), (Hadamard(LowRank(METHODS["trellis"], 4)), 0), (METHODS["rotated"], 1)],
)
def test_codes_of_trellises_stay_where_no_mode_is_asked_for(method, some):
    layer = TunedLinear(tunable(packed_by(method)), None)
    assert len(PVOptimizer([layer], PVSettings()).coded) == some
    assert len(PVOptimizer([layer], PVSettings("buffer")).coded) == 1


@each
def test_codes_change_within_share_and_trust(method):
    weight, hessian = problem()
    layer = TunedLinear(tunable(packed_by(method)), None)
    optimizer = PVOptimizer([layer], PVSettings("buffer", lr=0, code_lr=0.2, fraction=0.02, trust=0.05))
    (part,) = layer.parts.coded()
    counts = []
    for _ in range(12):
        before = part.decode().detach()
        distance = float((part.units(optimizer.targets[0].detach()) - part.units(before)).norm())
        changed = step(layer, optimizer, weight, hessian)[1]
        after = part.decode().detach()
        units = part.units(before)
        assert changed <= max(1, int(0.02 * len(units)))
        moved = (part.units(after) - units).square().sum(1)
        assert int((moved > 0).sum()) == changed
        assert float(moved.sum()) <= (0.05 * float(before.norm())) ** 2 + float(moved.max()) + 1e-6
        counts.append(changed)
        assert distance >= 0
    assert sum(counts) > 0
    assert torch.equal(layer.parts.packed().dequantize(), tunable(layer.parts.packed()).packed().dequantize())


@each
def test_a_step_of_codes_never_leaves_the_target_farther(method):
    layer = TunedLinear(tunable(packed_by(method)), None)
    optimizer = PVOptimizer([layer], PVSettings("buffer", lr=0, code_lr=0.3, fraction=0.5, trust=1.0))
    (part,) = layer.parts.coded()
    target = optimizer.targets[0]
    for _ in range(3):
        with torch.no_grad():
            target += 0.3 * torch.randn(target.shape)
        before = float((part.units(target.detach()) - part.units(part.decode().detach())).norm())
        optimizer._recode(part, target)
        assert float((part.units(target.detach()) - part.units(part.decode().detach())).norm()) <= before


@pytest.mark.parametrize(
    "method", [RTN(2, 64), VPTQ(2.0, 3, refit=0), Pyramid(2.0, 8, refit=False)], ids=lambda q: type(q).__name__
)
def test_the_projected_step_descends_on_a_quadratic(method):
    """The oracle: y = argmin |y - (x - grad / L)| over codes, all of them, never raises phi, whose curvature is L."""
    weight, hessian = problem()
    lipschitz = 2 * float(torch.linalg.eigvalsh(hessian).max())
    layer = TunedLinear(tunable(packed_by(method)), None)
    settings = PVSettings("linearized", lr=0, code_lr=0, fraction=1.0, trust=1.0)
    optimizer = PVOptimizer([layer], settings)
    (part,) = layer.parts.coded()
    losses = []
    for _ in range(10):
        optimizer.open()
        error = layer.leaf - weight
        loss = ((error @ hessian) * error).sum()
        loss.backward()
        losses.append(float(loss.detach()))
        layer.close()
        with torch.no_grad():
            optimizer.targets[0].copy_(part.latest - part.latest.grad / lipschitz)
        optimizer._recode(part, optimizer.targets[0])
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(losses))


@each
def test_continuous_parts_descend(method):
    weight, hessian = problem()
    layer = TunedLinear(tunable(packed_by(method)), None)
    codes = [copy.deepcopy(dict(part.named_buffers())) for part in layer.parts.coded()]
    with torch.no_grad():
        for parameter in layer.parts.parameters():
            parameter *= 1 + 0.1 * torch.randn(parameter.shape)
    optimizer = PVOptimizer([layer], PVSettings("continuous", lr=1e-3))
    losses = [step(layer, optimizer, weight, hessian)[0] for _ in range(20)]
    assert losses[-1] < losses[0]
    for before, part in zip(codes, layer.parts.coded(), strict=True):
        codes_of = {name: buffer for name, buffer in part.named_buffers() if name != "begin"}
        assert all(torch.equal(before[name], buffer) for name, buffer in codes_of.items())


@pytest.mark.parametrize(
    "settings",
    [{"mode": "ste"}, {"lr": -1}, {"code_lr": 2}, {"fraction": 1.5}, {"trust": -0.1}, {"decay": 3}],
    ids=lambda s: next(iter(s)),
)
def test_bad_settings(settings):
    with pytest.raises(QuantkitError, match=next(iter(settings))):
        PVSettings(**settings)
