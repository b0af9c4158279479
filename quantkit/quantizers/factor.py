"""The factor of a layer: brings weights to where fp16 has digits for their scales, levels and codebooks.

    W = 2^k W0,    tr((W - Q) H (W - Q)^T) = 4^k tr((W0 - Q0) H (W0 - Q0)^T),    Q = 2^k Q0

A power of two rounds nothing and scales the loss, so that every method does for W what it does for W0. k is 0 for all
but unusual layers, which are packed as they are; others are moved no farther than into the range below, for a product
with W0 in fp16 must not overflow where one with W would not.
"""

import math

import torch
from torch import Tensor

from quantkit.core.linalg import inverse_power
from quantkit.core.protocols import Quantizer
from quantkit.core.stats import LayerStats
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.scaled import ScaledWeight

SMALLEST = 2.0**-10
"""Root mean square of weights that need no factor, at least: an 8-bit grid's scale keeps 8 binary digits in fp16."""
LARGEST = 2.0**12
"""Magnitude of weights that need no factor, at most: error feedback and rotations may add to them."""


def quantized(quantizer: Quantizer, weight: Tensor, stats: LayerStats | None) -> QuantizedWeight:
    """What a quantizer makes of a weight, whatever the weight's size; `scaled` where that is unusual.

    Args:
        quantizer: any.
        weight: fp32 or fp64 [out_features, in_features].
        stats: see `Quantizer`.
    """
    factor = layer_factor(weight)
    if factor == 1:
        return quantizer.quantize(weight, stats)
    base = quantizer.quantize(weight * (1 / factor if factor else 1), stats)
    return ScaledWeight(base, torch.full((1,), factor, dtype=torch.float32, device=weight.device))


def layer_factor(weight: Tensor) -> float:
    """2^k for a weight [out_features, in_features]: 1 for most, 0 for one of zeros alone."""
    largest = float(weight.abs().max())
    if largest == 0 or not math.isfinite(largest):  # what is not finite is named elsewhere
        return 0.0 if largest == 0 else 1.0
    mean = _root_mean_square(weight, largest)
    if largest <= LARGEST and mean >= SMALLEST:
        return 1.0
    smallest = _exponent_above(largest / LARGEST)  # of a factor that leaves the largest weight within the range
    wanted = smallest if largest > LARGEST else max(smallest, math.floor(math.log2(mean / SMALLEST)))
    return 2.0 ** max(wanted, -126)  # whose inverse fp32 holds; none is above 2^116


def relative(weight: Tensor, *others: Tensor) -> list[Tensor]:
    """A weight and others of its size, all divided by one power of two that makes its largest magnitude about 1.

    For sums of squares, which leave fp32's range long before the weights do. All are [out_features, in_features], and
    keep their dtypes.
    """
    scale = inverse_power(float(weight.abs().max()))
    return [tensor * scale for tensor in (weight, *others)]


def _root_mean_square(weight: Tensor, largest: float) -> float:
    """Of weights whose squares may leave the range of their type."""
    return largest * float((weight / largest).square().mean().sqrt())


def _exponent_above(value: float) -> int:
    """The least k with 2^k >= value > 0."""
    mantissa, exponent = math.frexp(value)
    return exponent - 1 if mantissa == 0.5 else exponent
