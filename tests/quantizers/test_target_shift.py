import pytest
import torch

from quantkit.core.protocols import Needs, Quantizer
from quantkit.core.stats import LayerStats, StatsAccumulator
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.rtn import RTN
from quantkit.quantizers.target_shift import TargetShift

from ..helpers.methods import problem


def streams(in_features=48, tokens=4000):
    mix = torch.randn(in_features, in_features) / in_features**0.5
    full = torch.randn(tokens, in_features) @ mix
    return full, full + 0.3 * torch.randn(tokens, in_features) @ torch.randn(
        in_features, in_features
    ) / in_features**0.5


def test_full_shift_is_the_least_squares_target():
    full, quantized = streams()
    accumulator = StatsAccumulator(48, with_cross=True, device=torch.device("cpu"))
    for part in range(0, 4000, 1000):
        accumulator.add(quantized[part : part + 1000], full[part : part + 1000])
    weight = torch.randn(12, 48)
    target = TargetShift(RTN(8, 16), 1.0, damp=0.0).target(weight, accumulator.finish("layer"))
    expected = torch.linalg.lstsq(quantized.double(), full.double() @ weight.T.double()).solution.T
    torch.testing.assert_close(target.double(), expected, rtol=1e-3, atol=1e-3)


def test_shift_lowers_the_error_that_the_model_sees():
    full, quantized = streams()
    stats = LayerStats(quantized.T @ quantized / 4000, full.T @ quantized / 4000, 4000)
    weight = torch.randn(12, 48)
    wanted = full @ weight.T

    def output_error(quantizer):
        return (quantized @ quantizer.quantize(weight, stats).dequantize().T - wanted).square().mean().item()

    errors = [output_error(TargetShift(GPTQ(3, 16), amount)) for amount in (0.0, 0.5, 1.0)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] == output_error(GPTQ(3, 16))


def test_no_mismatch_means_no_shift():
    weight, hessian = problem()
    target = TargetShift(GPTQ(3), 0.7).target(weight, LayerStats(hessian, hessian.clone()))
    torch.testing.assert_close(target, weight)


def test_is_a_quantizer_and_checks_its_input():
    shifted = TargetShift(GPTQ(3), 0.7)
    assert isinstance(shifted, Quantizer)
    assert shifted.needs is Needs.CROSS
    with pytest.raises(ValueError, match="0 \\(off\\) to 1"):
        TargetShift(GPTQ(3), 1.5)
    with pytest.raises(ValueError, match="cross"):
        shifted.quantize(torch.randn(4, 8), LayerStats(torch.eye(8)))
