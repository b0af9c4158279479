"""Round to nearest: every weight to the nearest point of its group's grid, without data.

The baseline of every method, and the choice where there is no calibration text.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.core.protocols import Needs
from quantkit.core.stats import LayerStats
from quantkit.formats.int_group import IntGroupWeight
from quantkit.quantizers.grid import GridSettings


@dataclass(frozen=True)
class RTN(GridSettings):
    """Rounding to the nearest point of a grid; see `GridSettings` for the fields."""

    needs: ClassVar[Needs] = Needs.NOTHING

    def layout(self, out_features: int, in_features: int) -> IntGroupWeight:
        """The packed weight's layout for a shape, on the meta device."""
        return IntGroupWeight.layout(out_features, in_features, self.bits, self.width(in_features), self.zero)

    def quantize(self, weight: Tensor, stats: LayerStats | None = None) -> IntGroupWeight:
        """Quantizes fp32 [out_features, in_features]; `stats` are not read."""
        in_features = weight.shape[1]
        width = self.width(in_features)
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scales, zeros = [], []
        for start in range(0, in_features, width):
            group = weight[:, start : start + width]
            grid = self.fitted(group)
            codes[:, start : start + width] = grid.encode(group).to(torch.uint8)
            scales.append(grid.scale.squeeze(1))
            zeros.append(grid.zero.squeeze(1))
        return IntGroupWeight.pack(codes, torch.stack(scales).half(), self.zeros(zeros), self.bits, width)
