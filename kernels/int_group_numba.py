"""Products with group-wise integer weights on a CPU, compiled by numba: see `int_group_matmul` for the weight.

    y[n] = sum over g of scale[g, n] * (sum of code[n, k] x[k] - zero[g, n] * sum of x[k]),    k in g

A row's codes are used in the order in which `bitpack` stores them: bits b p + 16 h of word i belong to a column that
depends on (i, p, h) alone. x is put into that order once, x' [field, word], and multiplied by a power of two that
takes the place of the shift:

    sum of code x  =  sum over words i of  sum over fields f of  (word[i] & mask_f) * x'[f, i]

so that a loop over a whole row loads a vector of words, and masks, converts and adds it a field: three instructions for
8 or 16 weights. Planes of a code are summed one after the other. A group's scale is written out for each word of the
row. Groups that are neither whole tiles of 128 columns nor 32 or 64 columns are decoded into the order of columns.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.kernels.bitpack import TILE, planes, tail_words_per_lane
from quantkit.kernels.numba_words import (
    both,
    decode,
    exact,
    fast,
    inlined,
    of_half,
    run,
    shl,
    shr,
    tail_words,
    words_of,
)  # fmt: skip

FEW = 6
"""Rows of x up to which a product a row takes less time than to write W out."""
_ROWS = 16
"""Rows of W a thread takes at a time: their scales lie in one line of the cache."""


@lru_cache
def _columns(in_features: int, bits: int) -> Any:
    """int32: the column of each field of each word, plane after plane [field, word]; in_features for what is none."""
    found = []
    for width in planes(bits):
        fields, full, left = 16 // width, in_features // TILE, tail_words_per_lane(in_features, width)
        parts = []
        for tiles, per_lane, first in ((full, width, 0), (1 if left else 0, left, full * TILE)):
            tile, lane, r, p, half = torch.meshgrid(
                *(torch.arange(size) for size in (tiles, 4, per_lane, fields, 2)), indexing="ij"
            )
            column = first + TILE * tile + 8 * (fields * r + p) + 2 * lane + half
            parts.append(column.permute(4, 3, 0, 1, 2).reshape(2 * fields, -1))  # field = half * fields + p
        columns = torch.cat(parts, dim=1)
        found.append(columns.where(columns < in_features, in_features).flatten())
    return torch.cat(found).to(torch.int32).numpy()


def multiply(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Tensor:
    """x fp32 [M, K] times the weight: fp32 [M, N], by one product a row."""
    y = torch.empty(len(x), len(codes), dtype=torch.float32)
    in_features = x.shape[1]
    stored = group_size in (32, 64) or group_size % TILE == 0 or group_size >= in_features
    group_size = group_size if group_size < in_features else -(-in_features // TILE) * TILE  # whole tiles
    weight = words_of(codes), *_grids(scales, zeros), bits, group_size, stored
    columns = _columns(in_features, bits)
    turned, sums = np.empty(len(columns), np.float32), np.empty(len(scales), np.float32)
    for row, result in zip(x.detach().contiguous().numpy(), y.numpy(), strict=True):
        _prepare(row, bits, group_size, columns, turned, sums)
        run(_multiply, len(codes), _ROWS, len(codes) * in_features, row, *weight, turned, sums, result)
    return y


def unpack(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, out: Tensor, first: int
) -> None:
    """Rows of the weight from `first` on into out, fp32 [rows, K]: the numbers of `dequantized`."""
    weight = words_of(codes), *_grids(scales, zeros), bits, group_size
    run(_unpack, len(out), _ROWS, out.numel(), *weight, out.numpy(), first)


def _grids(scales: Tensor, zeros: Tensor | None) -> tuple[Any, Any]:
    return words_of(scales), np.empty((0, 0), np.uint16) if zeros is None else words_of(zeros)


@fast
def _spread(scales, width, classes, in_features, group_size, spread):
    """A row's scale for each word of a plane and each class of its fields that share one: [class, word]."""
    columns, full, left = 128 // width, in_features // 128, tail_words(in_features, width)  # of a word a lane
    per_group = group_size // 128  # tiles
    at = np.uint64(0)
    for c in range(classes):
        for g in range(len(scales) if group_size >= 128 else 0):
            scale, end = scales[g], min(per_group * (g + 1), full)
            for _ in range(4 * width * (end - per_group * g)):
                spread[at] = scale
                at += np.uint64(1)
        for tile in range(full if group_size < 128 else 0):
            for r in range(width):
                scale = scales[np.uint64((128 * tile + columns * r) // group_size + c)]
                for lane in range(4):
                    spread[at + np.uint64(lane * width + r)] = scale
            at += np.uint64(4 * width)
        for _ in range(4):
            for r in range(left):
                group = (128 * full + columns * r) // group_size + c
                spread[at] = scales[np.uint64(min(group, len(scales) - 1))]
                at += np.uint64(1)


@inlined
def _sum(words, start, count, turned, first, spread, width, classes):
    """The sum over a plane's words, from `start` on, of codes times x' and scales."""
    fields, mask = 32 // width, np.uint32((1 << width) - 1)
    total = np.float32(0)
    for i in range(count):
        word = words[np.uint64(start + i)]
        for c in range(classes):
            part = np.float32(0)
            for p in range(fields // 2 // classes):
                for half in range(2):
                    f = c * (fields // 2 // classes) + p + half * (fields // 2)
                    if f == fields - 1:  # its sign would be the float's
                        code = shr(word, np.uint32(width * f))
                    else:
                        code = both(word, shl(mask, np.uint32(width * f)))
                    part += np.float32(np.int32(code)) * turned[np.uint64(first + f * count + i)]
            total += part * spread[np.uint64(c * count + i)]
    return total


@fast
def _sum_of(words, start, count, turned, first, spread, width, classes):
    """`_sum`, compiled for each width and number of classes."""
    if width == 8:
        return _sum(words, start, count, turned, first, spread, 8, 1)
    if width == 4:
        return _sum(words, start, count, turned, first, spread, 4, 1)
    if width == 2:
        if classes == 1:
            return _sum(words, start, count, turned, first, spread, 2, 1)
        return _sum(words, start, count, turned, first, spread, 2, 2)
    if classes == 1:
        return _sum(words, start, count, turned, first, spread, 1, 1)
    if classes == 2:
        return _sum(words, start, count, turned, first, spread, 1, 2)
    return _sum(words, start, count, turned, first, spread, 1, 4)


@fast
def _row(words, bits, scales, in_features, group_size, turned, spread):
    """The sum of scale * code * x over a row of W."""
    total, start, first = np.float32(0), 0, 0
    for width in (8, 4, 2, 1):
        if bits & width:
            count = 4 * (in_features // 128 * width + tail_words(in_features, width))
            classes = max(1, 128 // width // group_size)
            _spread(scales, width, classes, in_features, group_size, spread)
            total += _sum_of(words, start, count, turned, first, spread, width, classes)
            start += count
            first += 32 // width * count
    return total


@fast
def _plain_row(codes, x, scales, group_size):
    """As `_row`, of codes in the order of columns."""
    total = np.float32(0)
    for g in range(len(scales)):
        part = np.float32(0)
        for k in range(g * group_size, min((g + 1) * group_size, len(x))):
            part += np.float32(codes[np.uint64(k)]) * x[np.uint64(k)]
        total += part * scales[g]
    return total


@fast
def _prepare(x, bits, group_size, columns, turned, sums):
    """x' of all planes, and the sum of x over each group."""
    start = shift = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            words = 4 * (len(x) // 128 * width + tail_words(len(x), width))
            for f in range(32 // width):
                place = shift - (width * f if f < 32 // width - 1 else 0)
                factor = np.float32(2.0**place)
                for at in range(start, start + words):
                    column = columns[np.uint64(at)]
                    turned[np.uint64(at)] = x[np.uint64(column)] * factor if column < len(x) else np.float32(0)
                start += words
            shift += width
    for g in range(len(sums)):
        part = np.float32(0)
        for k in range(g * group_size, min((g + 1) * group_size, len(x))):
            part += x[np.uint64(k)]
        sums[g] = part


@fast
def _grid(scales, zeros, bits, first, rows, sums, own, offset):
    """The scales of some rows, [row, group], and what their zeros take off the products."""
    offset[:] = 0
    for g in range(len(scales)):
        for j in range(rows):
            own[np.uint64(j), g] = of_half(scales[g, np.uint64(first + j)])
        if len(zeros):
            for j in range(rows):
                offset[np.uint64(j)] += own[np.uint64(j), g] * of_half(zeros[g, np.uint64(first + j)]) * sums[g]
        else:
            for j in range(rows):
                offset[np.uint64(j)] += own[np.uint64(j), g] * np.float32((2**bits - 1) / 2) * sums[g]


@fast
def _multiply(x, words, scales, zeros, bits, group_size, stored, turned, sums, y, first, last):
    """Outputs from `first` to `last`."""
    in_features = len(x)
    own, offset = np.empty((_ROWS, len(scales)), np.float32), np.empty(_ROWS, np.float32)
    spread = np.empty(4 * words.shape[1] + 16, np.float32)
    quads = np.empty(32 * ((in_features + 127) // 128), np.uint64)
    codes = quads.view(np.uint16)
    for start in range(first, last, _ROWS):
        rows = min(_ROWS, last - start)
        _grid(scales, zeros, bits, start, rows, sums, own, offset)
        for j in range(rows):
            if stored:
                total = _row(words[start + j], bits, own[j], in_features, group_size, turned, spread)
            else:
                decode(words[start + j], bits, in_features, quads)
                total = _plain_row(codes, x, own[j], group_size)
            y[start + j] = total - offset[j]


@exact
def _unpack(words, scales, zeros, bits, group_size, out, shift, first, last):
    """Rows from `first` to `last` of `out`, which are those from `shift` on of the weight."""
    in_features = out.shape[1]
    quads = np.empty(32 * ((in_features + 127) // 128), np.uint64)
    codes = quads.view(np.uint16)
    zero = np.float32((2**bits - 1) / 2)
    for j in range(first, last):
        row = np.uint64(shift + j)
        decode(words[row], bits, in_features, quads)
        for g in range(len(scales)):
            scale = of_half(scales[g, row])
            if len(zeros):
                zero = of_half(zeros[g, row])
            for k in range(g * group_size, min((g + 1) * group_size, in_features)):
                out[j, np.uint64(k)] = (np.float32(codes[np.uint64(k)]) - zero) * scale
