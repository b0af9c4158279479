"""Uniform integer grids: w ~ (code - zero) * scale, with 2^bits codes.

A grid starts at the range of its weights and is then searched: a shrinking range trades the rounding
of many weights against the clipping of few, and each candidate's scale (and zero) are re-fitted to its
codes by least squares. With i the importance of a weight (the diagonal of the Hessian, say) and c its
code, the best scale and zero for given codes, and the error that they leave, follow from five sums:

    sum i,  sum i c,  sum i c^2,  sum i c w,  sum i w        error = sum i (w - s (c - z))^2

so a candidate costs one rounding and its sums. Scales and zeros are rounded to fp16 before any code is
taken, so the codes belong to the very grid that is stored.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from quantkit.kernels import int_group_layout

_SHRINKS = (1.0, 0.92, 0.84, 0.76, 0.69, 0.62, 0.55, 0.48, 0.41)
_WHOLE_FROM = 3
"""Bits from which on grids around a whole number lose less, or no more; see docs/results/exchange.md."""
_SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16
_LARGEST_ZERO = 1024  # fp16 still holds it to half a code


@dataclass(frozen=True, eq=False)
class Grid:
    """Integer grids of weights [..., group], one for each group.

    Attributes:
        scale: [..., 1], fp32 holding fp16 values; positive but around a whole number, where either sign may fit better:
            there is a level more on one side.
        zero: [..., 1], like scale, in units of codes.
        bits: codes run from 0 to 2^bits - 1.
    """

    scale: Tensor
    zero: Tensor
    bits: int

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes, as floats, of weights [out_features, columns]."""
        return torch.addcdiv(self.zero, weight, self.scale).round_().clamp_(0, 2**self.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """The weights that codes [out_features, columns] stand for."""
        return (codes - self.zero) * self.scale


def fit_grid(
    weight: Tensor, bits: int, symmetric: bool, search: bool, importance: Tensor | None = None, whole: bool = False
) -> Grid:
    """The best grid for each group, the last dimension of `weight`.

    Args:
        weight: fp32 or fp64 [..., group].
        bits: 1..8.
        symmetric: zero = (2^bits - 1) / 2 instead of a fitted one.
        search: minimise the squared error; otherwise the grid spans the weights' range.
        importance: positive weights of the squared error, broadcastable to `weight`.
        whole: of symmetric grids: zero = 2^(bits - 1).
    """
    if whole:
        up, down = (_fitted(one, bits, symmetric, search, importance, True) for one in (weight, -weight))
        less = down[1] < up[1]
        return Grid(torch.where(less, -down[0].scale, up[0].scale), up[0].zero, bits)
    return _fitted(weight, bits, symmetric, search, importance, False)[0]


def _fitted(
    weight: Tensor, bits: int, symmetric: bool, search: bool, importance: Tensor | None, whole: bool
) -> tuple[Grid, Tensor]:
    """The grid, and its error [..., 1], where it was searched; else that of the range."""
    if symmetric:
        high = weight.abs().amax(-1, keepdim=True)
        low = -high
    else:
        low, high = weight.aminmax(dim=-1, keepdim=True)
    best = _grid(low, high, bits, symmetric, whole)
    if not search:
        off = (best.decode(best.encode(weight)) - weight).square()
        return best, (off if importance is None else off * importance).sum(-1, keepdim=True)
    fit = _Fit(weight, importance, symmetric)
    best_error = torch.full_like(best.scale, torch.inf)
    for shrink in _SHRINKS:
        grid, error = fit.refit(_grid(low * shrink, high * shrink, bits, symmetric, whole))
        best, best_error = _better(grid, error, best, best_error)
    return _better(*fit.refit(best), best, best_error)


class _Fit:
    """Least squares for the grids of one set of weights."""

    def __init__(self, weight: Tensor, importance: Tensor | None, symmetric: bool) -> None:
        self._weight, self._symmetric = weight, symmetric
        self._importance = torch.ones_like(weight[..., :1]) if importance is None else importance
        self._weighted = weight if importance is None else weight * importance
        self._smallest_scale: float | Tensor = _SMALLEST_SCALE
        if not symmetric:
            self._smallest_scale = (weight.abs().amax(-1, keepdim=True) / _LARGEST_ZERO).clamp_min(_SMALLEST_SCALE)
        self._total = self._importance.expand_as(weight).sum(-1, keepdim=True)
        self._sum_w = self._weighted.sum(-1, keepdim=True)
        self._sum_ww = (self._weighted * weight).sum(-1, keepdim=True)

    def refit(self, grid: Grid) -> tuple[Grid, Tensor]:
        """The best storable grid for the codes that `grid` gives, and its error [groups] with those codes."""
        codes = grid.encode(self._weight)
        sum_cw = (codes * self._weighted).sum(-1, keepdim=True)
        weighted_codes = codes * self._importance
        sum_c = weighted_codes.sum(-1, keepdim=True)
        sum_cc = codes.mul_(weighted_codes).sum(-1, keepdim=True)
        total, sum_w, zero = self._total, self._sum_w, grid.zero
        if self._symmetric:
            slope = (sum_cw - zero * sum_w) / (sum_cc - 2 * zero * sum_c + zero.square() * total)
            scale = torch.where(slope >= _SMALLEST_SCALE, _storable(slope), grid.scale)
        else:
            spread = sum_cc - sum_c.square() / total
            slope = (sum_cw - sum_c * sum_w / total) / spread.clamp_min(1e-30)
            scale = torch.where(slope >= self._smallest_scale, _storable(slope), grid.scale)
            zero = _storable((sum_c - sum_w / scale) / total)
        sum_uw = sum_cw - zero * sum_w
        sum_uu = sum_cc - 2 * zero * sum_c + zero.square() * total
        error = self._sum_ww - 2 * scale * sum_uw + scale.square() * sum_uu
        return Grid(scale, zero, grid.bits), error


def _better(grid: Grid, error: Tensor, best: Grid, best_error: Tensor) -> tuple[Grid, Tensor]:
    """Element-wise the grid with the smaller error."""
    better = error < best_error
    scale, zero = torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero)
    return Grid(scale, zero, grid.bits), torch.where(better, error, best_error)


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool, whole: bool) -> Grid:
    levels = 2**bits - 1
    scale = ((high - low) / levels).clamp_min(_SMALLEST_SCALE)
    if not symmetric:
        scale = scale.maximum(torch.maximum(low.abs(), high.abs()) / _LARGEST_ZERO)
    scale = _storable(scale)
    middle = int_group_layout.middle(bits, int_group_layout.WHOLE if whole else int_group_layout.BETWEEN)
    return Grid(scale, torch.full_like(scale, middle) if symmetric else _storable(-low / scale), bits)


