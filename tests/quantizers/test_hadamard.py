"""The rotation wrapper: the same loss in another basis, Gaussian weights, and shared statistics."""

import pytest
import torch

from quantkit.core.metrics import proxy_loss
from quantkit.core.protocols import Needs
from quantkit.core.stats import LayerStats
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.dense import DenseWeight
from quantkit.kernels.hadamard import random_signs, rotate
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.hadamard import Hadamard
from quantkit.quantizers.rtn import RTN

from ..helpers.methods import problem


class Keep:
    """Stores the weight it is given, and remembers what it saw."""

    needs = Needs.HESSIAN

    def quantize(self, weight, stats):
        self.weight, self.stats = weight, stats
        return DenseWeight(weight)


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (20, 36), (7, 33), (128, 768)])
def test_nothing_is_lost_but_by_the_inner_method(rows, columns, outputs):
    weight, hessian = problem(out_features=rows, in_features=columns)
    inner = Keep()
    packed = Hadamard(inner, outputs).quantize(weight, LayerStats(hessian))
    torch.testing.assert_close(packed.dequantize(torch.float64), weight, rtol=1e-4, atol=1e-5)
    x, bias = torch.randn(3, columns), torch.randn(rows)
    torch.testing.assert_close(packed.map(_single).matmul(x, bias), x @ weight.T.float() + bias, rtol=1e-3, atol=1e-3)
    error = torch.randn(rows, columns, dtype=torch.float64)
    assert proxy_loss(error, inner.stats.hessian) == pytest.approx(
        proxy_loss(rotate(error, packed.in_signs, True), hessian), rel=1e-9
    )


def _single(tensor):
    return tensor.float() if tensor.is_floating_point() else tensor


def test_statistics_are_rotated_once_for_all_that_share_them():
    weight, hessian = problem(out_features=16, in_features=64)
    stats = LayerStats(hessian, cross=hessian + 0.1 * torch.randn_like(hessian))
    first, second = Keep(), Keep()
    Hadamard(first).quantize(weight, stats)
    Hadamard(second).quantize(weight[:8], stats)
    assert first.stats is second.stats
    signs = random_signs(64, 0)
    rotation = rotate(torch.eye(64, dtype=torch.float64), signs).T
    torch.testing.assert_close(first.stats.hessian, rotation @ hessian @ rotation.T)
    torch.testing.assert_close(first.stats.cross, rotation @ stats.cross @ rotation.T)
    first.stats.inverse_factor(0.02)
    assert stats.damping == 0.02, "the report sees damping inside the rotation"
    other = Keep()
    Hadamard(other, seed=1).quantize(weight, stats)
    assert other.stats is not first.stats


def test_heavy_tails_become_gaussian():
    """t(4) weights: kurtosis near 3 after the rotation, and INT4 in groups of 128 errs like on Gaussian weights."""
    weight = torch.distributions.StudentT(4.0).sample((512, 1024))
    weight = weight / weight.std()
    rotated = rotate(rotate(weight, random_signs(1024, 0)).T, random_signs(512, 1))

    def kurtosis(values):
        return float((values / values.std()).pow(4).mean())

    assert kurtosis(weight) > 6
    assert kurtosis(rotated) == pytest.approx(3.0, abs=0.1)
    plain = RTN(4, 128, symmetric=False, search=False)
    errors = [float((weight - q.quantize(weight, None).dequantize()).square().mean()) for q in (plain, Hadamard(plain))]
    assert errors[1] == pytest.approx(0.0100, rel=0.03)
    assert errors[0] > 1.5 * errors[1]


def test_better_feedback_on_weights_with_outliers():
    weight, hessian = problem(out_features=64, in_features=128)
    weight[:, 7] *= 30
    weight[3] *= 10
    losses = [
        proxy_loss(weight - q.quantize(weight, LayerStats(hessian)).dequantize(torch.float64), hessian)
        for q in (GPTQ(3, 64), Hadamard(GPTQ(3, 64)))
    ]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("outputs", [True, False])
def test_layout_state_and_size(outputs):
    quantizer = Hadamard(RTN(3, 32), outputs)
    packed = quantizer.quantize(torch.randn(36, 100), None)
    assert quantizer.layout(36, 100).metadata() == packed.metadata()
    assert packed.nbytes == packed.base.nbytes + 13 + 5 * outputs
    again = QuantizedWeight.from_state(packed.metadata(), packed.state())
    assert torch.equal(again.dequantize(), packed.dequantize())
    with pytest.raises(ValueError, match="in_signs"):
        type(packed)(packed.base, packed.in_signs[:-1], packed.out_signs).validate()


@pytest.mark.parametrize("outputs", [True, False])
def test_side_by_side(outputs):
    parts = [Hadamard(RTN(4, 32), outputs).quantize(torch.randn(rows, 64), None) for rows in (24, 12, 40)]
    together = QuantizedWeight.side_by_side(parts)
    together.validate()
    x, bias = torch.randn(5, 64), torch.randn(76)
    expected = torch.cat([part.matmul(x) for part in parts], dim=1) + bias
    torch.testing.assert_close(together.matmul(x, bias), expected)
    torch.testing.assert_close(together.dequantize(), torch.cat([part.dequantize() for part in parts]))
    for part, again in zip(parts, together.split([24, 12, 40]), strict=True):
        assert torch.equal(part.dequantize(), again.dequantize())
    other = Hadamard(RTN(4, 32), outputs, seed=5).quantize(torch.randn(8, 64), None)
    assert QuantizedWeight.side_by_side([parts[0], other]) is None
