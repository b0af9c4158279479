"""Products with group-wise integer weights on a CPU, compiled by numba: see `int_group_matmul` for the weight.

    y[n] = sum over g of scale[g, n] * (sum of code[n, k] x[k] - zero[g, n] * sum of x[k]),    k in g

A row's codes are used in the order in which `bitpack` stores them: bits b p + 16 h of word i belong to a column that
depends on (i, p, h) alone. x is put into that order once, x' [field, word], and multiplied by a power of two that
takes the place of the shift:

    sum of code x  =  sum over words i of  sum over fields f of  (word[i] & mask_f) * x'[f, i]

A *chunk* of 16 words is masked, converted and multiplied field by field, all words at once: three instructions for as
many codes as a vector has lanes. Its sums get their groups' scales before they are added up. That loop is written in
the compiler's own language, because no loop that numba is given makes such vectors of it. Planes of a code are summed
one after the other. Groups that are neither whole tiles of 128 columns nor 32 or 64 columns are decoded into the order
of columns instead.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from quantkit.kernels.bitpack import TILE, planes, tail_words_per_lane
from quantkit.kernels.int_group_layout import STORED, middle, zero_of
from quantkit.kernels.numba_words import (
    as_float,
    decode,
    exact,
    exact_parallel,
    fast,
    fast_parallel,
    inlined,
    of_half,
    run,
    words_of,
)  # fmt: skip

FEW = 4
"""Rows of x up to which a product a row takes less time than to write W out."""
LANES = 16
"""Words of a chunk."""
_ROWS = 16
"""Rows of W a thread takes at a time: their scales lie in one line of the cache."""
_F32, _I64 = ir.FloatType(), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(_F32, LANES), ir.VectorType(ir.IntType(32), LANES)
_ANY_ORDER = ("fast",)


class Order(NamedTuple):
    """How a row's words are gone through, plane after plane.

    Attributes:
        columns: int32 [sum of fields * words], the column of each field of each word, in_features for what is none; a
            plane's words are filled up to whole chunks.
        groups: int32 [sum of classes * rest], the group of each class of fields of each word behind the last chunk of
            whole tiles.
        planes: int64 [planes, 5]: width, words, words in chunks of whole tiles, classes of fields that share a scale,
            words filled up.
    """

    columns: Any
    groups: Any
    planes: Any


@lru_cache
def _order(in_features: int, bits: int, group_size: int) -> Order:
    columns, groups, rows = [], [], []
    count = -(-in_features // group_size)
    for width in planes(bits):
        fields, full, left = 16 // width, in_features // TILE, tail_words_per_lane(in_features, width)
        parts = []
        for tiles, per_lane, first in ((full, width, 0), (1 if left else 0, left, full * TILE)):
            tile, lane, r, p, half = torch.meshgrid(
                *(torch.arange(size) for size in (tiles, 4, per_lane, fields, 2)), indexing="ij"
            )
            column = first + TILE * tile + 8 * (fields * r + p) + 2 * lane + half
            parts.append(column.permute(4, 3, 0, 1, 2).reshape(2 * fields, -1))  # field = half * fields + p
        plane = torch.cat(parts, dim=1)
        words, chunked = plane.shape[1], 4 * width * full // LANES * LANES
        filled = -(-words // LANES) * LANES
        plane = torch.nn.functional.pad(plane, (0, filled - words), value=in_features)
        columns.append(plane.where(plane < in_features, in_features).flatten())
        classes = _classes(width, group_size)
        firsts = plane[: fields : fields // classes, chunked:]
        groups.append((firsts // group_size).clamp(max=count - 1).flatten())
        rows.append((width, words, chunked, classes, filled))
    found = (torch.cat(columns).int().numpy(), torch.cat(groups).int().numpy())
    return Order(*found, np.array(rows, np.int64))


def _classes(width: int, group_size: int) -> int:
    """Groups that the fields of a word belong to."""
    return max(1, TILE // width // group_size)


def multiply(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Tensor:
    """x fp32 [M, K] times the weight: fp32 [M, N], by one product a row."""
    y = torch.empty(len(x), len(codes), dtype=torch.float32)
    in_features = x.shape[1]
    stored = group_size in (32, 64) or group_size % TILE == 0 or group_size >= in_features
    group_size = group_size if group_size < in_features else -(-in_features // TILE) * TILE  # whole tiles
    order = _order(in_features, bits, group_size if stored else TILE)
    missing = _ROWS - len(codes)
    if missing > 0:
        scales = torch.nn.functional.pad(scales, (0, missing))
        zeros = zeros if zeros is None or zeros.dim() == 1 else torch.nn.functional.pad(zeros, (0, missing))
    weight = words_of(codes), *_grids(scales, zeros, bits), bits, group_size, stored
    turned, sums = np.empty(len(order.columns), np.float32), np.empty(len(scales), np.float32)
    for row, result in zip(x.detach().contiguous().numpy(), y.numpy(), strict=True):
        _prepare(row, group_size, order.columns, order.planes, turned, sums)
        work = row, *weight, order.groups, order.planes, turned, sums, result
        run(_multiply, _multiply_parallel, len(codes), _ROWS, len(codes) * in_features, *work)
    return y


def unpack(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, out: Tensor, first: int
) -> None:
    """Rows of the weight from `first` on into out, fp32 [rows, K]: the numbers of `dequantized`."""
    work = words_of(codes), *_grids(scales, zeros, bits), bits, group_size, out.numpy(), first
    run(_unpack, _unpack_parallel, len(out), _ROWS, out.numel(), *work)


def _grids(scales: Tensor, zeros: Tensor | None, bits: int) -> tuple[Any, Any, Any]:
    """The bits of scales and of stored zeros, and the zero where none is stored."""
    zero = zero_of(zeros)
    stored = np.empty((0, 0), np.uint16) if zeros is None or zero != STORED else words_of(zeros)
    stored = stored if stored.dtype == np.uint16 else stored.view(np.uint32)
    return words_of(scales), stored, np.float32(middle(bits, zero))


def _load(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    """What lies `offset` numbers of 32 bits behind an address."""
    place = builder.add(address, builder.mul(offset, _I64(4)))
    loaded = builder.load(builder.inttoptr(place, kind.as_pointer()))
    loaded.align = 4
    return loaded


def _same(number: int) -> Any:
    return ir.Constant(_WORDS, [number] * LANES)


def _chunk(builder: Any, words: Any, x: Any, at: Any, stride: Any, width: int, classes: int) -> list[Any]:
    """The sums of codes times x' of each word of a chunk, one vector for each class of fields."""
    fields, chunk, sums = 32 // width, _load(builder, words, at, _WORDS), []
    for c in range(classes):
        total = None
        for p in range(fields // 2 // classes):
            for half in range(2):
                f = c * (fields // 2 // classes) + p + half * (fields // 2)
                if f == fields - 1:  # its sign would be the float's
                    code = builder.lshr(chunk, _same(width * f))
                else:
                    code = builder.and_(chunk, _same(((1 << width) - 1) << (width * f)))
                own = _load(builder, x, builder.add(at, builder.mul(stride, _I64(f))), _FLOATS)
                term = builder.fmul(builder.sitofp(code, _FLOATS), own, flags=_ANY_ORDER)
                total = term if total is None else builder.fadd(total, term, flags=_ANY_ORDER)
        sums.append(total)
    return sums


def _summed(width: int, classes: int, span: int) -> Any:
    """A function (address of words, of x', of scales, chunks, words of the plane) -> fp32: the sum over some chunks.

    Args:
        width: of the plane.
        classes: see `Order`.
        span: columns that share a scale, of which whole tiles have 128 / span each; 0 where the scales are given for
            each class and word, [class, 16 * chunks].
    """
    tiles, scales_a_tile = max(1, LANES // (4 * width)), TILE // span if span else 0  # tiles of a chunk
    many = tiles * scales_a_tile

    def places(c: int) -> list[int]:
        """The scale of each word of a chunk, of those of its tiles."""
        return [
            i // (4 * width) * scales_a_tile + (i % width * (TILE // width) + c * span) // span for i in range(LANES)
        ]

    def scale_vector(builder: Any, scales: Any, index: Any, chunks: Any, c: int) -> Any:
        """The scales of class c of chunk `index`, a lane a word: given as they are, or spread over the words."""
        if not span:
            return _load(
                builder, scales, builder.mul(_I64(LANES), builder.add(index, builder.mul(chunks, _I64(c)))), _FLOATS
            )
        tile = builder.lshr(index, _I64(1)) if width == 8 else index  # of 8-bit codes a chunk is half a tile
        own = _load(builder, scales, builder.mul(tile, _I64(many)), ir.VectorType(_F32, many))
        return builder.shuffle_vector(own, ir.Constant(own.type, ir.Undefined), ir.Constant(_WORDS, places(c)))

    @intrinsic
    def summed(_context, words, x, scales, chunks, stride):
        """The function's type, and what emits its loop over chunks; `stride` is that of x', in numbers."""

        def emit(_context, builder, _signature, arguments):
            words, x, scales, chunks, stride = arguments
            total = cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * LANES))
            with cgutils.for_range(builder, chunks) as loop:
                at = builder.mul(loop.index, _I64(LANES))
                for c, part in enumerate(_chunk(builder, words, x, at, stride, width, classes)):
                    factor = scale_vector(builder, scales, loop.index, chunks, c)
                    scaled = builder.fmul(part, factor, flags=_ANY_ORDER)
                    builder.store(builder.fadd(builder.load(total), scaled, flags=_ANY_ORDER), total)
            kind = ir.FunctionType(_F32, [_F32, _FLOATS])
            reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
            return builder.call(reduce, [_F32(0.0), builder.load(total)], fastmath=_ANY_ORDER)

        address, number = numba.uint64, numba.int64
        return numba.float32(address, address, address, number, number), emit

    return summed


_W8S128, _W8S64, _W8S32, _W8 = (_summed(8, 1, span) for span in (128, 64, 32, 0))
_W4S128, _W4S64, _W4S32, _W4 = (_summed(4, 1, span) for span in (128, 64, 32, 0))
_W2S128, _W2S64, _W2S32 = _summed(2, 1, 128), _summed(2, 1, 64), _summed(2, 2, 32)
_W2, _W2C2 = _summed(2, 1, 0), _summed(2, 2, 0)
_W1S128, _W1S64, _W1S32 = _summed(1, 1, 128), _summed(1, 2, 64), _summed(1, 4, 32)
_W1, _W1C2, _W1C4 = _summed(1, 1, 0), _summed(1, 2, 0), _summed(1, 4, 0)


@fast
def _whole(words, x, scales, chunks, stride, width, span):
    """The sum over chunks of whole tiles."""
    if width == 8:
        if span == 128:
            return _W8S128(words, x, scales, chunks, stride)
        return _W8S64(words, x, scales, chunks, stride) if span == 64 else _W8S32(words, x, scales, chunks, stride)
    if width == 4:
        if span == 128:
            return _W4S128(words, x, scales, chunks, stride)
        return _W4S64(words, x, scales, chunks, stride) if span == 64 else _W4S32(words, x, scales, chunks, stride)
    if width == 2:
        if span == 128:
            return _W2S128(words, x, scales, chunks, stride)
        return _W2S64(words, x, scales, chunks, stride) if span == 64 else _W2S32(words, x, scales, chunks, stride)
    if span == 128:
        return _W1S128(words, x, scales, chunks, stride)
    return _W1S64(words, x, scales, chunks, stride) if span == 64 else _W1S32(words, x, scales, chunks, stride)


@fast
def _rest(words, x, scales, chunks, stride, width, classes):
    """The sum over chunks whose words have scales each."""
    if width == 8:
        return _W8(words, x, scales, chunks, stride)
    if width == 4:
        return _W4(words, x, scales, chunks, stride)
    if width == 2:
        return _W2(words, x, scales, chunks, stride) if classes == 1 else _W2C2(words, x, scales, chunks, stride)
    if classes == 1:
        return _W1(words, x, scales, chunks, stride)
    return _W1C2(words, x, scales, chunks, stride) if classes == 2 else _W1C4(words, x, scales, chunks, stride)


@inlined
def _address(array, offset):
    """The address of a number of 32 bits in an array."""
    return np.uint64(array.ctypes.data) + np.uint64(4 * offset)


@fast
def _row(words, row, scales, tile_scales, span, groups, planes, turned, rest, own):
    """The sum of scale * code * x over a row of W.

    Args:
        scales: of the row's groups.
        tile_scales: those of whole tiles, 128 / span each.
        groups, planes: see `Order`.
        rest, own: scratch for the words behind the last chunk of whole tiles, and for their scales.
    """
    total, start, x_from, groups_from = np.float32(0), 0, 0, 0
    for i in range(len(planes)):
        width, count, chunked, classes, filled = planes[i]
        if chunked:
            place, x = _address(words, row * words.shape[1] + start), _address(turned, x_from)
            total += _whole(place, x, _address(tile_scales, 0), chunked // LANES, filled, width, span)
        left = filled - chunked
        if left:
            for j in range(left):
                rest[j] = words[row, start + chunked + j] if chunked + j < count else np.uint32(0)
            for j in range(classes * left):
                own[j] = scales[groups[groups_from + j]]
            x = _address(turned, x_from + chunked)
            total += _rest(_address(rest, 0), x, _address(own, 0), left // LANES, filled, width, classes)
        x_from += 32 // width * filled
        groups_from += classes * left
        start += count
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
def _prepare(x, group_size, columns, planes, turned, sums):
    """x' of all planes, and the sum of x over each group."""
    at, shift = np.uint64(0), 0
    for i in range(len(planes)):
        width, filled = planes[i, 0], planes[i, 4]
        for f in range(32 // width):
            place = shift - (width * f if f < 32 // width - 1 else 0)
            factor = np.float32(2.0**place)
            for _ in range(filled):
                column = columns[at]
                turned[at] = x[np.uint64(column)] * factor if column < len(x) else np.float32(0)
                at += np.uint64(1)
        shift += width
    for g in range(len(sums)):
        part = np.float32(0)
        for k in range(g * group_size, min((g + 1) * group_size, len(x))):
            part += x[np.uint64(k)]
        sums[g] = part


@inlined
def _zero(zeros, g, row):
    """A stored zero, of the bits of fp16 or fp32."""
    word = np.uint32(zeros[g, row])
    return as_float(word) if zeros.itemsize == 4 else of_half(word)


@fast
def _grid(scales, zeros, zero, first, sums, by_group, offset):
    """The scales of _ROWS rows, [group, row], and what their zeros take off the products."""
    offset[:] = 0
    for g in range(len(scales)):
        own, total = by_group[g], sums[g]
        for j in range(_ROWS):
            own[j] = of_half(scales[g, np.uint64(first + j)])
        if len(zeros):
            for j in range(_ROWS):
                offset[j] += own[j] * _zero(zeros, g, np.uint64(first + j)) * total
        else:
            for j in range(_ROWS):
                offset[j] += own[j] * zero * total


@fast
def _multiply(x, words, scales, zeros, zero, bits, group_size, stored, groups, planes, turned, sums, y, first, last):
    """Outputs from `first` to `last`."""
    in_features, full = len(x), len(x) // 128
    by_group, offset = np.empty((len(scales), _ROWS), np.float32), np.empty(_ROWS, np.float32)
    own = np.empty(len(scales), np.float32)
    tile_scales, per_group = np.empty(full, np.float32), max(1, group_size // 128)
    rest, rest_scales = np.empty(64, np.uint32), np.empty(256, np.float32)
    quads = np.empty(32 * ((in_features + 127) // 128), np.uint64)
    codes = quads.view(np.uint16)
    for start in range(first, last, _ROWS):
        begin = min(start, scales.shape[1] - _ROWS)  # the last rows again, where fewer are left
        _grid(scales, zeros, zero, begin, sums, by_group, offset)
        for row in range(start, min(start + _ROWS, last)):
            j = np.uint64(row - begin)
            for g in range(len(scales)):
                own[g] = by_group[g, j]
            if not stored:
                decode(words[row], bits, in_features, quads)
                total = _plain_row(codes, x, own, group_size)
            elif group_size <= 128:
                total = _row(words, row, own, own, group_size, groups, planes, turned, rest, rest_scales)
            else:
                for tile in range(full):
                    tile_scales[tile] = own[np.uint64(tile // per_group)]
                total = _row(words, row, own, tile_scales, 128, groups, planes, turned, rest, rest_scales)
            y[row] = total - offset[j]


@fast_parallel
def _multiply_parallel(x, words, scales, zeros, zero, bits, group_size, stored, groups, planes, turned, sums, y, ends):
    for i in prange(len(ends) - 1):
        _multiply(
            x,
            words,
            scales,
            zeros,
            zero,
            bits,
            group_size,
            stored,
            groups,
            planes,
            turned,
            sums,
            y,
            ends[i],
            ends[i + 1],
        )


@exact
def _unpack(words, scales, zeros, zero, bits, group_size, out, shift, first, last):
    """Rows from `first` to `last` of `out`, which are those from `shift` on of the weight."""
    in_features = out.shape[1]
    quads = np.empty(32 * ((in_features + 127) // 128), np.uint64)
    codes = quads.view(np.uint16)
    for j in range(first, last):
        row = np.uint64(shift + j)
        decode(words[row], bits, in_features, quads)
        for g in range(len(scales)):
            scale = of_half(scales[g, row])
            here = _zero(zeros, g, row) if len(zeros) else zero
            for k in range(g * group_size, min((g + 1) * group_size, in_features)):
                out[j, np.uint64(k)] = (np.float32(codes[np.uint64(k)]) - here) * scale


@exact_parallel
def _unpack_parallel(words, scales, zeros, zero, bits, group_size, out, shift, ends):
    for i in prange(len(ends) - 1):
        _unpack(words, scales, zeros, zero, bits, group_size, out, shift, ends[i], ends[i + 1])
