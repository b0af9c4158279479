"""VPTQ: learnt vector codebooks under error feedback (arXiv 2409.17066).

A vector is v output features of one input feature ("channel-independent", section 3.1): inside a column the loss of
the feedback loop weighs all errors alike, so the plain nearest centroid is the best one, and no feedback is lost.

1. k-means over the columns' vectors, each weighted by what an error in its column costs, diag(H).
2. The feedback loop, rounding to the nearest centroid; then both once more, with k-means over the columns as the loop
   saw them (`passes`).
3. With a residual stage: k-means over what is left of those columns, and the whole loop again, now rounding to a
   centroid plus a residual centroid.
4. Refit: for the codes found, the codebooks and scales that minimise tr((W - Q) H (W - Q)^T). The layer's error on its
   calibration activations is quadratic in them and H holds all of it, so a few conjugate gradient steps do what the
   paper's layer-wise fine-tuning does by Adam.

Input features that stand out may form a nested weight with longer codes (outliers), and ranges of columns may have
codebooks of their own. With scales, W S^-1 is quantized and the loss is that of S H S: in the feedback, in the k-means
and in the damping alike. Columns are quantized by falling diag(H); the format stores that order only for outliers or
ranges.

Deviations from the published code: k-means starts from a k-d tree instead of at random; scales are root mean squares;
H is damped once, after dead inputs were found.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.core.linalg import column_scales, inverse_power
from quantkit.core.protocols import Needs
from quantkit.core.stats import LayerStats
from quantkit.formats.codebook import LARGEST_BITS, CodebookWeight
from quantkit.kernels.codebook_rule import range_width
from quantkit.quantizers import kmeans
from quantkit.quantizers.feedback import check_feedback, error_feedback, required

LARGEST_VECTOR = 16
_CHOSEN_VECTORS = range(1, 9)
_CODEBOOK_FRACTION = 0.05  # of the bits of codes, that codebooks may cost where the length of vectors is free
_CHOSEN_BITS = 12  # codebooks of 4,096 vectors still fit a GPU's shared memory
_RELATIVE_ERROR = (1.0, 0.93, 0.89, 0.84, 0.82, 0.80, 0.79, 0.78)
"""Error of codebooks of 1, 2, ... dimensions on Gaussian weights, relative to scalars at the same rate."""


@dataclass(frozen=True)
class VectorCode:
    """Vectors of `length` weights with a code of so many bits for each stage."""

    length: int
    bits: tuple[int, ...]

    @property
    def codebook_bits(self) -> int:
        """Bits that one range's codebooks take."""
        return sum(16 * self.length << bits for bits in self.bits)


