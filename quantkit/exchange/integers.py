"""A weight of integer codes as whole numbers, which other programs' formats have, and how many bits they take there.

quantkit's symmetric grid lies half a step off zero, where no other integer format has one. Twice as many steps of half
the size hold it exactly, so that it fits where there is a bit more:

    (code - (2^b - 1) / 2) * scale  =  (2 code - (2^b - 1)) * (scale / 2)

Grids around a whole number (`grid="int"`) are what those formats have, at their own width. Stored zeros are whole
numbers in weights that came from such a format; those that quantkit fits are not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.formats.int_group import IntGroupWeight
from quantkit.kernels.bitpack import unpack
from quantkit.kernels.int_group_layout import BETWEEN, WHOLE


@dataclass(frozen=True, eq=False)
class Integers:
    """weight[o, i] = (numbers[o, i] - zeros[o, g]) * scales[o, g],    g = i // group_size

    Attributes:
        numbers: int16 [out_features, in_features]; codes from 0 to 2^bits - 1 where there are zeros, else signed ones
            around zero.
        scales: fp32 [out_features, groups].
        zeros: int16 [out_features, groups]; None where zero is the number 0.
        bits: that the numbers take, by their format.
        group_size: input features that share a scale.
    """

    numbers: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int

    def values(self) -> Tensor:
        """The weight, fp32 [out_features, in_features]."""
        group = torch.arange(self.numbers.shape[1]) // self.group_size
        numbers = self.numbers if self.zeros is None else self.numbers - self.zeros[:, group]
        return numbers.float() * self.scales[:, group]


def number_bits(weight: IntGroupWeight) -> int:
    """Bits that a weight's whole numbers take."""
    return weight.bits + (weight.zero == BETWEEN)


def integers(weight: IntGroupWeight) -> Integers | None:
    """A weight, on the CPU, as whole numbers; None where its zeros are none."""
    codes = unpack(weight.codes, weight.bits, weight.in_features).short()
    scales = weight.scales.float().T.contiguous()
    if weight.zeros is None:
        return Integers(2 * codes - (2**weight.bits - 1), scales / 2, None, number_bits(weight), weight.group_size)
    if weight.zero == WHOLE:
        return Integers(codes - 2 ** (weight.bits - 1), scales, None, number_bits(weight), weight.group_size)
    zeros = weight.zeros.T.contiguous()
    if not torch.equal(zeros, zeros.round()):
        return None
    return Integers(codes, scales, zeros.short(), weight.bits, weight.group_size)
