"""The Triton kernels behind `int_group_matmul`; that file has the layout, the equations and the regimes.

Codes are multiplied as floats of an offset + code (`tiles`); the offset is taken off again in the accumulator.
"""

import triton
import triton.language as tl

from quantkit.kernels.tiles import (
    chosen_expert,
    column_order,
    dot,
    finish,
    half_operand,
    halves_of_three,
    leave_share,
    mask_or,
    operand,
    pairs_of_codes,
    ragged_codes,
    rotate_right,
    round_to,
    spread,
    sum_of_shares,
)


@triton.jit
def _row_pointers(
    codes_ptr, rows_n, N, words, ARRANGED: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Where the words of rows begin, [BLOCK_N, 1]; rows beyond the last read others, and are not stored."""
    words = tl.multiple_of(words, 4)
    if ARRANGED:
        WIDTH: tl.constexpr = 4 if BITS == 3 else 4 * BITS
        place = tl.minimum(rows_n // 64, (N - 1) // 64) * words + rows_n % 64 * WIDTH
    else:
        place = tl.minimum(rows_n, N - 1) * words
    return codes_ptr + place[:, None]


@triton.jit
def _codes_tile(
    row_ptr, tile, full_tiles, BITS: tl.constexpr, dtype: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr,
    ARRANGED: tl.constexpr, BLOCK_WORDS: tl.constexpr, SPLIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A full tile as floats of offset + code, [BLOCK_N, 128], and, for 8 bits, of offset + the upper 4 bits.

    SPLIT, of 3 bits: its halves, [BLOCK_N, 64] both, the second of offset + 8 * code.
    """
    MAGIC: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
    if ARRANGED:  # a tile is as a weight of one tile is in a checkpoint
        row_ptr += tile * BLOCK_WORDS
        tile, full_tiles = 0, 1
    if BITS == 8:
        words = tl.load(row_ptr + tile * 32 + tl.arange(0, 32)[None, :])
        words = spread(words, BLOCK_N, 8)
        low = operand(mask_or(words, 0x000F000F, MAGIC, ASM), dtype, BLOCK_N, PAIRS)
        high = operand(mask_or(rotate_right(words, 4), 0x000F000F, MAGIC, ASM), dtype, BLOCK_N, PAIRS)
    elif SPLIT:
        first, second = halves_of_three(row_ptr, MAGIC, ASM)
        low = half_operand(first, dtype, BLOCK_N, PAIRS)
        high = half_operand(second, dtype, BLOCK_N, PAIRS)
    else:
        if BITS == 3 and ARRANGED:
            first, second = halves_of_three(row_ptr, 0, ASM)
            pairs = tl.permute(tl.join(first, second >> 3), (0, 1, 5, 2, 3, 4)) | MAGIC
        else:
            pairs = pairs_of_codes(row_ptr, tile, full_tiles, MAGIC, BITS, BLOCK_N, ASM)
        low = operand(pairs, dtype, BLOCK_N, PAIRS)
        high = low
    return low, high


@triton.jit
def _grid_of(
    scales_ptr, zeros_ptr, tile, part, group_size, N, rows_n, words, GROUPS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    ARRANGED: tl.constexpr, BLOCK_WORDS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Scales, and zeros where there are any, [BLOCK_N] of a tile's part that is a group, or belongs to one."""
    if ARRANGED:
        block = tl.minimum(rows_n // 64, (N - 1) // 64)
        place = (block * words + tile * BLOCK_WORDS) * 2 + (512 * BITS + part * 64) + rows_n % 64
        zeros_ptr += GROUPS * 64
    else:
        place = ((tile * 128 + part * (128 // GROUPS)) // group_size).to(tl.int64) * N + rows_n
    scale = tl.load(scales_ptr + place, mask=rows_n < N, other=0.0)
    zero = tl.load(zeros_ptr + place, mask=rows_n < N, other=0.0) if HAS_ZEROS else scale
    return scale, zero


@triton.jit(do_not_specialize=["M"])  # one binary for 1 to BLOCK_M rows
def decode_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, up_ptr, inner_ptr, y_ptr, partial_ptr, arrived_ptr,
    M, N, full_tiles, words, group_size, stride_xm, rank,
    BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, MIDDLE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUPS: tl.constexpr, ARRANGED: tl.constexpr, BLOCK_WORDS: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Few rows of x: BLOCK_N rows of W times BLOCK_M rows of x over one of SPLIT_K shares of K's tiles of 128.

    Codes are multiplied as they are; scale and zero are applied to each group's accumulator. A tile holds GROUPS
    groups (1: a group is whole tiles). Shares leave fp32 partial sums; the last to arrive adds them in order.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    SPLIT: tl.constexpr = BITS == 3 and ARRANGED  # a tile's halves are multiplied by themselves
    WIDTH: tl.constexpr = 64 if SPLIT else 128
    PARTS: tl.constexpr = GROUPS * WIDTH // 128 if GROUPS * WIDTH > 128 else 1
    tile_n, tile_m, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ptr = _row_pointers(codes_ptr, rows_n, N, words, ARRANGED, BITS, BLOCK_N)
    columns = column_order(PAIRS, WIDTH)
    x_row_ptr = x_ptr + tl.minimum(rows_m, M - 1)[None, :] * stride_xm + columns[:, None]
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    per_share = tl.cdiv(full_tiles, SPLIT_K)
    first, last = share * per_share, tl.minimum((share + 1) * per_share, full_tiles)
    # A group's scale and zero are read while the group before is multiplied: nothing else hides their latency.
    next_scale, next_zero = _grid_of(
        scales_ptr, zeros_ptr, tl.minimum(first, full_tiles - 1), 0, group_size, N, rows_n, words, GROUPS, HAS_ZEROS,
        ARRANGED, BLOCK_WORDS, BITS,
    )  # fmt: skip
    for tile in range(first, last):
        low, high = _codes_tile(
            row_ptr, tile, full_tiles, BITS, dtype, BLOCK_N, PAIRS, ARRANGED, BLOCK_WORDS, SPLIT, ASM
        )
        scale, zero = next_scale, next_zero
        for half in tl.static_range(128 // WIDTH):
            x = tl.load(x_row_ptr + tile * 128 + half * WIDTH)
            codes = low
            if half > 0:
                codes = high
            for part in tl.static_range(PARTS):
                if half * PARTS + part < GROUPS:
                    scale, zero = next_scale, next_zero
                    following = tile
                    if half * PARTS + part + 1 == GROUPS:
                        following = tl.minimum(tile + 1, full_tiles - 1)
                    next_scale, next_zero = _grid_of(
                        scales_ptr, zeros_ptr, following, (half * PARTS + part + 1) % GROUPS, group_size, N, rows_n,
                        words, GROUPS, HAS_ZEROS, ARRANGED, BLOCK_WORDS, BITS,
                    )  # fmt: skip
                x_part = x
                if PARTS > 1:
                    x_part = tl.where((columns * PARTS // WIDTH == part)[:, None], x, tl.zeros_like(x))
                product = _of_group(
                    codes, high, x_part, zero, BLOCK_M, BLOCK_N, BITS, half, HAS_ZEROS, MIDDLE, INTERPRETED
                )
                accumulator += scale.to(tl.float32)[:, None] * product
    if SPLIT_K > 1:
        where = tile_n * tl.num_programs(1) + tile_m
        exist = (rows_m < M)[None, :]
        if leave_share(accumulator, partial_ptr, arrived_ptr, where, share, SPLIT_K, BLOCK_N, BLOCK_M, exist):
            return
        accumulator = sum_of_shares(partial_ptr, arrived_ptr, where, SPLIT_K, BLOCK_N, BLOCK_M, exist)
    finish(
        accumulator, bias_ptr, up_ptr, inner_ptr, y_ptr, rows_n, rows_m, M, N, rank,
        HAS_BIAS, BLOCK_R, INTERPRETED, INTERPRETED,
    )  # fmt: skip


@triton.jit
def _of_group(
    codes, high, x, zero, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr,
    HAS_ZEROS: tl.constexpr, MIDDLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """(code - zero) @ x of the columns where x is not 0, fp32 [BLOCK_N, BLOCK_M]; HALF 1 holds codes times 8."""
    MAGIC: tl.constexpr = 128.0 if x.dtype == tl.bfloat16 else 1024.0
    TIMES: tl.constexpr = 8.0 if HALF else 1.0
    OFFSET: tl.constexpr = MAGIC * (17 if BITS == 8 else 1) / TIMES + (0.0 if HAS_ZEROS else MIDDLE)
    x_sum = tl.sum(x.to(tl.float32), axis=0)[None, :]
    empty = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    product = dot(codes, x, empty, INTERPRETED)
    if BITS == 8:
        product += dot(high, x, empty, INTERPRETED) * 16
    if HALF:
        product *= 1 / TIMES
    product -= OFFSET * x_sum
    if HAS_ZEROS:
        product -= zero.to(tl.float32)[:, None] * x_sum
    return product


@triton.jit
def _weight_tile(
    codes_ptr, scales_ptr, zeros_ptr, rows_n, tile, N, K, words, group_size, dtype: tl.constexpr,
    BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, MIDDLE: tl.constexpr, WHOLE_GROUPS: tl.constexpr, TAIL: tl.constexpr,
    GROUPS: tl.constexpr, ARRANGED: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The dequantized weight [BLOCK_N, 128] of any tile: (code - zero) * scale in fp32, rounded to dtype.

    WHOLE_GROUPS: no group ends inside a tile. Where the last tile is short (TAIL columns), all are read field by field.
    Columns stand in the order of `column_order(PAIRS)`.
    """
    full_tiles = K // 128
    k = column_order(PAIRS)
    column = tile * 128 + k
    in_k = column < K
    in_n = rows_n < N
    row_ptr = _row_pointers(codes_ptr, rows_n, N, words, ARRANGED, BITS, BLOCK_N)
    if TAIL == 0:
        narrow: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
        OFFSET: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
        low, high = _codes_tile(
            row_ptr, tile, full_tiles, BITS, narrow, BLOCK_N, PAIRS, ARRANGED, BLOCK_WORDS, False, ASM
        )
        code = low.to(tl.float32) - (OFFSET if HAS_ZEROS else OFFSET + MIDDLE)  # exact either way
        if BITS == 8:
            code += (high.to(tl.float32) - OFFSET) * 16
    else:
        code = ragged_codes(row_ptr, k, tile, K, BITS, TAIL).to(tl.float32) - (0.0 if HAS_ZEROS else MIDDLE)
    if ARRANGED:
        block = tl.minimum(rows_n // 64, (N - 1) // 64)
        place = ((block * words + tile * BLOCK_WORDS) * 2 + 512 * BITS + rows_n % 64)[:, None]
        inside = in_n[:, None]
        if GROUPS > 1:
            place += (k * GROUPS // 128 * 64)[None, :]
            inside = inside & in_k[None, :]
        zeros_ptr += GROUPS * 64
    elif WHOLE_GROUPS:
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
    BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, MIDDLE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr, TAIL: tl.constexpr, GROUPS: tl.constexpr, ARRANGED: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
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
            BITS, HAS_ZEROS, MIDDLE, WHOLE_GROUPS, TAIL, GROUPS, ARRANGED, BLOCK_WORDS, BLOCK_N, PAIRS, ASM,
            INTERPRETED,
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
    BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, MIDDLE: tl.constexpr, WHOLE_GROUPS: tl.constexpr, TAIL: tl.constexpr,
    GROUPS: tl.constexpr, ARRANGED: tl.constexpr, BLOCK_WORDS: tl.constexpr, BLOCK_N: tl.constexpr,
    ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """W [N, K] in weight_ptr's type; one program a tile of 128 columns and BLOCK_N rows."""
    rows_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    weight = _weight_tile(
        codes_ptr, scales_ptr, zeros_ptr, rows_n, tile, N, K, words, group_size, weight_ptr.dtype.element_ty,
        BITS, HAS_ZEROS, MIDDLE, WHOLE_GROUPS, TAIL, GROUPS, ARRANGED, BLOCK_WORDS, BLOCK_N, 2, ASM, INTERPRETED,
    )  # fmt: skip
    column = tile * 128 + tl.arange(0, 128)
    inside = (rows_n < N)[:, None] & (column < K)[None, :]
    tl.store(weight_ptr + rows_n[:, None] * K + column[None, :], weight, mask=inside)


@triton.jit
def experts_kernel(
    x_ptr, chosen_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr, partial_ptr, arrived_ptr,
    experts, N, full_tiles, words, group_size, stride_xm, codes_each, scales_each,
    PER_ROW: tl.constexpr, BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, MIDDLE: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr,
    ARRANGED: tl.constexpr, BLOCK_WORDS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[p] = x[p // PER_ROW] @ W[chosen[p]]^T + bias[chosen[p]] of a stack; a program BLOCK_N rows of W and one p."""
    pair, expert = chosen_expert(chosen_ptr, experts)
    scales = expert.to(tl.int64) * scales_each
    row = pair.to(tl.int64) * BLOCK_M  # which the kernel takes for its first of M rows
    decode_kernel(
        x_ptr + (pair // PER_ROW).to(tl.int64) * stride_xm, codes_ptr + expert.to(tl.int64) * codes_each,
        scales_ptr + scales, zeros_ptr + scales, bias_ptr + expert.to(tl.int64) * N, y_ptr, y_ptr,
        y_ptr + (pair - row) * N, partial_ptr, arrived_ptr, row + 1, N, full_tiles, words, group_size, 0, 0,
        BITS, HAS_ZEROS, MIDDLE, HAS_BIAS, 0, GROUPS, ARRANGED, BLOCK_WORDS, SPLIT_K, BLOCK_M, BLOCK_N, PAIRS, ASM,
        INTERPRETED,
    )  # fmt: skip
