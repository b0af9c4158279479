"""Uniform integer grids: w ~ (code - zero) * scale, with 2^bits codes.

A grid starts at the range of its weights and is then searched: a shrinking range trades the rounding
of many weights against the clipping of few, and each candidate's scale (and zero) are re-fitted to its
codes by least squares. The error may be weighted by a positive importance per weight, such as the
diagonal of the Hessian. Scales and zeros are rounded to fp16 before any code is taken, so the codes
belong to the very grid that is stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.formats.int_group import IntGroupWeight

_SHRINKS = (1.0, 0.92, 0.85, 0.78, 0.7, 0.62, 0.54, 0.46)
_REFITS = 2
_SMALLEST_SCALE = 2.0**-14  # the smallest normal fp16: anything below loses its precision


@dataclass(frozen=True, eq=False)
class Grid:
    """Grids of shape [..., 1] beside weights [..., group].

    Attributes:
        scale: fp32 holding fp16 values, positive.
        zero: like scale, in units of codes.
        bits: codes run from 0 to 2^bits - 1.
    """

    scale: Tensor
    zero: Tensor
    bits: int

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes, as floats."""
        return (weight / self.scale + self.zero).round_().clamp_(0, 2**self.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """The weights that codes stand for."""
        return (codes - self.zero) * self.scale


def fit_grid(weight: Tensor, bits: int, symmetric: bool, search: bool, importance: Tensor | None = None) -> Grid:
    """Fits one grid to the last dimension of `weight`.

    Args:
        weight: fp32 or fp64 [..., group].
        bits: 1..8.
        symmetric: zero = (2^bits - 1) / 2 instead of a fitted one.
        search: minimise the squared error; otherwise the grid spans the weights' range.
        importance: positive weights of the squared error, broadcastable to `weight`.
    """
    if symmetric:
        high = weight.abs().amax(-1, keepdim=True)
        low = -high
    else:
        low, high = weight.aminmax(dim=-1, keepdim=True)
    best = _grid(low, high, bits, symmetric)
    if not search:
        return best
    importance = torch.ones_like(weight[..., :1]) if importance is None else importance
    best_error = _error(weight, best, importance)
    for shrink in _SHRINKS:
        grid = _grid(low * shrink, high * shrink, bits, symmetric)
        for _ in range(_REFITS + 1):
            error = _error(weight, grid, importance)
            better = error < best_error
            best = Grid(torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero), bits)
            best_error = torch.where(better, error, best_error)
            grid = _refit(weight, grid, importance, symmetric)
    return best


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Grid:
    levels = 2**bits - 1
    scale = _storable(((high - low) / levels).clamp_min(_SMALLEST_SCALE))
    return Grid(scale, torch.full_like(scale, levels / 2) if symmetric else _storable(-low / scale), bits)


def _storable(values: Tensor) -> Tensor:
    limit = torch.finfo(torch.float16).max
    return values.clamp(-limit, limit).half().to(values.dtype)


def _error(weight: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    return ((weight - grid.decode(grid.encode(weight))).square_() * importance).sum(-1, keepdim=True)


def _refit(weight: Tensor, grid: Grid, importance: Tensor, symmetric: bool) -> Grid:
    """Least squares for scale (and zero) with the codes held fixed."""
    codes = grid.encode(weight)
    if symmetric:
        offsets = codes - grid.zero
        slope = (importance * offsets * weight).sum(-1, keepdim=True) / (importance * offsets.square()).sum(
            -1, keepdim=True
        )
        return Grid(_storable(slope.clamp_min(_SMALLEST_SCALE)), grid.zero, grid.bits)
    total = importance.expand_as(weight).sum(-1, keepdim=True)
    mean_code = (importance * codes).sum(-1, keepdim=True) / total
    mean_weight = (importance * weight).sum(-1, keepdim=True) / total
    centred = codes - mean_code
    spread = (importance * centred.square()).sum(-1, keepdim=True)
    slope = (importance * centred * (weight - mean_weight)).sum(-1, keepdim=True) / spread.clamp_min(1e-30)
    scale = torch.where(slope >= _SMALLEST_SCALE, _storable(slope), grid.scale)
    return Grid(scale, _storable(mean_code - mean_weight / scale), grid.bits)


@dataclass(frozen=True)
class GridSettings:
    """What every quantizer onto integer grids is configured by.

    Attributes:
        bits: 1..8.
        group_size: input features that share a grid; -1 for one grid a row.
        symmetric: grids centred on zero, which store no zero points.
        search: fit grids by least squared error instead of by range.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    search: bool = True

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9):
            raise ValueError(f"bits={self.bits}: integer formats hold 1 to 8 bits")
        if self.group_size != -1 and self.group_size < 8:
            raise ValueError(
                f"group_size={self.group_size}: use -1 for one group a row, or at least 8 (32, 64 and 128 are usual)"
            )

    def width(self, in_features: int) -> int:
        """The group size of a layer; a group never exceeds a row."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def layout(self, out_features: int, in_features: int) -> IntGroupWeight:
        """The packed weight's layout for a shape, on the meta device."""
        return IntGroupWeight.layout(out_features, in_features, self.bits, self.width(in_features), self.symmetric)
