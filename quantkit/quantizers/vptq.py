"""VPTQ: learnt vector codebooks under error feedback (arXiv 2409.17066).

A vector is v output features of one input feature ("channel-independent", section 3.1): inside a column the loss of
the feedback loop weighs all errors alike, so the plain nearest centroid is the best one, and no feedback is lost.

1. k-means over the columns' vectors, each weighted by what an error in its column costs, diag(H).
2. The feedback loop, rounding to the nearest centroid; then both once more, with k-means over the columns as the loop
   saw them (`passes`).
3. With a residual stage: k-means over what is left of those columns, and the whole loop again, now rounding to a
   centroid plus a residual centroid.
4. Refit: for the codes found, the books and scales that minimise tr((W - Q) H (W - Q)^T). The layer's error on its
   calibration activations is quadratic in them and H holds all of it, so a few conjugate gradient steps do what the
   paper's layer-wise fine-tuning does by Adam.

Input features that stand out may form a nested weight with longer codes (outliers), and ranges of columns may have
books of their own. With scales, W S^-1 is quantized and the loss is that of S H S: in the feedback, in the k-means and
in the damping alike. Columns are quantized by falling diag(H); the format stores that order only for outliers or
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

from quantkit.core.linalg import column_scales
from quantkit.core.protocols import Needs
from quantkit.core.stats import LayerStats
from quantkit.formats.codebook import LARGEST_BITS, CodebookWeight
from quantkit.kernels.codebook_rule import range_width
from quantkit.quantizers import kmeans
from quantkit.quantizers.feedback import error_feedback

LARGEST_VECTOR = 16
_CHOSEN_VECTORS = range(1, 9)
_CHOSEN_BITS = 12  # books of 4,096 vectors still fit a GPU's shared memory
_RELATIVE_ERROR = (1.0, 0.93, 0.89, 0.84, 0.82, 0.80, 0.79, 0.78)
"""Error of codebooks of 1, 2, ... dimensions on Gaussian weights, relative to scalars at the same rate."""


@dataclass(frozen=True)
class VectorCode:
    """Vectors of `length` weights with a code of so many bits for each stage."""

    length: int
    bits: tuple[int, ...]

    @property
    def book_bits(self) -> int:
        """Bits that one range's books take."""
        return sum(16 * self.length << bits for bits in self.bits)


