"""A weight of integer codes as whole numbers, which other programs' formats have, and how many bits they take there.

quantkit's symmetric grid lies half a step off zero, where no other integer format has one. Twice as many steps of half
the size hold it exactly, so that it fits where there is a bit more:

    (code - (2^b - 1) / 2) * scale  =  (2 code - (2^b - 1)) * (scale / 2)

Grids around a whole number (`grid="int"`) are what those formats have, at their own width. Stored zeros are whole
numbers in weights that came from such a format; those that quantkit fits are not.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.core.weight import QuantizedWeight
from quantkit.formats.int_group import IntGroupWeight
from quantkit.formats.ordered import OrderedWeight
from quantkit.formats.scaled import ScaledWeight
from quantkit.kernels.bitpack import unpack
from quantkit.kernels.int_group_layout import BETWEEN, WHOLE


@dataclass(frozen=True, eq=False)
class Integers:
    """weight[o, i] = (numbers[o, i] - zeros[o, g]) * scales[o, g],    g = group[i]

    Attributes:
        numbers: int16 [out_features, in_features]; codes from 0 to 2^bits - 1 where there are zeros, else signed ones
            around zero.
        scales: fp32 [out_features, groups].
        zeros: int16 [out_features, groups]; None where zero is the number 0.
        bits: that the numbers take, by their format.
        group: int64 [in_features], of each input.
    """

    numbers: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: Tensor

    def values(self) -> Tensor:
        """The weight, fp32 [out_features, in_features]."""
        numbers = self.numbers if self.zeros is None else self.numbers - self.zeros[:, self.group]
        return numbers.float() * self.scales[:, self.group]

    def of(self, outputs: Tensor) -> "Integers":
        """Those of some outputs, int64 [n]."""
        zeros = None if self.zeros is None else self.zeros[outputs]
        return replace(self, numbers=self.numbers[outputs], scales=self.scales[outputs], zeros=zeros)


def grid(weight: QuantizedWeight) -> IntGroupWeight | None:
    """The integer weight that a weight is, behind an order of its inputs and a factor or not; None where it is none."""
    behind = _behind_factor(weight)
    base = behind.base if isinstance(behind, OrderedWeight) else behind
    return base if isinstance(base, IntGroupWeight) else None


def factor_of(weight: QuantizedWeight) -> float:
    """By which all of a weight is multiplied."""
    return float(weight.factor) if isinstance(weight, ScaledWeight) else 1.0


def is_ordered(weight: QuantizedWeight) -> bool:
    """Whether a weight has its inputs in an order of its own."""
    return isinstance(_behind_factor(weight), OrderedWeight)


def _behind_factor(weight: QuantizedWeight) -> QuantizedWeight:
    return weight.base if isinstance(weight, ScaledWeight) else weight


def number_bits(weight: IntGroupWeight) -> int:
    """Bits that a weight's whole numbers take."""
    return weight.bits + (weight.zero == BETWEEN)


def integers(weight: QuantizedWeight) -> Integers | None:
    """A weight that has a `grid`, on the CPU, as whole numbers; None where its zeros are none."""
    own = grid(weight)
    assert own is not None
    behind = _behind_factor(weight)
    order = behind.order.long() if isinstance(behind, OrderedWeight) else None
    codes = unpack(own.codes, own.bits, own.in_features).short()
    group = torch.arange(own.in_features) // own.group_size
    if order is not None:
        back = order.argsort()
        codes, group = codes[:, back], group[back]
    scales, bits = factor_of(weight) * own.scales.float().T.contiguous(), number_bits(own)
    if own.zeros is None:
        return Integers(2 * codes - (2**own.bits - 1), scales / 2, None, bits, group)
    if own.zero == WHOLE:
        return Integers(codes - 2 ** (own.bits - 1), scales, None, bits, group)
    zeros = own.zeros.T.contiguous()
    if not torch.equal(zeros, zeros.round()):
        return None
    return Integers(codes, scales, zeros.short(), bits, group)