@dataclass(frozen=True)
class VPTQ:
    """Settings of vector codebooks.

    Attributes:
        bits: per weight for codes, at most; any fraction. Codebooks, scales and outliers come on top and are counted.
        vector_length: v, whatever its codebooks cost up to 16 bits a weight; None for the best whose codebooks cost
            no more than 5% of `bits`.
        residual_bits: of a second code per vector, out of the same bits; 0 for one stage.
        outliers: fraction of the input features that get longer codes.
        outlier_bits: per weight in those.
        ranges: ranges of columns with codebooks of their own.
        scale_inputs: store a scale per input feature.
        passes: of k-means and the loop, for each stage.
        refit: conjugate gradient steps of the refit; 0 for none.
        damp: added to diag(H), as a fraction of its mean.
        block_size: columns between deferred updates; changes speed, not codes.
    """

    needs: ClassVar[Needs] = Needs.HESSIAN
    wants_rotation: ClassVar[bool] = True

    bits: float = 2.0
    vector_length: int | None = None
    residual_bits: int = 0
    outliers: float = 0.0
    outlier_bits: float = 4.0
    ranges: int = 1
    scale_inputs: bool = False
    passes: int = 2
    refit: int = 8
    damp: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        for name in ("bits", "outlier_bits"):
            if not 0.5 <= getattr(self, name) <= 8:
                raise ValueError(f"{name}={getattr(self, name)}: codebooks take 0.5 to 8 bits a weight")
        if self.vector_length is not None and (
            not isinstance(self.vector_length, int) or not 1 <= self.vector_length <= LARGEST_VECTOR
        ):
            raise ValueError(f"vector_length={self.vector_length}: vectors hold 1 to {LARGEST_VECTOR} weights")
        if self.residual_bits not in range(LARGEST_BITS + 1):
            raise ValueError(f"residual_bits={self.residual_bits}: a code has at most {LARGEST_BITS} bits; 0 for none")
        if self.ranges < 1 or self.passes < 1 or self.refit < 0:
            raise ValueError("ranges and passes are at least 1, refit at least 0")
        if not 0 <= self.outliers < 1:
            raise ValueError(f"outliers={self.outliers}: a fraction, from 0 to below 1")
        check_feedback(self.damp, self.block_size)
        if self.outliers and self.outlier_bits < self.bits:
            raise ValueError(f"outlier_bits={self.outlier_bits}: outliers get at least the others' {self.bits}")
        _codes(self.bits, self.vector_length, self.residual_bits)  # raises where there is none

    def code(self, out_features: int, in_features: int) -> VectorCode:
        """The code for a shape: the given vector length, or the best whose codebooks stay below their fraction.

        The best is also taken where the codebooks of the given length would cost more than fp16 weights (tiny layers).
        """
        possible = _codes(self.bits, self.vector_length, self.residual_bits)
        weights = out_features * in_features / self.ranges
        affordable = [code for code in possible if code.codebook_bits <= _CODEBOOK_FRACTION * self.bits * weights]
        if self.vector_length is None and affordable:
            return min(affordable, key=_predicted_error)
        full = [code for code in possible if sum(code.bits) == int(self.bits * code.length + 1e-9)]
        cheapest = min(full, key=lambda code: code.codebook_bits)
        if self.vector_length is not None and cheapest.codebook_bits > 16 * weights:
            return replace(self, vector_length=None, residual_bits=0).code(out_features, in_features)
        return cheapest

    def layout(self, out_features: int, in_features: int) -> CodebookWeight:
        """The packed weight's layout for a shape, on the meta device."""
        sections = self._sections(out_features, in_features)
        codes = []
        for section in sections:
            section.codebooks = [torch.empty(1 << b, section.code.length, device="meta") for b in section.code.bits]
            vectors = -(-out_features // section.code.length)
            codes.append(torch.empty(len(section.code.bits), section.columns, vectors, device="meta"))
        order = torch.empty(in_features, dtype=torch.int64, device="meta")
        scales = torch.empty(in_features, device="meta") if self.scale_inputs else None
        return self._packed(sections, codes, out_features, order, scales)

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> CodebookWeight:
        """Quantizes fp32 or fp64 [out_features, in_features].

        Raises:
            CalibrationError: the Hessian does not factor.
            ValueError: there are no statistics.
        """
        stats = required(stats, self)
        scales = None
        if self.scale_inputs:
            scales = weight.square().mean(0).sqrt().clamp(2.0**-14, 2.0**15).half().to(weight.dtype)
            weight = weight / scales
            stats = stats.scaled(scales)
        order = stats.hessian.diagonal().argsort(descending=True, stable=True)
        factor = stats.inverse_factor(self.damp, order).to(weight.dtype)
        importance = stats.hessian.diagonal()[order].to(weight.dtype)
        ordered = weight[:, order]
        sections = self._sections(*weight.shape)
        rounding = _NearestCentroid(sections, ordered)
        for stage in range(max(len(section.code.bits) for section in sections)):
            for _ in range(self.passes):
                for section in sections:
                    section.fit(stage, rounding.seen, importance)
                error_feedback(ordered, factor, rounding, self.block_size)
        codes = [rounding.codes(section) for section in sections]
        if self.refit:
            _refit_codebooks(ordered, stats.hessian[order][:, order].to(weight.dtype), sections, codes, self.refit)
        packed = self._packed(sections, codes, weight.shape[0], order, scales)
        if scales is None:
            return packed
        unscaled = replace(packed, scales=None).dequantize().to(weight.dtype)
        fitted = scales * column_scales(weight, unscaled, stats.hessian.to(weight.dtype))
        return replace(packed, scales=fitted.half())

    def _sections(self, out_features: int, in_features: int) -> list["_Section"]:
        """Outliers, if any, and the ranges, over columns in the order of quantization."""
        outliers = self._outlier_columns(in_features)
        columns = in_features - outliers
        code = self.code(out_features, columns)
        width = range_width(columns, min(self.ranges, columns))
        sections = [
            _Section(code, outliers + start, outliers + min(start + width, columns))
            for start in range(0, columns, width)
        ]
        if not outliers:
            return sections
        longer = replace(self, bits=self.outlier_bits, vector_length=None, residual_bits=0, ranges=1)
        return [_Section(longer.code(out_features, outliers), 0, outliers), *sections]

    def _outlier_columns(self, in_features: int) -> int:
        return min(round(self.outliers * in_features), in_features - 1)

    def _packed(
        self, sections: list["_Section"], codes: list[Tensor], out_features: int, order: Tensor, scales: Tensor | None
    ) -> CodebookWeight:
        """Packs what was found; columns keep the order of quantization only where outliers or ranges need it."""
        outliers = None
        in_features = len(order)
        if self._outlier_columns(in_features):
            outliers = _packed_sections(sections[:1], codes[:1], out_features)
            sections, codes = sections[1:], codes[1:]
        stored = None
        if outliers is not None or len(sections) > 1:
            stored = order.to(torch.int16 if in_features < 2**15 else torch.int32)
        elif not order.is_meta:
            codes = [torch.empty_like(codes[0]).index_copy_(1, order, codes[0])]
        packed = _packed_sections(sections, codes, out_features)
        scales = None if scales is None else scales.half()
        return replace(packed, in_features=in_features, order=stored, scales=scales, outliers=outliers)


@lru_cache
def _codes(bits: float, vector_length: int | None, residual_bits: int) -> tuple[VectorCode, ...]:
    """The codes of at most `bits` per weight; of exactly as many where the length is given.

    Raises:
        ValueError: there are none.
    """
    longest = _CHOSEN_BITS if vector_length is None else LARGEST_BITS
    found = []
    for length in _CHOSEN_VECTORS if vector_length is None else (vector_length,):
        most = int(bits * length + 1e-9) - residual_bits
        for main in range(1 if vector_length is None else most, most + 1):
            if 1 <= main <= longest:
                found.append(VectorCode(length, (main, residual_bits) if residual_bits else (main,)))
    if not any(sum(code.bits) == int(bits * code.length + 1e-9) for code in found):
        lengths = vector_length or f"1 to {_CHOSEN_VECTORS[-1]}"
        raise ValueError(
            f"{bits:g} bits, vector_length={lengths}, residual_bits={residual_bits}: bits x vector_length - "
            f"residual_bits must be 1 to {longest} bits a code"
        )
    return tuple(found)


def _predicted_error(code: VectorCode) -> float:
    return _RELATIVE_ERROR[code.length - 1] * 4.0 ** (-sum(code.bits) / code.length)


class _Section:
    """Columns start..stop in the order of quantization, and their codebooks, a stage each."""

    def __init__(self, code: VectorCode, start: int, stop: int) -> None:
        self.code, self.start, self.stop = code, start, stop
        self.codebooks: list[Tensor] = []

    @property
    def columns(self) -> int:
        return self.stop - self.start

    def vectors(self, columns: Tensor) -> Tensor:
        """Columns [count, out_features] as vectors [count, vectors, v], the last padded with zeros."""
        padded = torch.nn.functional.pad(columns, (0, -columns.shape[-1] % self.code.length))
        return padded.unflatten(-1, (-1, self.code.length))

    def encode(self, vectors: Tensor) -> tuple[list[Tensor], Tensor]:
        """(codes, a tensor a stage; the sum of their centroids) for vectors [count, v]."""
        codes, total = [], torch.zeros_like(vectors)
        for codebook in self.codebooks:
            codes.append(kmeans.assign(vectors - total, codebook)[0])
            total = total + codebook[codes[-1]]
        return codes, total

    def fit(self, stage: int, seen: Tensor, importance: Tensor) -> None:
        """k-means of a stage over what the stages before leave of the columns as the loop saw them."""
        if stage >= len(self.code.bits):
            return
        vectors = self.vectors(seen[self.start : self.stop])
        weights = importance[self.start : self.stop].repeat_interleave(vectors.shape[1])
        vectors = vectors.flatten(0, 1)
        self.codebooks = self.codebooks[:stage]
        if stage:
            vectors = vectors - self.encode(vectors)[1]
        codebook = kmeans.fit(vectors, weights, self.code.bits[stage])
        self.codebooks.append(codebook.half().to(codebook.dtype))  # codes belong to the codebooks that are stored


class _NearestCentroid:
    """Rounds a column to its section's centroids."""

    width = 1

    def __init__(self, sections: list[_Section], weight: Tensor) -> None:
        self.seen = weight.T.clone()  # columns as the last loop saw them; before the first, as they are
        self._section_of = [section for section in sections for _ in range(section.columns)]
        self._codes: list[list[Tensor]] = [[] for _ in self._section_of]

    def group_size(self) -> int:
        return 1

    def open(self, start: int, columns: Tensor) -> None:
        """Columns need no preparation."""

    def round(self, index: int, column: Tensor) -> Tensor:
        self.seen[index] = column
        section = self._section_of[index]
        self._codes[index], rounded = section.encode(section.vectors(column))
        return rounded.flatten()[: len(column)]

    def codes(self, section: _Section) -> Tensor:
        """int64 [stages, columns, vectors]."""
        return torch.stack([torch.stack(self._codes[j]) for j in range(section.start, section.stop)], dim=1)


def _packed_sections(sections: list[_Section], codes: list[Tensor], out_features: int) -> CodebookWeight:
    """One level of the format: ranges with the same code."""
    together = torch.cat(codes, dim=1)  # [stages, columns, vectors]
    stages = range(len(sections[0].code.bits))
    codebooks = [torch.stack([section.codebooks[stage] for section in sections]).half() for stage in stages]
    return CodebookWeight.pack([together[stage].T for stage in stages], codebooks, out_features)


def _refit_codebooks(
    weight: Tensor, hessian: Tensor, sections: list[_Section], codes: list[Tensor], steps: int
) -> None:
    """Moves the codebooks to where tr((W - Q) H (W - Q)^T) is least for the codes, by conjugate gradients.

    Q is linear in the codebooks: `spread` is that map and `collect` its transpose. A small ridge towards the present
    ones holds centroids that few vectors chose.
    """
    out_features, in_features = weight.shape
    hessian = hessian * inverse_power(float(hessian.diagonal().mean()))  # residuals are squared
    owners = [(section, stage) for section in sections for stage in range(len(section.codebooks))]
    index = {id(section): code for section, code in zip(sections, codes, strict=True)}

    def spread(codebooks: list[Tensor]) -> Tensor:
        """The weight [out_features, in_features] that the codes give with these codebooks."""
        result = torch.zeros_like(weight)
        for (section, stage), codebook in zip(owners, codebooks, strict=True):
            vectors = codebook[index[id(section)][stage]]  # [columns, vectors, v]
            result[:, section.start : section.stop] += vectors.flatten(1)[:, :out_features].T
        return result

    def collect(moment: Tensor) -> list[Tensor]:
        """The adjoint of `spread`: [out_features, in_features] added up by the centroid that each vector has."""
        result = []
        for section, stage in owners:
            vectors = section.vectors(moment[:, section.start : section.stop].T).flatten(0, 1)
            codebook = torch.zeros_like(section.codebooks[stage])
            result.append(codebook.index_add_(0, index[id(section)][stage].flatten(), vectors))
        return result

    present = [section.codebooks[stage] for section, stage in owners]
    vectors = sum(codebook.shape[0] for codebook in present)
    ridge = 1e-4 * float(hessian.diagonal().mean()) * in_features * out_features / vectors
    moved = conjugate_gradients(
        lambda codebooks: [a + ridge * b for a, b in zip(collect(spread(codebooks) @ hessian), codebooks, strict=True)],
        collect((weight - spread(present)) @ hessian),
        steps,
    )
    for (section, stage), step in zip(owners, moved, strict=True):
        section.codebooks[stage] = section.codebooks[stage] + step


def conjugate_gradients(apply: Callable[[list[Tensor]], list[Tensor]], right: list[Tensor], steps: int) -> list[Tensor]:
    """x with apply(x) ~ right, by Hestenes and Stiefel's method of conjugate gradients, from zeros.

    Args:
        apply: a symmetric positive definite linear map over lists of tensors, which keeps their shapes [...].
        right: tensors of any shapes [...] in one floating-point dtype.
        steps: at most; fewer where the residual is a millionth of what it was.

    Returns:
        Tensors of the shapes and the dtype of `right`.
    """

    def inner(a: list[Tensor], b: list[Tensor]) -> float:
        return sum(float((p * q).sum()) for p, q in zip(a, b, strict=True))

    x = [torch.zeros_like(part) for part in right]
    residual, direction = right, right
    square = first = inner(residual, residual)
    for _ in range(steps):
        if square <= 1e-12 * first:
            break
        image = apply(direction)
        length = square / inner(direction, image)
        x = [a + length * d for a, d in zip(x, direction, strict=True)]
        residual = [r - length * i for r, i in zip(residual, image, strict=True)]
        before, square = square, inner(residual, residual)
        direction = [r + square / before * d for r, d in zip(residual, direction, strict=True)]
    return x