def _storable(values: Tensor) -> Tensor:
    limit = torch.finfo(torch.float16).max
    return values.clamp(-limit, limit).half().to(values.dtype)


@dataclass(frozen=True)
class GridSettings:
    """Settings of every quantizer onto integer grids.

    Attributes:
        bits: 1..8.
        group_size: input features that share a grid; -1 for one grid a row.
        symmetric: grids centred on zero, which store no zero points.
        grid: of symmetric ones, where zero is: "half" a step beside the codes, or at a code, "int", as most programs
            have it, with a level more on the side that each group wants it on. None for what loses less: "int" from 3
            bits on, and "half" below, where no code is to be spent on zero.
        search: fit grids by least squared error instead of by range.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    search: bool = True
    grid: Literal["half", "int"] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in range(1, 9):
            raise ValueError(f"bits={self.bits}: integer formats hold 1 to 8 bits, whole ones")
        if self.grid not in ("half", "int", None):
            raise ValueError(f"grid={self.grid!r}: known grids are half and int")
        if self.grid == "int" and not self.symmetric:
            raise ValueError("grid='int' is of symmetric grids; asymmetric ones store their zeros")
        if not isinstance(self.group_size, int):
            raise ValueError(f"group_size={self.group_size}: a whole number of input features, or -1")
        if self.group_size != -1 and self.group_size < 8:
            raise ValueError(
                f"group_size={self.group_size}: use -1 for one group a row, or at least 8 (32, 64 and 128 are usual)"
            )

    @property
    def zero(self) -> int:
        """Where zero is: one of `kernels.int_group_layout`'s."""
        if not self.symmetric:
            return int_group_layout.STORED
        whole = self.bits >= _WHOLE_FROM if self.grid is None else self.grid == "int"
        return int_group_layout.WHOLE if whole else int_group_layout.BETWEEN

    def fitted(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """The best grid for each group [..., group]; see `fit_grid`."""
        whole = self.zero == int_group_layout.WHOLE
        return fit_grid(weight, self.bits, self.symmetric, self.search, importance, whole)

    def zeros(self, fitted: list[Tensor]) -> Tensor | None:
        """What is stored of the zeros of all groups, each [out_features]: fp16 [groups, out_features], [1], or None."""
        if self.zero == int_group_layout.STORED:
            return torch.stack(fitted).half()
        return fitted[0][:1].half() if self.zero == int_group_layout.WHOLE else None

    def width(self, in_features: int) -> int:
        """The group size of a layer; a group never exceeds a row."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)
