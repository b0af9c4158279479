"""pyramid: groups of D weights as a gain and a point of the pyramid codebook P(D, K).

    group = factor * y,    factor = fp16(scale * (level[gain] / |y|_2)),    y in Z^D with |y|_1 = K

Groups run along the output features (axis "out": D outputs of one input feature, a scale per input feature) or along
the input features (axis "in": D inputs of one output feature, a scale per output feature). What does not fill a last
group is padding. A field holds gain * 2^B + index, B = ceil(log2 N(D, K)); fields of more than 16 bits are packed in
pieces of 16, lowest first, each like the codes of an integer format (`quantkit.kernels.bitpack`).

Source: "Pyramid Vector Quantization for LLMs" (arXiv 2410.16926); the numbering is `quantkit.kernels.pyramid`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from operator import gt

import torch
from torch import Tensor

from quantkit.core.schema import TensorSpec, extent, unset
from quantkit.core.weight import QuantizedWeight, corrected
from quantkit.kernels import int_group_matmul, launching, plans, pyramid, pyramid_matmul
from quantkit.kernels.bitpack import pack, row_words, unpack
from quantkit.kernels.pyramid_matmul import (
    gain_table,
    inverse_norms,
    lane_order,
    point_table,
    transcode,
)

logger = logging.getLogger(__name__)

PIECE = 16
LARGEST_DIMENSION, LARGEST_PULSES, LARGEST_GAIN = 256, 2**13, 8
"""Limits of P(D, K), whose points are counted in a table of D x K integers of many words, and bits of a gain."""
FIELDS_AT_ONCE = 2**22
"""Groups that are decoded together: a limit to the memory that it takes."""


@dataclass(frozen=True, eq=False)
class PyramidWeight(QuantizedWeight, format="pyramid"):
    """Pyramid vector quantized weight.

    Attributes:
        codes: int32 [lines, words]: a line per D features of the axis, a field per feature of the other one.
        scales: fp16 [fields], one a feature of the other axis.
        levels: fp16 [2^gain_bits], the gains.
        dimension: D.
        pulses: K.
        axis: "out" or "in".
        out_features, in_features: of the weight.
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor
    dimension: int
    pulses: int
    axis: str
    out_features: int
    in_features: int

    @classmethod
    def pack(
        cls, points: Tensor, gains: Tensor, scales: Tensor, levels: Tensor, pulses: int, axis: str, shape: Sequence[int]
    ) -> PyramidWeight:
        """Packs points and gains.

        Args:
            points: integers [lines, fields, D].
            gains: integers [lines, fields], indices into `levels`.
            scales, levels: see the class.
            shape: (out_features, in_features).
        """
        dimension = points.shape[-1]
        bits = pyramid.index_bits(dimension, pulses)
        index = torch.nn.functional.pad(pyramid.encode(points, pulses), (0, 1))
        limb, shift = divmod(bits, pyramid.LIMB)
        field = gains.long() << shift  # may reach into the next limb
        index[..., limb] |= field & (2**pyramid.LIMB - 1)
        index[..., min(limb + 1, index.shape[-1] - 1)] |= field >> pyramid.LIMB
        pieces = torch.stack([index & 0xFFFF, index >> PIECE & 0xFFFF], dim=-1).flatten(-2)
        widths = _widths(bits + _gain_bits(levels))
        words = [pack(pieces[..., i].int(), width) for i, width in enumerate(widths)]
        return cls(torch.cat(words, dim=1), scales, levels, dimension, pulses, axis, *shape)

    @classmethod
    def layout(
        cls, out_features: int, in_features: int, dimension: int, pulses: int, gain_bits: int, axis: str
    ) -> PyramidWeight:
        """A weight of this shape on the meta device."""
        tensors = unset(), unset(), unset(2**gain_bits)
        return cls(*tensors, dimension, pulses, axis, out_features, in_features).laid_out()

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def label(self) -> str:
        """Dimension, pulses and bits of a gain."""
        return f"pyramid D={self.dimension} K={self.pulses} gain {_gain_bits(self.levels)} bits"

    def schema(self) -> dict[str, TensorSpec]:
        """Words of fields, scales of theirs, and gains."""
        lines, fields = _lines_and_fields(*self.shape, self.dimension, self.axis)
        words = sum(row_words(fields, width) for width in _widths(self._field_bits))
        return {
            "codes": TensorSpec(torch.int32, (lines, words)),
            "scales": TensorSpec(torch.float16, (fields,), continuous=True),
            "levels": TensorSpec(torch.float16, (2 ** _gain_bits(self.levels),), continuous=True),
        }

    def _check_fields(self) -> None:
        form = self.axis, self.dimension, self.pulses, _gain_bits(self.levels)
        largest = LARGEST_DIMENSION, LARGEST_PULSES, LARGEST_GAIN
        if self.axis not in ("out", "in") or min(form[1:3]) < 1 or any(map(gt, form[1:], largest)):
            raise self._refused("(axis, dimension, pulses, gain bits)", form, f"out or in, and at most {largest}")

    def _check_values(self) -> None:
        """Every index names a point."""
        self.points()

    @property
    def _field_bits(self) -> int:
        return pyramid.index_bits(self.dimension, self.pulses) + _gain_bits(self.levels)

    def fields(self) -> tuple[Tensor, Tensor]:
        """(gains int64 [lines, fields], indices of points as limbs int64 [lines, fields, limbs])."""
        _, fields = _lines_and_fields(*self.shape, self.dimension, self.axis)
        bits = pyramid.index_bits(self.dimension, self.pulses)
        size = pyramid.limbs(self.dimension, self.pulses)
        pieces, start = [], 0
        for width in _widths(self._field_bits):
            length = row_words(fields, width)
            pieces.append(unpack(self.codes[:, start : start + length], width, fields).long())
            start += length
        pieces += [torch.zeros(len(self.codes), fields, dtype=torch.int64, device=self.codes.device)] * (
            2 * size + 2 - len(pieces)
        )
        index = torch.stack([low | high << PIECE for low, high in zip(pieces[::2], pieces[1::2], strict=True)], dim=-1)
        limb, shift = divmod(bits, pyramid.LIMB)
        gains = index[..., limb] >> shift
        if limb + 1 < index.shape[-1]:
            gains |= index[..., limb + 1] << (pyramid.LIMB - shift)
        index[..., limb] &= 2**shift - 1
        return gains, index[..., :size]

    def points(self) -> tuple[Tensor, Tensor]:
        """(points int16 [lines, fields, D], gains int64 [lines, fields]).

        Raises:
            ValueError: a field holds an index that names no point.
        """
        gains, indices = self.fields()
        return pyramid.decode(indices, self.dimension, self.pulses), gains

    def expanded(self) -> tuple[Tensor, Tensor]:
        """(points int16 [lines, fields, D], factors fp16 [lines, fields]): all that a product needs."""
        points, gains = self.points()
        return points, factors(points, self.levels.float()[gains], self.scales.float())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features]: factor * y in fp32, then cast."""
        points, factor = self.expanded()
        return _weight(points, factor, self.axis, self.shape, dtype)

    def _cut(self, dim: int, start: int, stop: int) -> QuantizedWeight:
        """Between groups along the axis, at any border of the other one."""
        shape = (stop - start, self.in_features) if dim == 0 else (self.out_features, stop - start)
        if dim == ("out", "in").index(self.axis):
            first, last = self._cut_at(dim, start, stop, self.dimension, "groups")
            codes, scales = self.codes[first:last], self.scales
        else:
            words, widths = self.codes, _widths(self._field_bits)
            pieces = torch.split(words, [row_words(self.shape[dim], width) for width in widths], dim=1)
            own = [
                pack(unpack(piece, width, self.shape[dim])[:, start:stop], width)
                for piece, width in zip(pieces, widths, strict=True)
            ]
            codes, scales = torch.cat(own, dim=1), self.scales[start:stop]
        return replace(self, codes=codes, scales=scales, out_features=shape[0], in_features=shape[1])

    def prepare(self) -> None:
        """On a GPU: brings the weight into the form that its kernel takes, and allocates what launches share."""
        if self.codes.device.type not in ("cpu", "meta"):
            launching.prepare(self.codes.device)
            self._product  # noqa: B018  (made and kept)

    def matmul(
        self, x: Tensor, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None
    ) -> Tensor:
        """[..., in_features] -> [..., out_features]; see `quantkit.kernels.pyramid_matmul`. Decodes a pyramid once."""
        product = self._product
        if isinstance(product, plans.Planned) and not plans.direct(x, bias, up, down):
            return product.through_torch(x, bias, up, down)
        return product(x, bias, up, down)

    @cached_property
    def _product(self) -> Callable[..., Tensor]:
        """(x [..., in_features], bias, up, down) -> the product, by the kernel that takes this weight."""
        with torch.inference_mode(False), torch.no_grad():  # it may be kept longer than the caller's mode
            if (self.axis, self.dimension) == ("out", 8) and self.pulses <= 6 and self._field_bits <= PIECE:
                points = point_table(self.pulses, self.codes.device)
                scales, gains = lane_order(self.scales), gain_table(self.levels)
                tables = self.codes, scales, gains, points, self._field_bits, self.out_features
                return plans.Planned(pyramid_matmul.pyramid_table_matmul, pyramid_matmul.table_launch, *tables)
            return self._transcoded()

    def _transcoded(self) -> Callable[..., Tensor]:
        points, factors = (torch.cat(parts) for parts in zip(*self._expanded_in_parts(), strict=True))
        bits = max(2, int(points.abs().max()).bit_length() + 1)
        if bits > 8:
            stored = 16 + 16 / self.dimension
            _tell(self.dimension, self.pulses, "integers of 16 bits, of which every product makes the weight", stored)
            return partial(_by_points, partial(_weight, points, factors, self.axis, self.shape))
        how = f"decoded at load to {bits}-bit integers"
        if self.axis == "out":
            _tell(self.dimension, self.pulses, how, bits + 16 / self.dimension)
            codes, words = transcode(points, factors, bits, self.out_features)
            form = codes, words, bits, self.dimension
            return plans.Planned(pyramid_matmul.pyramid_matmul, pyramid_matmul.launch, *form)
        _tell(self.dimension, self.pulses, how, bits + 32 / self.dimension)
        along = (points.short() + 2 ** (bits - 1)).to(torch.uint8).transpose(0, 1).flatten(1)[:, : self.in_features]
        zeros = torch.full_like(factors, 2 ** (bits - 1))
        grid = pack(along, bits), factors, zeros, bits, self.dimension
        return plans.Planned(int_group_matmul.int_group_matmul, int_group_matmul.launch, *grid)

    def _expanded_in_parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """`expanded`, some lines at a time; points as int8 where they fit."""
        step = max(1, FIELDS_AT_ONCE // len(self.scales))
        for start in range(0, len(self.codes), step):
            codes = self.codes[start : start + step]
            length = len(codes) * self.dimension
            if self.axis == "out":
                part = replace(self, codes=codes, out_features=length)
            else:
                part = replace(self, codes=codes, in_features=length)
            points, factor = part.expanded()
            yield points.to(torch.int8) if self.pulses < 128 else points, factor


def factors(points: Tensor, levels: Tensor, scales: Tensor) -> Tensor:
    """fp16(scale * (level / |y|)) as the kernels compute it: in fp32, by a table of 1 / |y|.

    Args:
        points: integers [..., D].
        levels, scales: fp32, broadcastable to [...], as the result.
    """
    square = points.int().square().sum(-1)
    inverse = inverse_norms(int(square.max()), points.device)
    return (scales * (levels * inverse[square])).half()


def _weight(points: Tensor, factors: Tensor, axis: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """factor * y in fp32, then cast, [out_features, in_features]."""
    groups = (points.float() * factors.float().unsqueeze(-1)).to(dtype)
    along = groups.transpose(1, 2).flatten(0, 1)
    return along[: shape[0]] if axis == "out" else along[: shape[1]].T


def _by_points(
    weight: Callable[[torch.dtype], Tensor], x: Tensor, bias: Tensor | None, up: Tensor | None, down: Tensor | None
) -> Tensor:
    y = torch.nn.functional.linear(x, weight(x.dtype), None if bias is None else bias.to(x.dtype))
    return corrected(y, x, up, down)


@lru_cache  # once a process for each
def _tell(dimension: int, pulses: int, how: str, bits: float) -> None:
    message = "pyramid D=%d K=%d has no kernel of its own: %s, %.4g bits a weight in memory"
    logger.info(message, dimension, pulses, how, bits)


def _gain_bits(levels: Tensor) -> int:
    return (extent(levels, 0) - 1).bit_length()


def _widths(bits: int) -> list[int]:
    """The pieces of a field of `bits` bits."""
    return [PIECE] * (bits // PIECE) + ([bits % PIECE] if bits % PIECE else [])


def _lines_and_fields(out_features: int, in_features: int, dimension: int, axis: str) -> tuple[int, int]:
    grouped, other = (out_features, in_features) if axis == "out" else (in_features, out_features)
    return -(-grouped // dimension), other
