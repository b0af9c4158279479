"""The Triton kernels behind `pyramid_matmul` and `pyramid_table_matmul`; that file has layouts, equations and regimes.

Weights are formed in registers and rounded once. In 16-bit types two are formed at a time, as halves of a word:

    fp16    (1024 + code) - (1024 + zero), times the factor, which is fp16 itself
    bf16    u = (128 + code) - (128 + zero), then fma(u, high, u * low) with the factor as the sum of two bf16: `low`
            has 2 significant bits and u at most 6, so that u * low is exact and the fma rounds the true product
"""

import triton
import triton.language as tl

from quantkit.kernels.tiles import (
    column_order,
    dot,
    finish,
    in_columns,
    leave_share,
    operand,
    pairs_of_codes,
    ragged_codes,
    round_to,
    row_order,
    sum_of_shares,
)


@triton.constexpr_function
def _split_text(high: str, low: str, factors: str) -> str:
    """PTX: a pair of fp16 as two pairs of bf16, the nearest ones and what is left, exactly."""
    text = ".reg .b16 ha, hb; .reg .f32 fa, fb, fp, fq; .reg .b32 ft; "
    text += f"mov.b32 {{ha, hb}}, {factors}; cvt.f32.f16 fa, ha; cvt.f32.f16 fb, hb; cvt.rn.bf16x2.f32 {high}, fb, fa; "
    text += f"shl.b32 ft, {high}, 16; mov.b32 fp, ft; and.b32 ft, {high}, 0xFFFF0000; mov.b32 fq, ft; "
    return text + f"sub.f32 fa, fa, fp; sub.f32 fb, fb, fq; cvt.rn.bf16x2.f32 {low}, fb, fa; "


