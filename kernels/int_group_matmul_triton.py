"""The Triton kernels behind `int_group_matmul`; that file has the layout, the equations and the regimes.

Codes are multiplied as floats of an offset + code (`tiles`); the offset is taken off again in the accumulator.
"""

import triton
import triton.language as tl

from quantkit.kernels.tiles import (
    column_order,
    dot,
    finish,
    mask_or,
    operand,
    pairs_of_codes,
    ragged_codes,
    rotate_right,
    round_to,
    spread,
)


@triton.jit
def _codes_tile(
    row_ptr, tile, full_tiles, BITS: tl.constexpr, dtype: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """A full tile as floats [BLOCK_N, 128] of offset + code, and, for 8 bits, of offset + the upper 4 bits."""
    MAGIC: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
    if BITS == 8:
        words = tl.load(row_ptr + tile * 32 + tl.arange(0, 32)[None, :])
        words = spread(words, BLOCK_N, 8)
        low = operand(mask_or(words, 0x000F000F, MAGIC, ASM), dtype, BLOCK_N, PAIRS)
        high = operand(mask_or(rotate_right(words, 4), 0x000F000F, MAGIC, ASM), dtype, BLOCK_N, PAIRS)
    else:
        pairs = pairs_of_codes(row_ptr, tile, full_tiles, MAGIC, BITS, BLOCK_N, ASM)
        low = operand(pairs, dtype, BLOCK_N, PAIRS)
        high = low
    return low, high


@triton.jit
def _grid_of(scales_ptr, zeros_ptr, column, group_size, N, rows_n, HAS_ZEROS: tl.constexpr):
    """Scales, and zeros where there are any, [BLOCK_N] of the group that holds a column."""
    place = (column // group_size).to(tl.int64) * N + rows_n
    scale = tl.load(scales_ptr + place, mask=rows_n < N, other=0.0)
    zero = tl.load(zeros_ptr + place, mask=rows_n < N, other=0.0) if HAS_ZEROS else scale
    return scale, zero


@triton.jit(do_not_specialize=["M"])  # one binary for 1 to BLOCK_M rows
def decode_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, up_ptr, inner_ptr, y_ptr, partial_ptr, arrived_ptr,
    M, N, full_tiles, words, group_size, stride_xm, rank,
    BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUPS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAIRS: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Few rows of x: BLOCK_N rows of W times BLOCK_M rows of x over one of SPLIT_K shares of K's tiles of 128.

    Codes are multiplied as they are; scale and zero are applied to each group's accumulator. A tile holds GROUPS
    groups (1: a group is whole tiles). Shares leave fp32 partial sums; the last to arrive adds them in order.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    MAGIC: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
    OFFSET: tl.constexpr = MAGIC * (17 if BITS == 8 else 1) + (0.0 if HAS_ZEROS else (2**BITS - 1) / 2)
    tile_n, tile_m, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    words = tl.multiple_of(words, 4)
    row_ptr = codes_ptr + tl.minimum(rows_n, N - 1)[:, None] * words  # rows beyond the last are not stored
    columns = column_order(PAIRS)
    x_row_ptr = x_ptr + tl.minimum(rows_m, M - 1)[None, :] * stride_xm + columns[:, None]
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    per_share = tl.cdiv(full_tiles, SPLIT_K)
    first, last = share * per_share, tl.minimum((share + 1) * per_share, full_tiles)
    # A group's scale and zero are read while the group before is multiplied: nothing else hides their latency.
    next_scale, next_zero = _grid_of(scales_ptr, zeros_ptr, first * 128, group_size, N, rows_n, HAS_ZEROS)
    for tile in range(first, last):
        x = tl.load(x_row_ptr + tile * 128)
        low, high = _codes_tile(row_ptr, tile, full_tiles, BITS, dtype, BLOCK_N, PAIRS, ASM)
        for part in tl.static_range(GROUPS):
            scale, zero = next_scale, next_zero
            following = tl.minimum(tile * 128 + (part + 1) * (128 // GROUPS), full_tiles * 128 - 1)
            next_scale, next_zero = _grid_of(scales_ptr, zeros_ptr, following, group_size, N, rows_n, HAS_ZEROS)
            x_part = x if GROUPS == 1 else tl.where((columns * GROUPS // 128 == part)[:, None], x, tl.zeros_like(x))
            x_sum = tl.sum(x_part.to(tl.float32), axis=0)[None, :]
            empty = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            product = dot(low, x_part, empty, INTERPRETED)
            if BITS == 8:
                product += dot(high, x_part, empty, INTERPRETED) * 16
            product -= OFFSET * x_sum
            if HAS_ZEROS:
                product -= zero.to(tl.float32)[:, None] * x_sum
            accumulator += scale.to(tl.float32)[:, None] * product
    if SPLIT_K > 1:
        where = tile_n * tl.num_programs(1) + tile_m
        place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        partial_ptr += where.to(tl.int64) * (SPLIT_K * BLOCK_N * BLOCK_M) + place
        tl.store(partial_ptr + share * (BLOCK_N * BLOCK_M), accumulator)
        tl.debug_barrier()  # all of this share is written before it is counted
        if tl.atomic_add(arrived_ptr + where, 1, sem="acq_rel") != SPLIT_K - 1:
            return
        tl.store(arrived_ptr + where, 0)  # ready for the next launch
        accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for other in range(SPLIT_K):
            accumulator += tl.load(partial_ptr + other * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
    finish(
        accumulator, bias_ptr, up_ptr, inner_ptr, y_ptr, rows_n, rows_m, M, N, rank,
        HAS_BIAS, BLOCK_R, INTERPRETED, INTERPRETED,
    )  # fmt: skip


@triton.jit
def _weight_tile(
    codes_ptr, scales_ptr, zeros_ptr, rows_n, tile, N, K, words, group_size, dtype: tl.constexpr,
    BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, WHOLE_GROUPS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The dequantized weight [BLOCK_N, 128] of any tile: (code - zero) * scale in fp32, rounded to dtype.

    WHOLE_GROUPS: no group ends inside a tile. Where the last tile is short (TAIL columns), all are read field by field.
    Columns stand in the order of `column_order(PAIRS)`.
    """
    ZERO: tl.constexpr = (2**BITS - 1) / 2
    full_tiles = K // 128
    k = column_order(PAIRS)
    column = tile * 128 + k
    in_k = column < K
    in_n = rows_n < N
    words = tl.multiple_of(words, 4)
    row_ptr = codes_ptr + tl.minimum(rows_n, N - 1)[:, None] * words
    if TAIL == 0:
        narrow: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
        OFFSET: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
        low, high = _codes_tile(row_ptr, tile, full_tiles, BITS, narrow, BLOCK_N, PAIRS, ASM)
        code = low.to(tl.float32) - (OFFSET if HAS_ZEROS else OFFSET + ZERO)  # exact either way
        if BITS == 8:
            code += (high.to(tl.float32) - OFFSET) * 16
    else:
        code = ragged_codes(row_ptr, k, tile, K, BITS, TAIL).to(tl.float32) - (0.0 if HAS_ZEROS else ZERO)
    if WHOLE_GROUPS:
        place = (tile * 128 // group_size).to(tl.int64) * N + rows_n[:, None]
        inside = in_n[:, None]
    else:
        place = (column // group_size).to(tl.int64)[None, :] * N + rows_n[:, None]
        inside = in_n[:, None] & in_k[None, :]
    scale = tl.load(scales_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_ZEROS:
        code -= tl.load(zeros_ptr + place, mask=inside, other=0.0).to(tl.float32)
    return round_to(code * scale, dtype, INTERPRETED)


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, up_ptr, inner_ptr, y_ptr,
    M, N, K, words, group_size, stride_xm, rank,
    BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """More rows of x, and every shape: BLOCK_N rows of W, dequantized in registers, times BLOCK_M rows of x.

    W is the left operand, so that its fragments need not go through shared memory.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    UPCAST: tl.constexpr = INTERPRETED or dtype == tl.float32
    rows_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = column_order(PAIRS)
    x_row_ptr = x_ptr + tl.minimum(rows_m, M - 1)[None, :] * stride_xm + k[:, None]
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for tile in range(0, tl.cdiv(K, 128)):
        weight = _weight_tile(
            codes_ptr, scales_ptr, zeros_ptr, rows_n, tile, N, K, words, group_size, dtype,
            BITS, HAS_ZEROS, WHOLE_GROUPS, TAIL, BLOCK_N, PAIRS, ASM, INTERPRETED,
        )  # fmt: skip
        if TAIL == 0:
            x = tl.load(x_row_ptr + tile * 128)
        else:
            x = tl.load(x_row_ptr + tile * 128, mask=(tile * 128 + k < K)[:, None], other=0.0)
        accumulator = dot(weight, x, accumulator, UPCAST)
    finish(
        accumulator, bias_ptr, up_ptr, inner_ptr, y_ptr, rows_n, rows_m, M, N, rank,
        HAS_BIAS, BLOCK_R, INTERPRETED, UPCAST,
    )  # fmt: skip


@triton.jit
def dequantize_kernel(
    codes_ptr, scales_ptr, zeros_ptr, weight_ptr, N, K, words, group_size,
    BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, WHOLE_GROUPS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """W [N, K] in weight_ptr's type; one program a tile of 128 columns and BLOCK_N rows."""
    rows_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    weight = _weight_tile(
        codes_ptr, scales_ptr, zeros_ptr, rows_n, tile, N, K, words, group_size, weight_ptr.dtype.element_ty,
        BITS, HAS_ZEROS, WHOLE_GROUPS, TAIL, BLOCK_N, 2, ASM, INTERPRETED,
    )  # fmt: skip
    column = tile * 128 + tl.arange(0, 128)
    inside = (rows_n < N)[:, None] & (column < K)[None, :]
    tl.store(weight_ptr + rows_n[:, None] * K + column[None, :], weight, mask=inside)