@dataclass(frozen=True)
class VPTQ:
    """Vector codebooks.

    Attributes:
        bits: per weight for codes, at most; any fraction. Books, scales and outliers come on top and are counted.
        vector_length: v, whatever its books cost up to 16 bits a weight; None for the best that `book_share` allows.
        residual_bits: of a second code per vector, out of the same bits; 0 for one stage.
        book_share: what books may cost, as a share of `bits`, where v is chosen.
        outliers: share of the input features that get longer codes.
        outlier_bits: per weight in those.
        ranges: ranges of columns with books of their own.
        scale_inputs: store a scale per input feature.
        passes: of k-means and the loop, for each stage.
        refit: conjugate gradient steps of the refit; 0 for none.
        damp: added to diag(H), as a share of its mean.
        block_size: columns between deferred updates; changes speed, not codes.
        seed: of k-means.
    """

    wants_rotation: ClassVar[bool] = True

    bits: float = 2.0
    vector_length: int | None = None
    residual_bits: int = 0
    book_share: float = 0.05
    outliers: float = 0.0
    outlier_bits: float = 4.0
    ranges: int = 1
    scale_inputs: bool = False
    passes: int = 2
    refit: int = 8
    damp: float = 0.01
    block_size: int = 128
    seed: int = 0

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
        if self.ranges < 1 or self.passes < 1 or self.refit < 0 or self.block_size < 1:
            raise ValueError("ranges, passes and block_size are at least 1, refit at least 0")
        for name in ("outliers", "damp", "book_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a share, from 0 to below 1")
        if self.outliers and self.outlier_bits < self.bits:
            raise ValueError(f"outlier_bits={self.outlier_bits}: outliers get at least the others' {self.bits}")
        _codes(self.bits, self.vector_length, self.residual_bits)  # raises where there is none

    @property
    def needs(self) -> Needs:
        """The Hessian of the layer's inputs."""
        return Needs.HESSIAN

    def code(self, out_features: int, in_features: int) -> VectorCode:
        """The code for a shape: the given vector length, or the best whose books stay below their share.

        That is also taken where the books of the given length would cost more than fp16 weights (tiny layers).
        """
        possible = _codes(self.bits, self.vector_length, self.residual_bits)
        weights = out_features * in_features / self.ranges
        affordable = [code for code in possible if code.book_bits <= self.book_share * self.bits * weights]
        if self.vector_length is None and affordable:
            return min(affordable, key=_predicted_error)
        full = [code for code in possible if sum(code.bits) == int(self.bits * code.length + 1e-9)]
        cheapest = min(full, key=lambda code: code.book_bits)
        if self.vector_length is not None and cheapest.book_bits > 16 * weights:
            return replace(self, vector_length=None, residual_bits=0).code(out_features, in_features)
        return cheapest

    def layout(self, out_features: int, in_features: int) -> CodebookWeight:
        """The packed weight's layout for a shape, on the meta device."""
        sections = self._sections(out_features, in_features)
        codes = []
        for section in sections:
            section.books = [torch.empty(1 << b, section.code.length, device="meta") for b in section.code.bits]
            vectors = -(-out_features // section.code.length)
            codes.append(torch.empty(len(section.code.bits), section.columns, vectors, device="meta"))
        order = torch.empty(in_features, dtype=torch.int64, device="meta")
        scales = torch.empty(in_features, device="meta") if self.scale_inputs else None
        return self._packed(sections, codes, out_features, order, scales)

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> CodebookWeight:
        """Quantizes fp32 or fp64 [out_features, in_features].

        Raises:
            CalibrationError: the Hessian does not factor.
        """
        if stats is None:
            raise ValueError("VPTQ reads the Hessian of the layer's inputs; RTN works without")
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
                    section.fit(stage, rounding.seen, importance, self.seed)
                error_feedback(ordered, factor, rounding, self.block_size)
        codes = [rounding.codes(section) for section in sections]
        if self.refit:
            _refit_books(ordered, stats.hessian[order][:, order].to(weight.dtype), sections, codes, self.refit)
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
    """Columns start..stop in the order of quantization, and their books, a stage each."""

    def __init__(self, code: VectorCode, start: int, stop: int) -> None:
        self.code, self.start, self.stop = code, start, stop
        self.books: list[Tensor] = []

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
        for book in self.books:
            codes.append(kmeans.assign(vectors - total, book)[0])
            total = total + book[codes[-1]]
        return codes, total

    def fit(self, stage: int, seen: Tensor, importance: Tensor, seed: int) -> None:
        """k-means of a stage over what the stages before leave of the columns as the loop saw them."""
        if stage >= len(self.code.bits):
            return
        vectors = self.vectors(seen[self.start : self.stop])
        weights = importance[self.start : self.stop].repeat_interleave(vectors.shape[1])
        vectors = vectors.flatten(0, 1)
        self.books = self.books[:stage]
        if stage:
            vectors = vectors - self.encode(vectors)[1]
        book = kmeans.fit(vectors, weights, self.code.bits[stage], seed=seed)
        self.books.append(book.half().to(book.dtype))  # codes belong to the books that are stored


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
    books = [torch.stack([section.books[stage] for section in sections]).half() for stage in stages]
    return CodebookWeight.pack([together[stage].T for stage in stages], books, out_features)


def _refit_books(weight: Tensor, hessian: Tensor, sections: list[_Section], codes: list[Tensor], steps: int) -> None:
    """Moves the books to where tr((W - Q) H (W - Q)^T) is least for the codes, by conjugate gradients.

    Q is linear in the books: `spread` is that map and `collect` its transpose. A small ridge towards the present books
    holds centroids that few vectors chose.
    """
    out_features, in_features = weight.shape
    places = [(section, stage) for section in sections for stage in range(len(section.books))]
    index = {id(section): code for section, code in zip(sections, codes, strict=True)}

    def spread(books: list[Tensor]) -> Tensor:
        result = torch.zeros_like(weight)
        for (section, stage), book in zip(places, books, strict=True):
            vectors = book[index[id(section)][stage]]  # [columns, vectors, v]
            result[:, section.start : section.stop] += vectors.flatten(1)[:, :out_features].T
        return result

    def collect(moment: Tensor) -> list[Tensor]:
        result = []
        for section, stage in places:
            vectors = section.vectors(moment[:, section.start : section.stop].T).flatten(0, 1)
            book = torch.zeros_like(section.books[stage])
            result.append(book.index_add_(0, index[id(section)][stage].flatten(), vectors))
        return result

    present = [section.books[stage] for section, stage in places]
    vectors = sum(book.shape[0] for book in present)
    ridge = 1e-4 * float(hessian.diagonal().mean()) * in_features * out_features / vectors
    moved = conjugate_gradients(
        lambda books: [a + ridge * b for a, b in zip(collect(spread(books) @ hessian), books, strict=True)],
        collect((weight - spread(present)) @ hessian),
        steps,
    )
    for (section, stage), step in zip(places, moved, strict=True):
        section.books[stage] = section.books[stage] + step


def conjugate_gradients(apply: Callable[[list[Tensor]], list[Tensor]], right: list[Tensor], steps: int) -> list[Tensor]:
    """x with apply(x) ~ right for a symmetric positive definite linear map over lists of tensors."""

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
