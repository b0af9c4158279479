"""Pyramid vector quantization under error feedback ("Pyramid Vector Quantization for LLMs", arXiv 2410.16926).

A group x of D weights becomes a gain and a point y of P(D, K) (`quantkit.formats.pyramid`). y is found by a greedy
search: it starts below the point that projection onto the pyramid would round to and adds the pulses that are missing
one by one, each where it raises cos(x, y) most; where plain project-and-round ends up closer, that is taken. The gain
level is the one nearest to <x, y> / |y|, the best multiple of y, not to |x|.

Levels. If a vector of n weights with second moment 1 is isotropic, then |group|^2 / n ~ Beta(D / 2, (n - D) / 2)
whatever its distribution is; the levels are Lloyd and Max's for the root of that. The scale that multiplies them is
refitted to each vector by least squares.

Axis. Groups along the outputs leave the feedback from column to column whole, and the plain nearest point is then the
best one; groups along the inputs (the paper's) are rounded together, D columns at a time, and lose the feedback inside.

Rotate first (`Hadamard`): the code is made for weights that are alike in all directions.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from quantkit.core.linalg import column_scales
from quantkit.core.protocols import Needs
from quantkit.core.stats import LayerStats
from quantkit.formats.pyramid import PyramidWeight, factors
from quantkit.kernels.caching import kept
from quantkit.kernels.pyramid import index_bits
from quantkit.quantizers.feedback import check_feedback, error_feedback, required

Axis = Literal["out", "in"]
LARGEST_GAIN_BITS = 8


@dataclass(frozen=True)
class PyramidCode:
    """Sizes of a code for groups of weights: a point of the pyramid P(D, K), and a gain.

    Attributes:
        dimension: D.
        pulses: K.
        gain_bits: 0..8.
    """

    dimension: int
    pulses: int
    gain_bits: int

    @property
    def field_bits(self) -> int:
        """Bits that a group takes."""
        return index_bits(self.dimension, self.pulses) + self.gain_bits


@dataclass(frozen=True)
class Pyramid:
    """Settings of pyramid vector quantization.

    Attributes:
        bits: per weight for points and gains, at most; any fraction. Scales come on top and are counted.
        dimension: D, weights a group; None for 8 up to 2 bits, where the kernel reads packed fields, and 32 above.
        axis: of the groups, see the module's text.
        refit: scales by least squares in the Hessian's metric, once all points are found.
        damp: added to diag(H), as a fraction of its mean.
        block_size: columns between deferred updates; changes speed, not codes.
    """

    needs: ClassVar[Needs] = Needs.HESSIAN
    wants_rotation: ClassVar[bool] = True

    bits: float = 3.0
    dimension: int | None = None
    axis: Axis = "out"
    refit: bool = True
    damp: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        if self.axis not in get_args(Axis):
            raise ValueError(f"axis={self.axis!r}: groups run along the outputs ('out') or the inputs ('in')")
        if self.dimension is not None and self.dimension not in range(2, 257):
            raise ValueError(f"dimension={self.dimension}: groups hold 2 to 256 weights")
        if not 0.5 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: pyramid codes take 0.5 to 8 bits a weight")
        least = index_bits(self.width, 1)
        if int(self.bits * self.width) < least:
            raise ValueError(
                f"bits={self.bits} is too little for dimension={self.width}; it takes {least / self.width:.2f} at least"
            )
        check_feedback(self.damp, self.block_size)

    @property
    def width(self) -> int:
        """D, the weights of a group."""
        return self.dimension or (8 if self.bits <= 2 else 32)

    @property
    def code(self) -> PyramidCode:
        """The best code within the bits."""
        return best_code(self.bits, self.width)

    def layout(self, out_features: int, in_features: int) -> PyramidWeight:
        """The packed weight's layout for a shape, on the meta device."""
        code = self.code
        return PyramidWeight.layout(out_features, in_features, code.dimension, code.pulses, code.gain_bits, self.axis)

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> PyramidWeight:
        """Quantizes fp32 or fp64 [out_features, in_features].

        Raises:
            CalibrationError: the Hessian does not factor.
            ValueError: there are no statistics.
        """
        stats = required(stats, self)
        rounding = _AlongOutputs(self.code, weight) if self.axis == "out" else _AlongInputs(self.code, weight)
        factor = stats.inverse_factor(self.damp).to(weight.dtype)
        block_size = -(-self.block_size // rounding.width) * rounding.width
        error_feedback(weight, factor, rounding, block_size)
        packed = rounding.packed()
        if not self.refit:
            return packed
        rounded, hessian = packed.dequantize().to(weight.dtype), stats.hessian.to(weight.dtype)
        if self.axis == "out":
            change = column_scales(weight, rounded, hessian)
        else:
            change = ((weight @ hessian) * rounded).sum(1) / ((rounded @ hessian) * rounded).sum(1).clamp_min(1e-30)
        return replace(packed, scales=_storable(packed.scales * change).half())


class _Groups:
    """A rounding's levels, and what it chose, for vectors (columns of the weight, or rows) of groups."""

    width = 1

    def __init__(self, code: PyramidCode, weight: Tensor, axis: Axis) -> None:
        self._code, self._axis, self._shape = code, axis, tuple(weight.shape)
        length, vectors = weight.shape if axis == "out" else weight.T.shape
        self._groups = -(-length // code.dimension)
        self._levels = gain_levels(code, self._groups * code.dimension).to(weight)
        self._points = torch.empty(vectors, self._groups, code.dimension, dtype=torch.int16, device=weight.device)
        self._gains = torch.empty(vectors, self._groups, dtype=torch.uint8, device=weight.device)
        self._scales = torch.empty(vectors, dtype=weight.dtype, device=weight.device)

    def group_size(self) -> int:
        return self.width

    def open(self, start: int, columns: Tensor) -> None:
        """Columns need no preparation."""

    def _rounded(self, points: Tensor, gains: Tensor, scales: Tensor) -> Tensor:
        return factors(points, self._levels[gains], scales).to(self._levels).unsqueeze(-1) * points

    def packed(self) -> PyramidWeight:
        points, scales, levels = self._points.transpose(0, 1), self._scales.half(), self._levels.half()
        return PyramidWeight.pack(points, self._gains.T, scales, levels, self._code.pulses, self._axis, self._shape)


class _AlongOutputs(_Groups):
    """Rounds a column in groups of D outputs; a scale per column."""

    def __init__(self, code: PyramidCode, weight: Tensor) -> None:
        super().__init__(code, weight, "out")

    def round(self, index: int, column: Tensor) -> Tensor:
        padding = self._groups * self._code.dimension - len(column)
        groups = torch.nn.functional.pad(column, (0, padding)).view(1, self._groups, -1)
        points, amplitudes, _ = shape(groups, self._code.pulses)
        scale, gains = fit_gains(amplitudes, self._levels)
        self._points[index], self._gains[index], self._scales[index] = points[0], gains[0], scale[0, 0]
        return self._rounded(points, gains, scale).flatten()[: len(column)]


class _AlongInputs(_Groups):
    """Rounds D columns together, a group per output; a scale per output, from the weight's own row."""

    def __init__(self, code: PyramidCode, weight: Tensor) -> None:
        super().__init__(code, weight, "in")
        self.width = code.dimension
        padded = torch.nn.functional.pad(weight, (0, self._groups * code.dimension - weight.shape[1]))
        _, amplitudes, _ = shape(padded.unflatten(1, (self._groups, -1)), code.pulses)
        self._scales = fit_gains(amplitudes, self._levels)[0][:, 0]

    def round(self, index: int, columns: Tensor) -> Tensor:
        groups = torch.nn.functional.pad(columns.T, (0, self.width - len(columns)))
        points, amplitudes, _ = shape(groups, self._code.pulses)
        gains = nearest_level(amplitudes / self._scales, self._levels)
        field = index // self.width
        self._points[:, field], self._gains[:, field] = points, gains
        return self._rounded(points, gains, self._scales)[:, : len(columns)].T


def search(x: Tensor, pulses: int) -> Tensor:
    """The point of P(D, pulses) that is (nearly) closest in angle to x.

    Args:
        x: float [..., D].
        pulses: K.

    Returns:
        float [..., D] of integers, never farther in angle than where `_project_and_round` gets to.
    """
    a = x.reshape(-1, x.shape[-1]).abs()
    total = a.sum(-1, keepdim=True)
    a = torch.where(total > 0, a, 1.0)  # any point will do for a group of zeros
    total = a.sum(-1, keepdim=True)
    y = (a * ((pulses - 1) / total)).floor_()
    _add_pulses(a, y, pulses)
    rounded = _project_and_round(a, total, pulses)
    y = torch.where((_cosine(a, rounded) > _cosine(a, y)).unsqueeze(-1), rounded, y).view(x.shape)
    return torch.where(x < 0, -y, y)


def _project_and_round(a: Tensor, total: Tensor, pulses: int) -> Tensor:
    """`a` scaled to the sum `pulses`, rounded, and the excess taken where rounding erred most (Fischer)."""
    scaled = a * (pulses / total)
    y = scaled.floor()
    missing = pulses - y.sum(-1, keepdim=True)
    order = (scaled - y).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(a.shape[-1], device=a.device).expand_as(order))
    return y + (rank < missing)


def _add_pulses(a: Tensor, y: Tensor, pulses: int) -> None:
    """Adds pulses to the rows of y until each has `pulses`, every one where (<a, y>)^2 / <y, y> gains most."""
    inner = (a * y).sum(-1, keepdim=True)
    square = (y * y).sum(-1, keepdim=True)
    missing = pulses - y.sum(-1, keepdim=True)
    for _ in range(int(missing.max())):
        odd = torch.add(1, y, alpha=2)
        best = (a + inner).square_().div_(odd + square).argmax(-1, keepdim=True)
        step = (missing > 0).to(y.dtype)
        inner += step * a.gather(-1, best)
        square += step * odd.gather(-1, best)
        y.scatter_add_(-1, best, step)
        missing -= step


def _cosine(a: Tensor, y: Tensor) -> Tensor:
    """<a, y> / |y|: the cosine, but for |a|."""
    return (a * y).sum(-1) / y.square().sum(-1).sqrt()


def shape(x: Tensor, pulses: int) -> tuple[Tensor, Tensor, Tensor]:
    """(points int16 [..., D], amplitudes <x, y> / |y| [...], directions y / |y| [..., D]) for groups x [..., D]."""
    y = search(x, pulses)
    directions = y / y.square().sum(-1, keepdim=True).sqrt()
    return y.to(torch.int16), (x * directions).sum(-1), directions


def nearest_level(amplitudes: Tensor, levels: Tensor) -> Tensor:
    """Indices of the nearest of ascending levels [count], int64, of the shape [...] of `amplitudes`."""
    return torch.bucketize(amplitudes, (levels[1:] + levels[:-1]) / 2)


def fit_gains(amplitudes: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of each vector and the gains of its groups, by alternating least squares.

    Args:
        amplitudes: [vectors, groups].
        levels: ascending.

    Returns:
        (scales [vectors, 1] holding fp16 values, gains int64 [vectors, groups]).
    """
    scale = _storable(amplitudes.square().mean(-1, keepdim=True).sqrt() / levels.square().mean().sqrt())
    for _ in range(4 if len(levels) > 1 else 1):
        chosen = levels[nearest_level(amplitudes / scale, levels)]
        scale = _storable((amplitudes * chosen).sum(-1, keepdim=True) / chosen.square().sum(-1, keepdim=True))
    return scale, nearest_level(amplitudes / scale, levels)


def _storable(scale: Tensor) -> Tensor:
    return scale.clamp(2.0**-24, torch.finfo(torch.float16).max).half().to(scale.dtype)


@kept
def gain_levels(code: PyramidCode, length: int) -> Tensor:
    """Levels for the norms of groups, [2^gain_bits], of vectors with `length` weights of second moment 1; fp32 of fp16.

    Lloyd and Max's quantizer of r = sqrt(length * u), u ~ Beta(D / 2, (length - D) / 2), on a fine grid of its density
    r^(D-1) (1 - r^2 / length)^((length - D) / 2 - 1).
    """
    dimension = code.dimension
    if dimension >= length:
        return torch.full((2**code.gain_bits,), length**0.5).half().float()
    width = 10.0 / 2**0.5  # ten standard deviations
    low = max(dimension**0.5 - width, 0.0)
    high = min(dimension**0.5 + width, length**0.5)
    r = torch.linspace(low, high, 2**14 + 1, dtype=torch.float64)[1:-1]
    exponent = (dimension - 1) * r.log() + ((length - dimension) / 2 - 1) * torch.log1p(-(r.square() / length))
    density = (exponent - exponent.max()).exp()
    cumulative = density.cumsum(0) / density.sum()
    count = 2**code.gain_bits
    levels = r[torch.searchsorted(cumulative, (torch.arange(count, dtype=torch.float64) + 0.5) / count)]
    for _ in range(200):
        cell = torch.bucketize(r, (levels[1:] + levels[:-1]) / 2)
        weight = torch.zeros(count, dtype=torch.float64).scatter_add_(0, cell, density)
        moment = torch.zeros(count, dtype=torch.float64).scatter_add_(0, cell, density * r)
        levels = torch.where(weight > 0, moment / weight.clamp_min(1e-300), levels)
    return levels.half().float()


@lru_cache
def best_code(bits: float, dimension: int) -> PyramidCode:
    """The code of at most `bits` per weight that serves Gaussian weights best, by trying it on 2,048 groups of them."""
    budget = int(bits * dimension + 1e-9)
    x = torch.randn(2048, dimension, generator=torch.Generator().manual_seed(0))
    best, least = None, float("inf")
    for gain_bits in range(LARGEST_GAIN_BITS + 1):
        pulses = _most_pulses(dimension, budget - gain_bits)
        if pulses == 0:
            break
        code = PyramidCode(dimension, pulses, gain_bits)
        error = gaussian_error(code, x)
        if error < least:
            best, least = code, error
    assert best is not None
    return best


def _most_pulses(dimension: int, bits: int) -> int:
    """The largest K, up to 4,096, whose index fits `bits` bits; 0 where even K = 1 does not."""
    if index_bits(dimension, 1) > bits:
        return 0
    low, high = 1, 2
    while high <= 4096 and index_bits(dimension, high) <= bits:  # counting is dear for many pulses: grow from few
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if index_bits(dimension, middle) <= bits else (low, middle)
    return low


def gaussian_error(code: PyramidCode, x: Tensor) -> float:
    """Mean squared error a weight on groups x [groups, D] of unit variance, taken as parts of one long vector."""
    _, amplitudes, directions = shape(x, code.pulses)
    levels = gain_levels(code, 1 << 20)
    scale, gains = fit_gains(amplitudes.unsqueeze(0), levels)
    rounded = (scale * levels[gains]).squeeze(0).unsqueeze(-1) * directions
    return float((x - rounded).square().mean())
