"""codebook: vectors of output features as indices into learnt codebooks.

    W[g v + j, k] = scale[k] * (codebook[c(k)][code[g, k]]_j + residual_codebook[c(k)][residual_code[g, k]]_j)

A vector is v outputs of one input feature, so every code belongs to a single column and any order of columns can be
quantized. c(k) is the index of one of equal ranges of columns, which have codebooks of their own. Columns may be stored
in another order than the inputs come in (`order`); the first of them may be a nested weight with longer codes
(`outliers`). What does not fill a last vector is padding. Codes are packed like an integer format's
(`quantkit.kernels.bitpack`).

Source: VPTQ (arXiv 2409.17066).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from quantkit.core.schema import TensorSpec, extent
from quantkit.core.weight import QuantizedWeight, corrected
from quantkit.kernels import launching, plans
from quantkit.kernels.bitpack import pack, planes, row_words, unpack
from quantkit.kernels.codebook_matmul import codebook_matmul, launch, unpacked
from quantkit.kernels.codebook_rule import book_bytes, expected_speed, range_width, served_from
from quantkit.kernels.cpu import has_numba

logger = logging.getLogger(__name__)
LARGEST_BITS = 16


@dataclass(frozen=True, eq=False)
class CodebookWeight(QuantizedWeight, format="codebook"):
    """Vector-quantized weight.

    Attributes:
        codes: int32 [vectors, row_words(columns, bits)], vectors = ceil(out_features / v), columns = in_features
            without those of `outliers`.
        books: the codebooks, fp16 [ranges, 2^bits, v].
        out_features, in_features: of the weight, outliers included.
        residual_codes, residual_books: a second stage that is added, like the first; or None.
        scales: fp16 [in_features] factors of the columns, or None.
        order: int16 or int32 [in_features], the input feature that each stored column belongs to; None for their own
            order.
        outliers: the first stored columns, or None.
    """

    codes: Tensor
    books: Tensor
    out_features: int
    in_features: int
    residual_codes: Tensor | None = None
    residual_books: Tensor | None = None
    scales: Tensor | None = None
    order: Tensor | None = None
    outliers: CodebookWeight | None = None

    @classmethod
    def pack(cls, codes: list[Tensor], books: list[Tensor], out_features: int) -> CodebookWeight:
        """Packs one or two stages without scales, order and outliers.

        Args:
            codes: integers [vectors, columns], a stage each, one or two.
            books: codebooks, fp16 [ranges, 2^bits, v], a stage each.
        """
        words = [pack(code.int(), _bits(book)) for code, book in zip(codes, books, strict=True)]
        second = (words[1], books[1]) if len(words) > 1 else (None, None)
        return cls(words[0], books[0], out_features, codes[0].shape[1], *second)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def label(self) -> str:
        """Vector length, bits a stage, and what else there is."""
        bits = "+".join(str(_bits(books)) for _, books in self.stages())
        ranges = f", {len(self.books)} ranges" if len(self.books) > 1 else ""
        return f"codebook v={self.books.shape[2]} {bits} bits{ranges}{'' if self.outliers is None else ', outliers'}"

    @property
    def columns(self) -> int:
        """Columns that this level's own codes stand for."""
        return self.in_features - (0 if self.outliers is None else self.outliers.in_features)

    def schema(self) -> dict[str, TensorSpec]:
        """Codes and codebooks of each stage, and what columns are multiplied by and sorted in."""
        vector = extent(self.books, 2)
        vectors = -(-self.out_features // vector)
        schema = {
            "scales": TensorSpec(torch.float16, (self.in_features,), continuous=True, optional=True),
            "order": TensorSpec((torch.int16, torch.int32), (self.in_features,), optional=True),
        }
        for prefix, (_, books) in zip(("", "residual_"), self.stages(), strict=False):
            bits = _bits(books)
            schema[f"{prefix}codes"] = TensorSpec(torch.int32, (vectors, row_words(self.columns, bits)))
            shape = extent(books, 0), 1 << bits, vector
            schema[f"{prefix}books"] = TensorSpec(torch.float16, shape, continuous=True)
        return schema

    def _check_fields(self) -> None:
        if self.columns < 1 or (self.outliers is not None and self.outliers.out_features != self.out_features):
            inner = None if self.outliers is None else list(self.outliers.shape)
            raise self._refused("outliers", inner, f"columns of a weight of {list(self.shape)}, and not all")
        for name, (_, books) in zip(("books", "residual_books"), self.stages(), strict=False):
            ranges, vector, bits = extent(books, 0), extent(books, 2), _bits(books)
            if min(ranges, vector, bits) < 1 or bits > LARGEST_BITS:
                raise self._refused(name, books, f"[ranges, 2^bits, v] of 1 to {LARGEST_BITS} bits")
            if ranges != -(-self.columns // range_width(self.columns, ranges)):
                raise self._refused(name, books, f"as many ranges as divide {self.columns} columns")

    def _check_values(self) -> None:
        """The order is a permutation."""
        if self.order is not None:
            places = torch.arange(self.in_features, device=self.order.device)
            if not torch.equal(self.order.long().sort().values, places):
                raise ValueError(f"order holds no permutation of {self.in_features} input features")

    def stages(self) -> list[tuple[Tensor, Tensor]]:
        """(codes [vectors, words], codebooks [ranges, 2^bits, v]) of one or two stages."""
        if self.residual_codes is None or self.residual_books is None:
            return [(self.codes, self.books)]
        return [(self.codes, self.books), (self.residual_codes, self.residual_books)]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features]: the sum of the stages' vectors, in its places and scaled, in fp32, then cast."""
        weight = self._stored()
        if self.order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.order.long(), weight)
        return (weight if self.scales is None else weight * self.scales.float()).to(dtype)

    def _stored(self) -> Tensor:
        """fp32 [out_features, in_features] in the stored order, without scales."""
        weight = unpacked(*self._stages, self.out_features, self.columns)
        return weight if self.outliers is None else torch.cat([self.outliers._stored(), weight], dim=1)

    @property
    def cpu_slowdown(self) -> float:
        """Adds up, stage by stage, the decoding of codes and the sums of their vectors, four entries at a time."""
        if not has_numba():
            return super().cpu_slowdown
        v = self.books.shape[2]
        return sum((len(planes(_bits(books))) + 1.2 * -(-v // 4) * 4) / v for _, books in self.stages())

    def _cut(self, dim: int, start: int, stop: int) -> QuantizedWeight:
        """Outputs between vectors; inputs where all columns have the same codebooks."""
        if dim == 0:
            first, last = self._cut_at(dim, start, stop, extent(self.books, 2), "vectors")
            residual = None if self.residual_codes is None else self.residual_codes[first:last]
            outliers = None if self.outliers is None else self.outliers.cut(dim, start, stop)
            assert outliers is None or isinstance(outliers, CodebookWeight)
            codes = self.codes[first:last]
            return replace(self, codes=codes, residual_codes=residual, outliers=outliers, out_features=stop - start)
        if self.outliers is not None or len(self.books) > 1:
            raise self._uncut(dim, "keeps columns with codebooks of their own (outliers, ranges) together")
        if self.order is None:
            stored, order = torch.arange(start, stop, device=self.codes.device), None
        else:
            elsewhere = (self.order < start) | (self.order >= stop)
            stored = elsewhere.to(torch.uint8).argsort(stable=True)[: stop - start]
            order = self.order[stored] - start
        own = [
            pack(unpack(codes, _bits(books), self.in_features)[:, stored], _bits(books))
            for codes, books in self.stages()
        ]
        scales = None if self.scales is None else self.scales[start:stop]
        residual = own[1] if len(own) > 1 else None
        width = stop - start
        return replace(self, codes=own[0], residual_codes=residual, scales=scales, order=order, in_features=width)

    def prepare(self) -> None:
        """Allocates what launches on the codes' GPU share; warns where codebooks are too large to be fast there."""
        for weight in (self, self.outliers):
            if weight is not None and weight.codes.is_cuda:
                launching.prepare(weight.codes.device)
                residual_bits = 0 if weight.residual_books is None else _bits(weight.residual_books)
                capability = launching.properties(weight.codes.device)[0]
                _warn(weight.books.shape[2], _bits(weight.books), residual_bits, len(weight.books), capability)

    def matmul(
        self, x: Tensor, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None
    ) -> Tensor:
        """[..., in_features] -> [..., out_features], fused; see `quantkit.kernels.codebook_matmul`.

        Scales multiply x, in its dtype.
        """
        if self.scales is None and self.order is None and self.outliers is None:
            return self._product(x, bias, up, down)
        stored = x if self.scales is None else x * self.scales.to(x.dtype)
        if self.order is not None:
            stored = stored.index_select(-1, self.order.int())
        return corrected(self._multiplied(stored, bias), x, up, down)

    def _multiplied(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with x in the stored order."""
        if self.outliers is None:
            return self._product(x, bias)
        first, rest = torch.split(x, [self.outliers.in_features, self.columns], dim=-1)
        return self._product(rest, bias) + self.outliers._multiplied(first, None)

    def _product(self, x: Tensor, bias: Tensor | None, up: Tensor | None = None, down: Tensor | None = None) -> Tensor:
        """The product with this level's own codes."""
        if plans.direct(x, bias, up, down):
            return self._planned(x, bias, up, down)
        y: Tensor = codebook_matmul(x, *self._stages, self.out_features, bias, up, down)
        return y

    @cached_property
    def _planned(self) -> Callable[..., Tensor]:
        return plans.Planned(codebook_matmul, launch, *self._stages, self.out_features)

    @property
    def _stages(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.codes, self.books, self.residual_codes, self.residual_books


@lru_cache  # once a process for each
def _warn(v: int, bits: int, residual_bits: int, ranges: int, capability: int) -> None:
    sizes = v, bits, residual_bits, ranges, capability
    if served_from(*sizes) != "shared":
        logger.warning(
            "codebook v=%d, %s bits: its codebooks of %.4g KiB do not fit a multiprocessor's shared memory and are "
            "read through the %s cache; expect about %.2g times the speed of bf16 with few rows (a model's figure)",
            *(v, f"{bits}+{residual_bits}" if residual_bits else bits, book_bytes(v, bits, residual_bits) / 1024),
            *(served_from(*sizes).upper(), expected_speed(*sizes)),
        )


def _bits(books: Tensor) -> int:
    return (extent(books, 1) - 1).bit_length()
