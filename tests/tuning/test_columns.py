"""Trellis codes that stay: a layer without dense weights tunes as one with them does."""

import copy

import pytest
import torch

import quantkit
from quantkit import GPTQ, Calibration, Hadamard, LowRank, PVSettings, Trellis, TuningSettings
from quantkit.core.stats import LayerStats
from quantkit.formats.rotated import RotatedWeight
from quantkit.models.linear import QuantizedLinear
from quantkit.tuning import end_to_end
from quantkit.tuning.columns import ColumnScaledLinear, by_columns
from quantkit.tuning.parts.base import tunable
from quantkit.tuning.pv import TunedLinear

WEIGHTS = {
    "trellis": Trellis(2, 10),
    "rotated": Hadamard(Trellis(3, 10)),
    "codes along inputs": Trellis(2, 10, axis="in"),
    "rotated, many states": Hadamard(Trellis(2, 12)),
}
OTHERS = {
    "corrected": Hadamard(LowRank(Trellis(2, 10), 2)),
    "integers": GPTQ(2, 64),
}


def packed_by(method):
    """A weight [72, 132] packed by a method."""
    generator = torch.Generator().manual_seed(3)
    weight, x = (torch.randn(rows, 132, generator=generator) for rows in (72, 400))
    return method.quantize(weight, LayerStats(x.T @ x / 400))


def passes(layer, x, wanted):
    """(outputs, gradient of x, gradients of what moves) of the squared distance to `wanted`."""
    x = x.clone().requires_grad_()
    layer.open()
    y = layer(x)
    (y - wanted).square().mean().backward()
    gradients = [*layer.gradients()] if isinstance(layer, ColumnScaledLinear) else None
    layer.close()
    gradients = gradients or [parameter.grad for parameter in layer.parts.parameters()]
    return y.detach(), x.grad, [gradient.clone() for gradient in gradients]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_outputs_and_gradients_are_those_of_the_dense_weight(method, bias):
    packed = packed_by(method)
    assert by_columns(packed)
    generator = torch.Generator().manual_seed(4)
    own = torch.randn(72, generator=generator) if bias else None
    x, wanted = torch.randn(5, 7, 132, generator=generator), torch.randn(5, 7, 72, generator=generator)
    layers = [TunedLinear(tunable(packed), own), ColumnScaledLinear(packed, own, torch.float32)]
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parts.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    dense, columns = (passes(layer, x, wanted) for layer in layers)
    for one, other in zip((*dense[:2], *dense[2]), (*columns[:2], *columns[2]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    assert len(columns[2]) == 1 and columns[2][0].any()
    assert all(torch.equal(a, b) for a, b in zip(*(w.packed.state().values() for w in layers), strict=True))


def test_inputs_alone_rotated():
    packed = packed_by(Hadamard(Trellis(2, 10)))
    x = torch.randn(3, 132, generator=torch.Generator().manual_seed(6))
    weight = RotatedWeight(packed.base, packed.in_signs)
    layer = ColumnScaledLinear(weight, None, torch.float32)
    layer.open()
    torch.testing.assert_close(layer(x), x @ weight.dequantize().T, rtol=1e-4, atol=1e-4)


def test_mixed_precision_differs_by_its_rounding_alone():
    packed, generator = packed_by(Hadamard(Trellis(2, 10))), torch.Generator().manual_seed(7)
    bias, x = torch.randn(72, generator=generator), torch.randn(9, 132, generator=generator)
    wanted = torch.randn(9, 72, generator=generator)
    exact = passes(ColumnScaledLinear(packed, bias, torch.float32), x, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = passes(ColumnScaledLinear(packed, bias, torch.bfloat16), x, wanted)
    assert mixed[0].dtype == torch.bfloat16
    for one, other in zip((*exact[:2], *exact[2]), (*mixed[:2], *mixed[2]), strict=True):
        assert 0 < (one - other.float()).norm() / one.norm() < 0.02
    half = ColumnScaledLinear(packed, bias, torch.bfloat16)
    half.open()
    assert half(x).dtype == torch.float32 and half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("method", OTHERS.values(), ids=OTHERS.keys())
def test_what_has_more_to_tune_is_not_taken_for_it(method):
    assert not by_columns(packed_by(method))


def test_a_run_ends_where_one_with_dense_weights_does(teacher, tokenizer, monkeypatch):
    text, method = Calibration("stdlib", 24, 64, seed=2), Hadamard(Trellis(2, 10))
    model = quantkit.quantize(copy.deepcopy(teacher), tokenizer, method=method, calibration=text)
    settings = TuningSettings(24, 4, 4, evaluate_every=12, held_out=4, mixed=False, pv=PVSettings("continuous", 3e-3))
    found = []
    for by in (by_columns, lambda _weight: False):
        monkeypatch.setattr(end_to_end, "by_columns", by)
        other = copy.deepcopy(model)
        quantkit.tune(other, teacher, tokenizer, calibration=text, settings=settings)
        found.append(other)
    (first, *_, last), dense = ([entry["kl"] for entry in one.quantkit_tuning] for one in found)
    assert last < first
    assert [first, last] == pytest.approx([dense[0], dense[-1]], rel=1e-3)
    layers = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    pairs = [[one.get_submodule(name).packed.base for one in (model, found[0])] for name in layers]
    assert all(torch.equal(before.codes, after.codes) for before, after in pairs)
    assert not all(torch.equal(before.scales, after.scales) for before, after in pairs)
