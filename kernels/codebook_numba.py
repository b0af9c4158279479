"""Products with vector-quantized weights on a CPU, compiled by numba: see `codebook_matmul` for the weight.

    y[g v + j] = sum over k of books[c(k), codes[g, k], j] x[k]

A row of codes is decoded into the order of columns; then each code loads its vector, and adds x[k] times its entries to
sums in registers, four entries at a time. Codebooks are read in fp32, their vectors padded to multiples of four.
"""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quantkit.kernels.codebook_rule import range_width
from quantkit.kernels.numba_words import contracting, decode, exact, exact_parallel, run, words_of

FEW = 2
"""Rows of x up to which a product a row takes less time than to write W out."""
_BOOKS = WeakTensorKeyDictionary()


def multiply(
    x: Tensor,
    codes: Tensor,
    books: Tensor,
    residual_codes: Tensor | None,
    residual_books: Tensor | None,
    out_features: int,
) -> Tensor:
    """x fp32 [M, K] times the weight: fp32 [M, N], by one product a row."""
    vectors, v = len(codes), books.shape[2]
    sums = np.zeros((len(x), vectors, -(-v // 4) * 4), np.float32)
    for own_codes, own_books in ((codes, books), (residual_codes, residual_books)):
        if own_codes is not None and own_books is not None:
            form = words_of(own_codes), _wide(own_books), *_form(own_books, x.shape[1])
            for row, result in zip(x.detach().contiguous().numpy(), sums, strict=True):
                run(_multiply, _multiply_parallel, vectors, 1, vectors * v * x.shape[1], *form, row, result)
    return torch.from_numpy(sums)[..., :v].flatten(1)[:, :out_features].contiguous()


def unpack(
    codes: Tensor,
    books: Tensor,
    residual_codes: Tensor | None,
    residual_books: Tensor | None,
    _out_features: int,
    out: Tensor,
    first: int,
) -> None:
    """Rows of the weight from `first` on into out, fp32 [rows, K]; the numbers of `codebook_matmul.dequantized`."""
    v, in_features = books.shape[2], out.shape[1]
    start, end = first // v, -(-(first + len(out)) // v)
    for own_codes, own_books in ((codes, books), (residual_codes, residual_books)):
        if own_codes is not None and own_books is not None:
            form = words_of(own_codes[start:end]), _wide(own_books), *_form(own_books, in_features), v
            run(
                _unpack,
                _unpack_parallel,
                end - start,
                1,
                out.numel(),
                *form,
                own_codes is codes,
                first - start * v,
                out.numpy(),
            )


def _form(books: Tensor, in_features: int) -> tuple[int, int]:
    """(bits of a code, columns of a range)."""
    return (books.shape[1] - 1).bit_length(), range_width(in_features, len(books))


def _wide(books: Tensor) -> Any:
    """fp32 [ranges, 2^bits * v'] with v' = v up to a multiple of 4; kept as long as `books` is not written to."""
    kept = _BOOKS.get(books)
    version = 0 if books.is_inference() else books._version
    if kept is None or kept[0] != version:
        wide = torch.nn.functional.pad(books.detach().float(), (0, -books.shape[2] % 4)).flatten(1).numpy()
        kept = _BOOKS[books] = version, wide
    return kept[1]


@contracting
def _dot(codes, book, x, v, j, first, last, sums):
    """Adds the products of the columns from `first` to `last` to sums of four entries of vectors, from j on."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    one, two, three, width = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(v)
    k = np.uint64(first)
    for _ in range((last - first) // 2):  # two sums of each, or every product waits for the one before
        at, factor = np.uint64(codes[k]) * width + np.uint64(j), x[k]
        a0 += book[at] * factor
        a1 += book[at + one] * factor
        a2 += book[at + two] * factor
        a3 += book[at + three] * factor
        at, factor = np.uint64(codes[k + one]) * width + np.uint64(j), x[k + one]
        b0 += book[at] * factor
        b1 += book[at + one] * factor
        b2 += book[at + two] * factor
        b3 += book[at + three] * factor
        k += two
    if (last - first) % 2:
        at, factor = np.uint64(codes[k]) * width + np.uint64(j), x[k]
        a0 += book[at] * factor
        a1 += book[at + one] * factor
        a2 += book[at + two] * factor
        a3 += book[at + three] * factor
    sums[j] += a0 + b0
    sums[j + 1] += a1 + b1
    sums[j + 2] += a2 + b2
    sums[j + 3] += a3 + b3


@exact
def _multiply(words, books, bits, width, x, sums, first, last):
    """Adds a stage's products to the sums of the vectors from `first` to `last`."""
    quads = np.empty(32 * ((len(x) + 127) // 128), np.uint64)
    codes, v = quads.view(np.uint16), sums.shape[1]
    for g in range(first, last):
        decode(words[g], bits, len(x), quads)
        for c in range(len(books)):
            for j in range(0, v, 4):
                _dot(codes, books[c], x, v, j, c * width, min((c + 1) * width, len(x)), sums[g])


@exact_parallel
def _multiply_parallel(words, books, bits, width, x, sums, ends):
    for i in prange(len(ends) - 1):
        _multiply(words, books, bits, width, x, sums, ends[i], ends[i + 1])


@exact
def _unpack(words, books, bits, width, v, fresh, skipped, out, first, last):
    """Writes, or where not `fresh` adds, vectors from `first` to `last`; the first `skipped` rows are not wanted."""
    in_features = out.shape[1]
    quads = np.empty(32 * ((in_features + 127) // 128), np.uint64)
    codes, padded = quads.view(np.uint16), np.uint64((v + 3) // 4 * 4)
    for g in range(first, last):
        decode(words[g], bits, in_features, quads)
        for j in range(v):
            n = g * v + j - skipped
            if 0 <= n < len(out):
                row = out[n]
                for c in range(len(books)):
                    book = books[c]
                    for k in range(c * width, min((c + 1) * width, in_features)):
                        entry = book[np.uint64(codes[np.uint64(k)]) * padded + np.uint64(j)]
                        row[np.uint64(k)] = entry if fresh else row[np.uint64(k)] + entry


@exact_parallel
def _unpack_parallel(words, books, bits, width, v, fresh, skipped, out, ends):
    for i in prange(len(ends) - 1):
        _unpack(words, books, bits, width, v, fresh, skipped, out, ends[i], ends[i + 1])
