import pytest
import torch

from quantkit.core.errors import CalibrationError
from quantkit.core.metrics import proxy_loss
from quantkit.core.stats import LayerStats
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.rtn import RTN

from ..helpers.methods import problem


def stats_of(hessian):
    return LayerStats(hessian, num_tokens=400)


@pytest.mark.parametrize("order", ["none", "group", "act"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_rtn(bits, symmetric, order):
    weight, hessian = problem(out_features=64, in_features=96)
    for group_size in (16, 40, -1):  # 40 leaves a ragged last group of 16
        gptq = GPTQ(bits, group_size, symmetric, order=order).quantize(weight, stats_of(hessian))
        rtn = RTN(bits, group_size, symmetric).quantize(weight)
        losses = [proxy_loss(weight - q.dequantize(torch.float64), hessian) for q in (gptq, rtn)]
        assert losses[0] < losses[1]
        assert gptq.bits_per_weight == rtn.bits_per_weight


@pytest.mark.parametrize("order", ["none", "group", "act"])
def test_packed_bytes_do_not_depend_on_the_block_size(order):
    weight, hessian = problem(out_features=16, in_features=96)
    runs = [
        GPTQ(3, 40, order=order, block_size=size).quantize(weight, stats_of(hessian)).state() for size in (1, 32, 96)
    ]
    for state in runs[1:]:
        assert all(torch.equal(state[name], runs[0][name]) for name in state)


def test_equals_rtn_on_a_diagonal_hessian():
    weight, _ = problem(out_features=16, in_features=96)
    gptq = GPTQ(4, 32).quantize(weight, stats_of(torch.eye(96, dtype=torch.float64)))
    rtn = RTN(4, 32).quantize(weight)
    assert torch.equal(gptq.codes, rtn.codes)
    assert torch.equal(gptq.scales, rtn.scales)


def test_act_order_is_a_permutation():
    """Quantizing in activation order equals quantizing a permuted problem left to right with the same grids."""
    weight, hessian = problem(out_features=8, in_features=32)
    ordered = GPTQ(3, -1, order="act", search=False).quantize(weight, stats_of(hessian)).dequantize(torch.float64)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    permuted = GPTQ(3, -1, order="none", search=False).quantize(weight[:, order], stats_of(hessian[order][:, order]))
    torch.testing.assert_close(ordered[:, order], permuted.dequantize(torch.float64))


def test_layout_is_exact():
    for settings in ({}, {"bits": 3, "symmetric": False}, {"bits": 5, "group_size": 40}, {"group_size": -1}):
        quantizer = RTN(**settings)
        packed = quantizer.quantize(torch.randn(33, 100))
        layout = quantizer.layout(33, 100)
        assert layout.metadata() == packed.metadata()
        assert layout.nbytes == packed.nbytes


def test_singular_hessian_raises_damping_and_reports_it():
    x = torch.randn(3, 64)
    stats = LayerStats(x.T @ x / 3, name="layers.0.q")
    GPTQ(4, 32, damp=0.0).quantize(torch.randn(8, 64), stats)
    assert stats.damping > 0


def test_hopeless_hessian_names_the_layer():
    indefinite = torch.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = 99.0
    with pytest.raises(CalibrationError, match=r"layers\.0\.q.*does not factor"):
        GPTQ(4, 32).quantize(torch.randn(8, 64), LayerStats(indefinite, name="layers.0.q"))


def test_dead_input_is_harmless():
    weight, hessian = problem(out_features=8, in_features=64)
    hessian[5] = hessian[:, 5] = 0
    packed = GPTQ(4, 32).quantize(weight, stats_of(hessian))
    assert torch.isfinite(packed.dequantize()).all()


@pytest.mark.parametrize("settings", [{"order": "random"}, {"damp": 2.0}, {"damp": -0.1}, {"block_size": 0}])
def test_senseless_settings_are_refused(settings):
    with pytest.raises(ValueError):
        GPTQ(**settings)


def test_needs_statistics():
    with pytest.raises(ValueError, match="RTN works without"):
        GPTQ(4).quantize(torch.randn(4, 32), None)
