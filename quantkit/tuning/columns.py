"""Trellis codes that stay while their scales are tuned: a step decodes no weight, and makes no gradient of one.

    W = R_out^T V diag(s) R_in        y = C (s * (R_in x)),  C = R_out^T V

The values V are what the codes stand for, one scale s belongs to each column, and rotations are there where the weight
has them. C is made once, so that a step is a product forward and one back, as if the layer were frozen.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from quantkit.core.weight import QuantizedWeight
from quantkit.formats.rotated import RotatedWeight
from quantkit.formats.trellis import TrellisWeight
from quantkit.kernels.hadamard import rotate
from quantkit.tuning.parts.base import Coded, tunable
from quantkit.tuning.parts.trellis import TunableTrellis
from quantkit.tuning.pv import TunedLinear


def by_columns(weight: QuantizedWeight) -> bool:
    """Whether all that is continuous in a weight are scales of its columns: trellis codes, rotated or not."""
    return isinstance(weight.base if isinstance(weight, RotatedWeight) else weight, TrellisWeight)


class ColumnScaledLinear(TunedLinear):
    """A linear layer of trellis codes that stay; their scales move, without a dense copy that is made anew.

    Args:
        weight: for which `by_columns` holds.
        bias: [out_features] or None; stays.
        kind: type in which C is kept and multiplied.
    """

    values: Tensor
    """C, [out_features, in_features]; made by `open`."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, kind: torch.dtype) -> None:
        super().__init__(tunable(weight), bias)
        self.kind = kind
        self._rotation = weight if isinstance(weight, RotatedWeight) else None
        (part,) = self.parts.coded()
        assert isinstance(part, TunableTrellis)
        self._trellis = part

    @torch.no_grad()
    def open(self) -> None:
        """See `Tuned`: makes C the first time."""
        if not hasattr(self, "values"):
            values = self._trellis.values()
            if self._rotation is not None:
                values = self._rotation.outputs_back(values.T).T
            self.values = values.to(self.kind).contiguous()

    def close(self) -> None:
        """See `Tuned`: gradients are there already."""

    def gradients(self) -> Iterator[Tensor]:
        """See `Tuned`: of the scales, fp32 [in_features]."""
        for parameter in self.parts.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            yield parameter.grad

    def coded(self) -> Iterator[Coded]:
        """See `Tuned`: codes stay."""
        yield from ()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        turned = x.float() if self._rotation is None else rotate(x.float(), self._rotation.in_signs, False)
        scaled = (turned * self._trellis.stored_scales()).to(self.kind)
        y = nn.functional.linear(scaled, self.values, None if self.bias is None else self.bias.to(self.kind))
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)
