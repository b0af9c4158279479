"""A packed weight taken apart: what of it is continuous, what is code, and which code is nearest to a target.

`tunable(weight)` gives a module whose parameters are the continuous parts in fp32 and whose call is the dequantized
weight, differentiable in them. The parts that hold codes (`coded`) can also be asked, unit by unit, for the codes
nearest to given weights; a unit is what one code stands for. Wrappers (rotations, corrections) hold other parts.

Continuous parts are stored as a reference times a parameter that begins at 1, so that one learning rate suits them all.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantkit.core.errors import QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.codebook import CodebookWeight
from quantkit.formats.int_group import IntGroupWeight
from quantkit.formats.low_rank import LowRankWeight
from quantkit.formats.pyramid import PyramidWeight, factors
from quantkit.formats.rotated import RotatedWeight
from quantkit.formats.trellis import TrellisWeight, columns_of, rings_of
from quantkit.kernels import pyramid, trellis, viterbi
from quantkit.kernels.bitpack import pack, unpack
from quantkit.kernels.codebook_rule import range_width
from quantkit.kernels.hadamard import rotate
from quantkit.quantizers import kmeans
from quantkit.quantizers.pyramid import nearest_level, shape


class Tunable(nn.Module, ABC):
    """A part of a packed weight; its parameters are fp32 and begin at the stored values."""

    @abstractmethod
    def forward(self) -> Tensor:
        """The weight, fp32 [out_features, in_features]."""

    @abstractmethod
    def packed(self) -> QuantizedWeight:
        """The weight as it is now, stored."""

    @abstractmethod
    def coded(self) -> Iterator["Coded"]:
        """The parts whose codes can change; outliers, which are few and finely coded, keep theirs."""


class Coded(Tunable):
    """A part with codes of its own; `latest` is what the last call gave, with its gradient once there is one."""

    latest: Tensor
    bits: float
    """Of a weight's code."""
    pace: ClassVar[float] = 1.0
    """Of its targets, as a share of `PVSettings.code_lr`."""

    def coded(self) -> Iterator["Coded"]:
        """Itself."""
        yield self

    def forward(self) -> Tensor:
        """See `Tunable`."""
        self.latest = self.decode()
        if self.latest.requires_grad:
            self.latest.retain_grad()
        return self.latest

    @abstractmethod
    def decode(self) -> Tensor:
        """The weight, fp32 [out_features, in_features]."""

    @abstractmethod
    def units(self, weight: Tensor) -> Tensor:
        """A weight [out_features, in_features], or anything shaped like it, as units [units, size]; zeros fill up."""

    @abstractmethod
    def nearest(self, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes within the present continuous parts.

        Args:
            index: int64 [n], the units that are asked for.
            target: [n, size].

        Returns:
            (codes [n, ...], the weights that they stand for [n, size]).
        """

    @abstractmethod
    def assign(self, index: Tensor, codes: Tensor) -> None:
        """Gives units other codes, as `nearest` returns them."""


class Scaled(nn.Module):
    """A tensor as a fixed reference times a parameter.

    Attributes:
        reference: fp32, of the tensor's shape or a single one.
        parameter: fp32, of the tensor's shape.

    Args:
        value: the tensor at the beginning.
        each: every element is its own reference; else all share the root of their mean square.
    """

    reference: Tensor

    def __init__(self, value: Tensor, each: bool = False) -> None:
        super().__init__()
        value = value.detach().float()
        reference = value if each else value.square().mean().sqrt()
        reference = torch.where(reference == 0, torch.ones_like(reference), reference)
        self.register_buffer("reference", reference)
        self.parameter = nn.Parameter(value / reference)

    def forward(self) -> Tensor:
        """The tensor as it is now, fp32."""
        return self.reference * self.parameter


class TunableIntegers(Coded):
    """int_group: scales and zeros are continuous, a unit is a weight."""

    codes: Tensor  # int16 [out_features, in_features]

    def __init__(self, weight: IntGroupWeight) -> None:
        super().__init__()
        self.bits = weight.bits
        self._bits, self._group_size, self._shape = weight.bits, weight.group_size, weight.shape
        self.register_buffer("codes", unpack(weight.codes, weight.bits, weight.in_features).to(torch.int16))
        self.scales = Scaled(weight.scales, each=True)
        self.zeros = None if weight.zeros is None else nn.Parameter(weight.zeros.detach().float())

    def _wide(self, groups: Tensor) -> Tensor:
        """[groups, out_features] for every weight."""
        return groups.T.repeat_interleave(self._group_size, dim=1)[:, : self._shape[1]]

    def _zero(self) -> Tensor | float:
        return (2**self._bits - 1) / 2 if self.zeros is None else self._wide(self.zeros)

    def decode(self) -> Tensor:
        """(code - zero) * scale."""
        return (self.codes.float() - self._zero()) * self._wide(self.scales())

    def units(self, weight: Tensor) -> Tensor:
        """Every weight by itself."""
        return weight.reshape(-1, 1)

    @torch.no_grad()
    def nearest(self, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """round(target / scale + zero), within the grid."""
        scale = self._wide(self.scales()).reshape(-1)[index]
        zero = self._zero()
        zero = zero.reshape(-1)[index] if isinstance(zero, Tensor) else torch.full_like(scale, zero)
        # a scale of 0 divides to NaN, which no code may become: its bits would reach into the neighbours'
        codes = (target[:, 0] / scale + zero).nan_to_num(0).round().clamp_(0, 2**self._bits - 1)
        return codes.to(torch.int16), ((codes - zero) * scale).unsqueeze(1)

    def assign(self, index: Tensor, codes: Tensor) -> None:
        """See `Coded`."""
        self.codes.view(-1)[index] = codes

    @torch.no_grad()
    def packed(self) -> IntGroupWeight:
        """See `Tunable`."""
        zeros = None if self.zeros is None else self.zeros.half()
        codes = pack(self.codes.int(), self._bits)
        return IntGroupWeight(codes, _storable(self.scales()), self._bits, self._group_size, self._shape[1], zeros)


class TunableCodebook(Coded):
    """codebook: books and column scales are continuous, a unit is a vector with all its stages."""

    codes: Tensor  # int64 [vectors, columns, stages]
    place: Tensor  # int64 [in_features], of each input feature in the stored order

    def __init__(self, weight: CodebookWeight) -> None:
        super().__init__()
        self._weight = _described(weight)
        self._columns, self._v = weight.columns, weight.books.shape[2]
        stages = weight.stages()
        bits = [(books.shape[1] - 1).bit_length() for _, books in stages]
        self._ranges = [len(books) for _, books in stages]
        self.bits = sum(bits) / self._v
        found = [unpack(codes, width, weight.columns).long() for (codes, _), width in zip(stages, bits, strict=True)]
        self.register_buffer("codes", torch.stack(found, dim=-1))
        self.books = nn.ModuleList([Scaled(books) for _, books in stages])
        self.scales = None if weight.scales is None else Scaled(weight.scales, each=True)
        self.outliers = None if weight.outliers is None else TunableCodebook(weight.outliers)
        order = torch.arange(weight.in_features, device=weight.codes.device)
        if weight.order is not None:
            order = order.index_copy(0, weight.order.long(), order)
        self.register_buffer("place", order)

    def decode(self) -> Tensor:
        """The sum of the stages' vectors, in its places and scaled."""
        weight = self._stored()[:, self.place]
        return weight if self.scales is None else weight * self.scales()

    def _stored(self) -> Tensor:
        vectors = sum(self._looked_up(stage, self.codes[..., stage]) for stage in range(len(self.books)))
        assert isinstance(vectors, Tensor)
        weight = vectors.transpose(1, 2).flatten(0, 1)[: self._weight.out_features]
        return weight if self.outliers is None else torch.cat([self.outliers._stored(), weight], dim=1)

    def _looked_up(self, stage: int, codes: Tensor) -> Tensor:
        """[vectors, columns, v]."""
        books = self.books[stage]()
        width = range_width(self._columns, self._ranges[stage])
        offset = torch.arange(self._columns, device=codes.device) // width * books.shape[1]
        return books.flatten(0, 1)[codes + offset]

    def units(self, weight: Tensor) -> Tensor:
        """Vectors [vectors * columns, v] in the stored order, without scales; outliers are units of their own."""
        if self.scales is not None:
            weight = weight / self.scales().detach()
        return self._own_units(weight[:, self.place.argsort()])

    def _own_units(self, stored: Tensor) -> Tensor:
        own = stored[:, stored.shape[1] - self._columns :]
        padded = torch.nn.functional.pad(own, (0, 0, 0, -own.shape[0] % self._v))
        return padded.unflatten(0, (-1, self._v)).transpose(1, 2).flatten(0, 1)

    @torch.no_grad()
    def nearest(self, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest centroid, a stage after the other."""
        codes = torch.empty(len(index), len(self.books), dtype=torch.int64, device=index.device)
        total = torch.zeros_like(target)
        column = index % self._columns
        for stage, scaled in enumerate(self.books):
            books = scaled()
            part = column // range_width(self._columns, self._ranges[stage])
            for number in range(self._ranges[stage]):
                mine = (part == number).nonzero().flatten()
                codes[mine, stage] = kmeans.assign(target[mine] - total[mine], books[number])[0]
                total[mine] += books[number][codes[mine, stage]]
        return codes, total

    def assign(self, index: Tensor, codes: Tensor) -> None:
        """See `Coded`."""
        self.codes.view(-1, self.codes.shape[-1])[index] = codes

    @torch.no_grad()
    def packed(self) -> CodebookWeight:
        """See `Tunable`."""
        books = [book().half() for book in self.books]
        main = CodebookWeight.pack([*self.codes.unbind(-1)], books, self._weight.out_features)
        order = None if self._weight.order is None else self.place.argsort().to(self._weight.order.dtype)
        return replace(
            main,
            in_features=self._weight.in_features,
            scales=None if self.scales is None else self.scales().half(),
            order=order,
            outliers=None if self.outliers is None else self.outliers.packed(),
        )


class TunablePyramid(Coded):
    """pyramid: scales and gain levels are continuous, a unit is a group."""

    points: Tensor  # int16 [lines, fields, D]
    gains: Tensor  # int64 [lines, fields]

    def __init__(self, weight: PyramidWeight) -> None:
        super().__init__()
        self._weight = _described(weight)
        self.bits = math.log2(pyramid.count(weight.dimension, weight.pulses) * len(weight.levels)) / weight.dimension
        points, gains = weight.points()
        self.register_buffer("points", points)
        self.register_buffer("gains", gains)
        self.scales = Scaled(weight.scales, each=True)
        self.levels = Scaled(weight.levels, each=True)

    def decode(self) -> Tensor:
        """factor * y with factor = scale * level / |y| rounded to fp16, through which gradients pass."""
        factor = self.scales() * self.levels()[self.gains] / self.points.float().square().sum(-1).sqrt().clamp_min(1.0)
        with torch.no_grad():
            stored = factors(self.points, self.levels()[self.gains], self.scales()).float()
        groups = self.points.float() * (factor + (stored - factor).detach()).unsqueeze(-1)
        along = groups.transpose(1, 2).flatten(0, 1)
        shape = self._weight.shape
        return along[: shape[0]] if self._weight.axis == "out" else along[: shape[1]].T

    def units(self, weight: Tensor) -> Tensor:
        """Groups [lines * fields, D]."""
        along = weight if self._weight.axis == "out" else weight.T
        padded = torch.nn.functional.pad(along, (0, 0, 0, -along.shape[0] % self._weight.dimension))
        return padded.unflatten(0, (-1, self._weight.dimension)).transpose(1, 2).flatten(0, 1)

    @torch.no_grad()
    def nearest(self, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The point that is closest in angle, then the nearest level."""
        scales = self.scales()[index % self.points.shape[1]]
        levels, order = self.levels().sort()
        points, amplitudes, _ = shape(target, self._weight.pulses)
        chosen = nearest_level(amplitudes / scales, levels)
        values = points.float() * factors(points, levels[chosen], scales).float().unsqueeze(-1)
        return torch.cat([points.long(), order[chosen].unsqueeze(-1)], dim=-1), values

    def assign(self, index: Tensor, codes: Tensor) -> None:
        """See `Coded`."""
        self.points.view(-1, self.points.shape[-1])[index] = codes[:, :-1].to(self.points.dtype)
        self.gains.view(-1)[index] = codes[:, -1]

    @torch.no_grad()
    def packed(self) -> PyramidWeight:
        """See `Tunable`."""
        w = self._weight
        return PyramidWeight.pack(
            self.points, self.gains, _storable(self.scales()), self.levels().half(), w.pulses, w.axis, w.shape
        )


class TunableTrellis(Coded):
    """trellis: scales are continuous, as far as their steps go; a unit is a piece of a ring.

    A piece's first L - K bits belong to the weights before it as well, and stay when it gets other codes; pieces begin
    elsewhere each time, so that all bits can move.
    """

    pace = 0.5  # another path changes a whole piece for what some of its weights gain; at 1 that gained nothing
    symbols: Tensor  # uint8 [places, rings]
    scale: Tensor
    begin: Tensor  # int64 [], where the first piece of each ring begins

    def __init__(self, weight: TrellisWeight) -> None:
        super().__init__()
        self._weight = _described(weight)
        self.bits = weight.bits
        self.register_buffer("symbols", trellis.unpack_rings(weight.codes, weight.bits))
        self.register_buffer("begin", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", weight.scale.float())
        self.scales = Scaled(trellis.step(weight.scales[0]) * weight.scale, each=True)
        self._piece = next(size for size in (128, 64, 32) if len(self.symbols) % size == 0)

    def _states(self) -> Tensor:
        """int32 [places, rings]."""
        states = self.symbols.int()
        for i in range(1, -(-self._weight.state_bits // self._weight.bits)):
            states |= self.symbols.roll(-i, 0).int() << (i * self._weight.bits)
        return states & (1 << self._weight.state_bits) - 1

    def _steps(self) -> Tensor:
        """Scales as they are stored, through which gradients pass; fp32 [in_features]."""
        scales = self.scales()
        with torch.no_grad():
            stored = trellis.step(trellis.nearest_step(scales / self.scale)) * self.scale
        return scales + (stored - scales).detach()

    def forward(self) -> Tensor:
        """See `Tunable`; moves the places where pieces begin."""
        self.begin.copy_((self.begin + self._piece // 2 + 1) % len(self.symbols))
        return super().forward()

    def decode(self) -> Tensor:
        """value * step * scale."""
        out_features, in_features = self._weight.shape
        values = trellis.evaluate(self._states())
        width = self._weight.width
        values = columns_of(values[: -(-out_features // width) * width * width], width)
        return values[:out_features, :in_features] * self._steps()

    def units(self, weight: Tensor) -> Tensor:
        """Pieces [rings * pieces, size]."""
        rings = rings_of(weight, self._weight.width)
        return self._pieces(torch.nn.functional.pad(rings, (0, 0, 0, len(self.symbols) - len(rings))))

    def _pieces(self, rings: Tensor) -> Tensor:
        return rings.roll(-int(self.begin), 0).T.reshape(-1, self._piece)

    @torch.no_grad()
    def nearest(self, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest path between the bits around the piece."""
        w = self._weight
        values = trellis.table(w.state_bits, target.device)
        scales = self.units(self._steps().expand(w.shape))[index]
        fills = scales == 0  # places that fill a ring up stand for nothing, and may stay
        states = self._states()
        wanted = torch.where(fills, self._pieces(values[states.long()])[index], target / scales)
        pieces = len(self.symbols) // self._piece
        first = (self.begin + index % pieces * self._piece) % len(self.symbols)
        ends = states & (1 << (w.state_bits - w.bits)) - 1
        above, below = (ends[place % len(ends), index // pieces] for place in (first + self._piece, first))
        states = viterbi.between(wanted, values, w.bits, above, below)
        return states & (1 << w.bits) - 1, values[states.long()] * scales

    def assign(self, index: Tensor, codes: Tensor) -> None:
        """See `Coded`."""
        pieces = self._pieces(self.symbols)
        pieces[index] = codes.to(pieces.dtype)
        rings = pieces.view(self.symbols.shape[1], -1).T.roll(int(self.begin), 0)
        self.symbols.copy_(rings)

    @torch.no_grad()
    def packed(self) -> TrellisWeight:
        """See `Tunable`."""
        codes = trellis.pack_rings(self.symbols, self._weight.bits)
        scales = trellis.nearest_step(self.scales() / self.scale)
        return replace(self._weight, codes=codes, scales=scales[None], scale=self.scale.clone())


class TunableRotation(Tunable):
    """rotated: what is inside is tuned in its own basis; signs stay."""

    def __init__(self, weight: RotatedWeight) -> None:
        super().__init__()
        self.base = tunable(weight.base)
        self._weight = replace(weight, base=_described(weight.base))

    def coded(self) -> Iterator[Coded]:
        """The base's."""
        yield from self.base.coded()

    def forward(self) -> Tensor:
        """R_out^T W' R_in."""
        weight = rotate(self.base(), self._weight.in_signs, True)
        return self._weight.outputs_back(weight.T).T

    def packed(self) -> RotatedWeight:
        """See `Tunable`."""
        return replace(self._weight, base=self.base.packed())


class TunableCorrection(Tunable):
    """low_rank: factors in fp16 are continuous; those in 8 bits stay as they are."""

    def __init__(self, weight: LowRankWeight) -> None:
        super().__init__()
        self.base = tunable(weight.base)
        self._weight = replace(weight, base=_described(weight.base))
        up, down = weight.factors()
        self.factors = None if weight.scales is not None else nn.ModuleList([Scaled(up), Scaled(down)])

    def coded(self) -> Iterator[Coded]:
        """The base's."""
        yield from self.base.coded()

    def forward(self) -> Tensor:
        """base + up down."""
        up, down = self._weight.factors() if self.factors is None else (factor() for factor in self.factors)
        return self.base() + up @ down

    @torch.no_grad()
    def packed(self) -> LowRankWeight:
        """See `Tunable`."""
        if self.factors is None:
            return replace(self._weight, base=self.base.packed())
        up, down = (factor().half() for factor in self.factors)
        return LowRankWeight(self.base.packed(), up, down)


_KINDS: dict[type[QuantizedWeight], Callable[[Any], Tunable]] = {
    IntGroupWeight: TunableIntegers,
    CodebookWeight: TunableCodebook,
    PyramidWeight: TunablePyramid,
    TrellisWeight: TunableTrellis,
    RotatedWeight: TunableRotation,
    LowRankWeight: TunableCorrection,
}


def tunable(weight: QuantizedWeight) -> Tunable:
    """A packed weight taken apart.

    Raises:
        QuantkitError: its format does not say what is continuous.
    """
    if type(weight) not in _KINDS:
        known = ", ".join(kind.format for kind in _KINDS)
        raise QuantkitError(f"a weight in the format {weight.format!r} cannot be tuned; {known} can")
    return _KINDS[type(weight)](weight)


def _described(weight: Any) -> Any:
    """A weight's layout, without its tensors."""
    return weight.map(lambda tensor: tensor.detach().to("meta"))


def _storable(scales: Tensor) -> Tensor:
    """fp16, finite: what grows beyond stays at the largest."""
    return scales.clamp(-65504, 65504).half()