@triton.jit
def split_factors(words):
    """Pairs of fp16 as two pairs of bf16 (inline assembly)."""
    TEXT: tl.constexpr = "{ " + _split_text("$0", "$1", "$2") + "}"
    return tl.inline_asm_elementwise(TEXT, "=&r,=&r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)


@triton.jit
def fma_bf16(a, b, c):
    """Pairs of bf16 (inline assembly): a * b + c, rounded once; sm_80 has no other arithmetic on them."""
    return tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def scaled(pairs, high, low, ZERO: tl.constexpr, dtype: tl.constexpr):
    """Pairs of magic + code -> pairs of (code - ZERO) * factor in dtype, rounded once (inline assembly)."""
    if dtype == tl.bfloat16:
        ONES: tl.constexpr = 0x3F803F80
        MINUS_ZERO: tl.constexpr = -0x7FFF8000  # in both halves
        pairs = fma_bf16(pairs, ONES, (0x43004300 | ZERO * 0x10001) + MINUS_ZERO)
        pairs = fma_bf16(pairs, high, fma_bf16(pairs, low, MINUS_ZERO))
    else:
        pairs = tl.inline_asm_elementwise(
            "{ .reg .b32 u; sub.rn.f16x2 u, $1, $3; mul.rn.f16x2 $0, u, $2; }",
            "=r,r,r,r", [pairs, high, 0x64006400 | ZERO * 0x10001], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return pairs


@triton.jit
def half(words, WHICH: tl.constexpr):
    """The fp16 in one half of each word, as fp32."""
    return (words >> (16 * WHICH)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _over_rows(words, RUN: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """A word per RUN neighbouring rows and pair of columns, [BLOCK_N / RUN, 64] -> [BLOCK_N, lane, o3, o2, o1, o0]."""
    REPEATS: tl.constexpr = BLOCK_N // (16 * WARPS)
    HALVES: tl.constexpr = 2 if RUN == 1 else 1
    RUNS: tl.constexpr = REPEATS if RUN == 1 else 2 * REPEATS // RUN
    words = tl.reshape(words, (WARPS, 8, RUNS, 1, HALVES, 64))
    words = tl.permute(words, (2, 3, 0, 4, 1, 5))
    words = tl.broadcast_to(words, (RUNS, REPEATS // RUNS, WARPS, 2, 8, 64))
    return tl.reshape(words, (BLOCK_N, 4, 2, 2, 2, 2))


@triton.jit
def _factored_tile(
    row_ptr, run_ptr, tile, tiles, dtype: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The weight [BLOCK_N, 128] of a tile, (code - zero) * factor; rows as `row_order`, columns as `column_order`."""
    ZERO: tl.constexpr = 2 ** (BITS - 1)
    words = tl.load(run_ptr + tile * 64 + tl.arange(0, 64)[None, :])
    if ASM and (dtype == tl.float16 or (dtype == tl.bfloat16 and BITS < 8)):
        MAGIC: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
        pairs = pairs_of_codes(row_ptr, tile, tiles, MAGIC, BITS, BLOCK_N, ASM)
        high, low = split_factors(words) if dtype == tl.bfloat16 else (words, words)
        high = _over_rows(high, RUN, BLOCK_N, WARPS)
        low = _over_rows(low, RUN, BLOCK_N, WARPS) if dtype == tl.bfloat16 else high
        weight = operand(scaled(pairs, high, low, ZERO, dtype), dtype, BLOCK_N, PAIRS)
    else:
        pairs = pairs_of_codes(row_ptr, tile, tiles, 0, BITS, BLOCK_N, ASM)
        words = _over_rows(words, RUN, BLOCK_N, WARPS)
        even = ((pairs & 0xFFFF) - ZERO).to(tl.float32) * half(words, 0)
        odd = ((pairs >> 16) - ZERO).to(tl.float32) * half(words, 1)
        weight = round_to(in_columns(even, odd, BLOCK_N, PAIRS), dtype, INTERPRETED)
    return weight


@triton.jit
def _addresses(
    codes_ptr, factors_ptr, rows_n, first_row, N, words, factor_words, dimension, RUN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where the rows of a program begin, and the factors of each RUN of rows; rows beyond the last read the last."""
    words, factor_words = tl.multiple_of(words, 4), tl.multiple_of(factor_words, 4)
    runs = tl.minimum(first_row + tl.arange(0, BLOCK_N // RUN) * RUN, N - 1) // dimension
    return codes_ptr + tl.minimum(rows_n, N - 1)[:, None] * words, factors_ptr + runs[:, None] * factor_words


@triton.jit(do_not_specialize=["M"])  # one binary for 1 to BLOCK_M rows
def factored_kernel(
    x_ptr, codes_ptr, factors_ptr, bias_ptr, up_ptr, inner_ptr, y_ptr, partial_ptr, arrived_ptr,
    M, N, K, tiles, words, factor_words, dimension, stride_xm, rank,
    BITS: tl.constexpr, RUN: tl.constexpr, RAGGED: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr,
    WARPS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr,
    ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Few rows of x: BLOCK_N rows of W times BLOCK_M rows of x over one of SPLIT_K shares of K's tiles of 128.

    Shares leave fp32 partial sums; the last to arrive adds them in order.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    UPCAST: tl.constexpr = INTERPRETED or dtype == tl.float32
    tile_n, tile_m, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row = tile_n.to(tl.int64) * BLOCK_N
    rows_n = first_row + row_order(BLOCK_N, WARPS)
    rows_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ptr, run_ptr = _addresses(
        codes_ptr, factors_ptr, rows_n, first_row, N, words, factor_words, dimension, RUN, BLOCK_N
    )
    k = column_order(PAIRS)
    x_row_ptr = x_ptr + tl.minimum(rows_m, M - 1)[None, :] * stride_xm + k[:, None]
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    per_share = tl.cdiv(tiles, SPLIT_K)
    for tile in range(share * per_share, tl.minimum((share + 1) * per_share, tiles)):
        if RAGGED:
            x = tl.load(x_row_ptr + tile * 128, mask=(tile * 128 + k < K)[:, None], other=0.0)
        else:
            x = tl.load(x_row_ptr + tile * 128)
        weight = _factored_tile(
            row_ptr, run_ptr, tile, tiles, dtype, BITS, RUN, WARPS, BLOCK_N, PAIRS, ASM, INTERPRETED
        )
        accumulator = dot(weight, x, accumulator, UPCAST)
    if SPLIT_K > 1:
        where = tile_n * tl.num_programs(1) + tile_m
        if leave_share(accumulator, partial_ptr, arrived_ptr, where, share, SPLIT_K, BLOCK_N, BLOCK_M):
            return
        accumulator = sum_of_shares(partial_ptr, arrived_ptr, where, SPLIT_K, BLOCK_N, BLOCK_M)
    finish(
        accumulator, bias_ptr, up_ptr, inner_ptr, y_ptr, rows_n, rows_m, M, N, rank,
        HAS_BIAS, BLOCK_R, INTERPRETED, UPCAST,
    )  # fmt: skip


@triton.jit
def _write(weight, weight_ptr, rows_n, tile, N, K):
    """Stores the weight [rows, 128] of a tile, columns in their own order."""
    column = tile * 128 + tl.arange(0, 128)
    inside = (rows_n < N)[:, None] & (column < K)[None, :]
    tl.store(weight_ptr + rows_n[:, None] * K + column[None, :], weight, mask=inside)


@triton.jit
def factored_dequantize_kernel(
    codes_ptr, factors_ptr, weight_ptr, N, K, tiles, words, factor_words, dimension,
    BITS: tl.constexpr, RUN: tl.constexpr, WARPS: tl.constexpr, BLOCK_N: tl.constexpr, ASM: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """W [N, K] in weight_ptr's type; one program a tile of 128 columns and BLOCK_N rows."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows_n = first_row + row_order(BLOCK_N, WARPS)
    row_ptr, run_ptr = _addresses(
        codes_ptr, factors_ptr, rows_n, first_row, N, words, factor_words, dimension, RUN, BLOCK_N
    )
    tile = tl.program_id(1)
    weight = _factored_tile(
        row_ptr, run_ptr, tile, tiles, weight_ptr.dtype.element_ty, BITS, RUN, WARPS, BLOCK_N, 2, ASM, INTERPRETED
    )
    _write(weight, weight_ptr, rows_n, tile, N, K)


@triton.constexpr_function
def setup_text() -> str:
    """Declares registers that hold, throughout a kernel, where the tables of points and gains begin.

    Passed to each piece of assembly they would be tensors, past which Triton does not move a change of layout.
    """
    return ".reg .b64 qk_points, qk_gains; mov.b64 qk_points, $1; mov.b64 qk_gains, $2; mov.u32 $0, 0;"


@triton.constexpr_function
def vectors_text(bf16: bool, index_bits: int, gain_bits: int) -> str:
    """$8 holds the fields of two columns and $9, $10 the columns' scales; $0 to $7 are the weights of 8 rows.

    |y|^2 is counted in the low bits of a float of magic + |y|^2. No field is out of bounds: all that the bits allow
    select entries of the tables.
    """
    kind, magic, minus_zero, one = ("bf16x2", 0x4300, 0x80008000, 0x3F803F80) if bf16 else ("f16x2", 0x6400, 0, 0)
    mask, above, shift = (1 << index_bits) - 1, ((1 << gain_bits) - 1) << 6, index_bits - 6
    text = ".reg .b32 i, j, p, q, s, t, h, l, z, one, sixteenth, off, off16, u<8>; .reg .b64 a, b; "
    text += f"and.b32 i, $8, {mask}; shr.u32 j, $8, 16; and.b32 j, j, {mask}; "
    text += "mad.wide.u32 a, i, 4, qk_points; mad.wide.u32 b, j, 4, qk_points; "
    text += "ld.global.nc.b32 p, [a]; ld.global.nc.b32 q, [b]; prmt.b32 i, p, q, 0x5410; prmt.b32 j, p, q, 0x7632; "
    text += f"mov.b32 s, {magic * 0x10001}; mov.b32 z, {minus_zero}; mov.b32 one, {one}; "
    text += f"mov.b32 off, {(magic + 8) * 0x10001 | (0x80008000 if bf16 else 0)}; "
    if not bf16:  # a nibble 4 bits up counts 16 times: u = v / 16 - (1024 / 16 + 8), and it need not be shifted
        text += "mov.b32 sixteenth, 0x2C002C00; mov.b32 off16, 0xD480D480; shr.u32 p, i, 8; shr.u32 q, j, 8; "
    for row in range(8):
        if bf16:
            text += f"shr.u32 t, {'ij'[row // 4]}, {row % 4 * 4}; lop3.b32 t, t, 0x000F000F, {magic * 0x10001}, 0xEA; "
            text += f"fma.rn.bf16x2 u{row}, t, one, off; "
        else:
            text += f"lop3.b32 t, {'ipjq'[row // 2]}, {0xF000F << 4 * (row % 2)}, {magic * 0x10001}, 0xEA; "
            text += f"fma.rn.f16x2 u{row}, t, sixteenth, off16; " if row % 2 else f"sub.rn.f16x2 u{row}, t, off; "
        text += f"fma.rn.{kind} s, u{row}, u{row}, s; "
    text += "and.b32 s, s, 0x003F003F; "
    if gain_bits:
        text += f"sh{'r' if shift >= 0 else 'l'}.b32 t, $8, {abs(shift)}; ".replace("shr.b32", "shr.u32")
        text += f"lop3.b32 s, t, {above * 0x10001}, s, 0xEA; "
    text += "and.b32 i, s, 0xFFFF; shr.u32 j, s, 16; mad.wide.u32 a, i, 4, qk_gains; mad.wide.u32 b, j, 4, qk_gains; "
    text += ".reg .f32 f, g, x, y; ld.global.nc.f32 f, [a]; ld.global.nc.f32 g, [b]; "
    text += "mul.rn.f32 f, f, $9; mul.rn.f32 g, g, $10; cvt.rn.f16x2.f32 h, g, f; "
    if bf16:
        text += _split_text("h", "l", "h")
    for row in range(8):
        if bf16:
            text += f"fma.rn.bf16x2 t, u{row}, l, z; fma.rn.bf16x2 ${row}, u{row}, h, t; "
        else:
            text += f"mul.rn.f16x2 ${row}, u{row}, h; "
    return "{ " + text + "}"


@triton.jit
def _pairs_of_fields(
    line_ptr, tile, K, TAIL: tl.constexpr, BITS: tl.constexpr, LINES: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """A tile's fields, those of two neighbouring columns a word, [LINES, 64]; K % 128 = TAIL columns in the last."""
    if TAIL == 0:
        pairs = tl.reshape(pairs_of_codes(line_ptr, tile, K // 128, 0, BITS, LINES, ASM), (LINES, 64))
    else:
        k = tl.arange(0, 64) % 16 * 8 + tl.arange(0, 64) // 16 * 2
        pairs = ragged_codes(line_ptr, k, tile, K, BITS, TAIL)
        pairs |= ragged_codes(line_ptr, k + 1, tile, K, BITS, TAIL) << 16
    return pairs


@triton.jit
def _eight_rows(entries, LINES: tl.constexpr, WARPS: tl.constexpr):
    """[LINES, 64, i2, i1, i0], entry 4 i2 + 2 i1 + i0 of a line -> [8 * LINES, lane, o3, o2, o1, o0] by `row_order`."""
    entries = tl.reshape(entries, (WARPS, LINES // WARPS, 64, 2, 2, 2))
    entries = tl.permute(entries, (3, 4, 0, 5, 1, 2))
    return tl.reshape(entries, (8 * LINES, 4, 2, 2, 2, 2))


@triton.jit
def _vectors(fields, points_ptr, gains_ptr, scales, INDEX: tl.constexpr):
    """(points, factors in fp32) of fields [LINES, 64]. No field is out of bounds: INDEX bits select a point."""
    points = tl.load(points_ptr + (fields & ((1 << INDEX) - 1)))
    square = tl.zeros_like(points)
    for i in tl.static_range(8):
        entry = ((points >> (4 * i)) & 15) - 8
        square += entry * entry
    factor = tl.load(gains_ptr + ((fields >> INDEX << 6) | square)) * scales
    return points, factor.to(tl.float16).to(tl.float32)[:, :, None, None, None]


@triton.jit
def _table_tile(
    pairs, tile, scales_ptr, gains_ptr, points_ptr, dtype: tl.constexpr, BITS: tl.constexpr, INDEX: tl.constexpr,
    WARPS: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The weight [BLOCK_N, 128] whose vectors are the pairs of fields of a tile."""
    LINES: tl.constexpr = BLOCK_N // 8
    place = tile * 128 + tl.arange(0, 64)[None, :]
    even_scale, odd_scale = tl.load(scales_ptr + place), tl.load(scales_ptr + place + 64)
    if ASM and dtype != tl.float32:
        TEXT: tl.constexpr = vectors_text(dtype == tl.bfloat16, INDEX, BITS - INDEX)
        w = tl.inline_asm_elementwise(
            TEXT, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,f,f", [pairs, even_scale, odd_scale],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
        first = tl.join(tl.join(w[0], w[4]), tl.join(w[2], w[6]))
        words = tl.join(first, tl.join(tl.join(w[1], w[5]), tl.join(w[3], w[7])))
        weight = operand(_eight_rows(words, LINES, WARPS), dtype, BLOCK_N, PAIRS)
    else:
        points, factors = _vectors(pairs & 0xFFFF, points_ptr, gains_ptr, even_scale, INDEX)
        more_points, more_factors = _vectors((pairs >> 16) & 0xFFFF, points_ptr, gains_ptr, odd_scale, INDEX)
        # Halves of a word: the same nibble of two columns. The first four nibbles, then the others.
        first = (points & 0xFFFF) | (more_points << 16)
        words = tl.join(first, ((points >> 16) & 0xFFFF) | (more_points & -65536))
        words = tl.join(words, words >> 8)
        words = tl.join(words, words >> 4)
        even = _eight_rows(((words & 15) - 8).to(tl.float32) * factors, LINES, WARPS)
        odd = _eight_rows((((words >> 16) & 15) - 8).to(tl.float32) * more_factors, LINES, WARPS)
        weight = round_to(in_columns(even, odd, BLOCK_N, PAIRS), dtype, INTERPRETED)
    return weight


@triton.jit(do_not_specialize=["M"])
def table_kernel(
    x_ptr, codes_ptr, scales_ptr, gains_ptr, points_ptr, bias_ptr, up_ptr, inner_ptr, y_ptr, partial_ptr, arrived_ptr,
    M, N, K, tiles, words, stride_xm, rank,
    BITS: tl.constexpr, INDEX: tl.constexpr, TAIL: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr,
    WARPS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr,
    ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Like `factored_kernel`, with 8 rows of W to a line of fields: an index into the points and a gain above it."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    UPCAST: tl.constexpr = INTERPRETED or dtype == tl.float32
    LINES: tl.constexpr = BLOCK_N // 8
    tile_n, tile_m, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows_n = tile_n.to(tl.int64) * BLOCK_N + row_order(BLOCK_N, WARPS)
    rows_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lines = tl.minimum(tile_n.to(tl.int64) * LINES + tl.arange(0, LINES), (N - 1) // 8)
    line_ptr = codes_ptr + lines[:, None] * tl.multiple_of(words, 4)
    k = column_order(PAIRS)
    x_row_ptr = x_ptr + tl.minimum(rows_m, M - 1)[None, :] * stride_xm + k[:, None]
    if ASM:
        tl.inline_asm_elementwise(
            setup_text(), "=r,l,l", [points_ptr.to(tl.int64), gains_ptr.to(tl.int64)], tl.int32, False, 1
        )
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    per_share = tl.cdiv(tiles, SPLIT_K)
    for tile in range(share * per_share, tl.minimum((share + 1) * per_share, tiles)):
        pairs = _pairs_of_fields(line_ptr, tile, K, TAIL, BITS, LINES, ASM)
        if TAIL:
            x = tl.load(x_row_ptr + tile * 128, mask=(tile * 128 + k < K)[:, None], other=0.0)
        else:
            x = tl.load(x_row_ptr + tile * 128)
        weight = _table_tile(
            pairs, tile, scales_ptr, gains_ptr, points_ptr, dtype, BITS, INDEX, WARPS, BLOCK_N, PAIRS, ASM, INTERPRETED
        )
        accumulator = dot(weight, x, accumulator, UPCAST)
    if SPLIT_K > 1:
        where = tile_n * tl.num_programs(1) + tile_m
        if leave_share(accumulator, partial_ptr, arrived_ptr, where, share, SPLIT_K, BLOCK_N, BLOCK_M):
            return
        accumulator = sum_of_shares(partial_ptr, arrived_ptr, where, SPLIT_K, BLOCK_N, BLOCK_M)
    finish(
        accumulator, bias_ptr, up_ptr, inner_ptr, y_ptr, rows_n, rows_m, M, N, rank,
        HAS_BIAS, BLOCK_R, INTERPRETED, UPCAST,
    )  # fmt: skip


@triton.jit
def table_dequantize_kernel(
    codes_ptr, scales_ptr, gains_ptr, points_ptr, weight_ptr, N, K, tiles, words,
    BITS: tl.constexpr, INDEX: tl.constexpr, TAIL: tl.constexpr, WARPS: tl.constexpr, BLOCK_N: tl.constexpr,
    ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """W [N, K] in weight_ptr's type; one program a tile of 128 columns and BLOCK_N rows."""
    LINES: tl.constexpr = BLOCK_N // 8
    rows_n = tl.program_id(0).to(tl.int64) * BLOCK_N + row_order(BLOCK_N, WARPS)
    lines = tl.minimum(tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES), (N - 1) // 8)
    line_ptr = codes_ptr + lines[:, None] * tl.multiple_of(words, 4)
    tile = tl.program_id(1)
    if ASM:
        tl.inline_asm_elementwise(
            setup_text(), "=r,l,l", [points_ptr.to(tl.int64), gains_ptr.to(tl.int64)], tl.int32, False, 1
        )
    pairs = _pairs_of_fields(line_ptr, tile, K, TAIL, BITS, LINES, ASM)
    weight = _table_tile(
        pairs, tile, scales_ptr, gains_ptr, points_ptr, weight_ptr.dtype.element_ty, BITS, INDEX, WARPS, BLOCK_N, 2,
        ASM, INTERPRETED,
    )  # fmt: skip
    _write(weight, weight_ptr, rows_n, tile, N, K)
