"""GPTQ: error feedback onto integer grids (Frantar et al., arXiv 2210.17323).

Columns with large diag(H) should be quantized early, while many columns are left to absorb their
error. Three orders are offered; none needs an index at inference:

    none    left to right; a group's grid is fitted when the loop reaches it, on the updated weights
    group   group-aware: whole groups by their mean diag(H), columns by diag(H) within their group;
            grids are fitted as in `none`
    act     all columns by diag(H) ("act-order"); grids come from the original weights ("static groups")

Deviations from the paper: grids are searched (`quantizers.grid`), the error there weighted by diag(H);
U comes from a reversed Cholesky factor rather than from the inverse; damping raises itself until H
factors, and `LayerStats.damping` says how far.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from quantkit.core.linalg import inverse_power
from quantkit.core.protocols import Needs
from quantkit.core.stats import LayerStats
from quantkit.formats.int_group import IntGroupWeight
from quantkit.quantizers.feedback import check_feedback, error_feedback, required
from quantkit.quantizers.grid import Grid, GridSettings
from quantkit.quantizers.row_feedback import RowFeedback

Order = Literal["none", "group", "act"]


@dataclass(frozen=True)
class GPTQ(GridSettings):
    """Integer grids under error feedback; see `GridSettings` for the other fields.

    Attributes:
        order: the order of columns, see the module's text.
        damp: added to diag(H), as a fraction of its mean.
        block_size: columns between deferred updates; changes speed, not codes.
    """

    needs: ClassVar[Needs] = Needs.HESSIAN

    order: Order = "group"
    damp: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in get_args(Order):
            raise ValueError(f"order={self.order!r}: known orders are {', '.join(get_args(Order))}")
        check_feedback(self.damp, self.block_size)

    def layout(self, out_features: int, in_features: int) -> IntGroupWeight:
        """The packed weight's layout for a shape, on the meta device."""
        return IntGroupWeight.layout(out_features, in_features, self.bits, self.width(in_features), self.zero)

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> IntGroupWeight:
        """Quantizes fp32 or fp64 [out_features, in_features].

        Raises:
            CalibrationError: the Hessian does not factor.
            ValueError: there are no statistics.
        """
        stats = required(stats, self)
        width = self.width(weight.shape[1])
        order = _column_order(stats.hessian.diagonal(), width, self.order)
        factor = stats.inverse_factor(self.damp, order).to(weight.dtype)
        rows = RowFeedback(len(weight), stats)
        rounding = _GroupGrids(self, weight, stats.hessian.diagonal().to(weight.dtype), order, width, rows)
        error_feedback(weight if order is None else weight[:, order], factor, rounding, self.block_size)
        return rounding.packed()


def _column_order(diagonal: Tensor, width: int, order: Order) -> Tensor | None:
    if order == "none":
        return None
    if order == "act":
        return diagonal.argsort(descending=True, stable=True)
    groups = diagonal.split(width)
    ranks = torch.stack([group.mean() for group in groups]).argsort(descending=True, stable=True).tolist()
    # A short last group keeps its place, so that groups still start at multiples of the width.
    if len(groups[-1]) < width:
        ranks.remove(len(groups) - 1)
        ranks.append(len(groups) - 1)
    return torch.cat([g * width + groups[g].argsort(descending=True, stable=True) for g in ranks])


class _GroupGrids:
    """Rounds to the grid of each column's group; columns come in `order`."""

    width = 1

    def __init__(
        self,
        settings: GPTQ,
        weight: Tensor,
        importance: Tensor,
        order: Tensor | None,
        width: int,
        rows: RowFeedback,
    ) -> None:
        out_features, in_features = weight.shape
        self._settings, self._group, self._rows = settings, width, rows
        self._order = torch.arange(in_features, device=weight.device) if order is None else order
        self._sources = self._order.tolist()
        importance = importance * inverse_power(float(importance.mean()))  # the fit of a grid squares its sums
        self._importance = importance.clamp_min(importance.mean() * 1e-4 + 1e-30)
        self._codes = torch.empty(in_features, out_features, dtype=torch.uint8, device=weight.device)
        self._grids: dict[int, Grid] = {}
        self._in_parts: dict[int, list[Grid]] = {}
        self._static = settings.order == "act"
        if self._static:
            for start in range(0, in_features, width):
                self._fit(start // width, weight[:, start : start + width], self._importance[start : start + width])

    def group_size(self) -> int:
        return self._group

    def open(self, start: int, columns: Tensor) -> None:
        if not self._static:
            importance = self._importance[self._order[start : start + self._group]]
            self._fit(self._sources[start] // self._group, columns.T, importance)

    def round(self, index: int, column: Tensor) -> Tensor:
        source = self._sources[index]
        grids = self._in_parts[source // self._group]

        def rounded(rows: Tensor, part: int) -> Tensor:
            here = self._rows.rows[part]
            codes = grids[part].encode(rows[here])
            self._codes[source, here] = codes.to(torch.uint8)
            return grids[part].decode(codes)

        return self._rows.round(column, rounded)

    def packed(self) -> IntGroupWeight:
        grids = [self._grids[group] for group in range(len(self._grids))]
        scales = torch.stack([grid.scale for grid in grids]).half()
        zeros = self._settings.zeros([grid.zero for grid in grids])
        return IntGroupWeight.pack(self._codes.T.contiguous(), scales, zeros, self._settings.bits, self._group)

    def _fit(self, group: int, columns: Tensor, importance: Tensor) -> None:
        settings = self._settings
        grid = settings.fitted(columns, importance)
        scale, zero = grid.scale.squeeze(1), grid.zero.squeeze(1)
        self._grids[group] = Grid(scale, zero, settings.bits)
        self._in_parts[group] = [Grid(scale[here], zero[here], settings.bits) for here in self._rows.rows]
