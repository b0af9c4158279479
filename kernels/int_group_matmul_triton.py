"""The Triton kernel behind `int_group_matmul`; that file has the layout and the equation."""

import triton
import triton.language as tl


@triton.jit
def _plane(row_start, rows_in, k, columns_in, tile, full_tiles, TAIL: tl.constexpr, WIDTH: tl.constexpr):
    """Fields [rows, 128] of one plane of one tile, as int32."""
    per_half: tl.constexpr = 16 // WIDTH
    octet = k // 8
    stride = tl.where(tile < full_tiles, WIDTH, TAIL)
    word = tile * 4 * WIDTH + (k % 8 // 2) * stride + octet // per_half
    words = tl.load(row_start[:, None] + word[None, :], mask=rows_in[:, None] & columns_in[None, :], other=0)
    bit = WIDTH * (octet % per_half) + 16 * (k % 2)
    return (words >> bit[None, :]) & ((1 << WIDTH) - 1)


@triton.jit
def int_group_matmul_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    y_ptr,
    M,
    N,
    K,
    words,
    groups,
    group_size,
    stride_xm,
    stride_xk,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    TAIL_8: tl.constexpr,
    TAIL_4: tl.constexpr,
    TAIL_2: tl.constexpr,
    TAIL_1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program: BLOCK_N rows of W times BLOCK_M rows of x, over all of K in tiles of 128.

    W is the left operand, so that its fragments come straight from registers. TAIL_b is the lane stride R of the
    last tile in the plane of width b, 0 where that tile is full. UPCAST multiplies in fp32: for fp32 inputs, and
    for the interpreter, whose bf16 dot is wrong.
    """
    rows_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = rows_m < M, rows_n < N
    k = tl.arange(0, 128)
    full_tiles = K // 128
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for tile in range(0, tl.cdiv(K, 128)):
        column = tile * 128 + k
        in_k = column < K
        plane_start = codes_ptr + rows_n * words
        code = tl.zeros((BLOCK_N, 128), dtype=tl.int32)
        if BITS & 8:
            code = _plane(plane_start, in_n, k, in_k, tile, full_tiles, TAIL_8, 8)
            plane_start += 4 * (full_tiles * 8 + TAIL_8)
        if BITS & 4:
            code = _plane(plane_start, in_n, k, in_k, tile, full_tiles, TAIL_4, 4)
            plane_start += 4 * (full_tiles * 4 + TAIL_4)
        if BITS & 2:
            code |= _plane(plane_start, in_n, k, in_k, tile, full_tiles, TAIL_2, 2) << (BITS & 4)
            plane_start += 4 * (full_tiles * 2 + TAIL_2)
        if BITS & 1:
            code |= _plane(plane_start, in_n, k, in_k, tile, full_tiles, TAIL_1, 1) << (BITS & 6)
        grid_mask = in_n[:, None] & in_k[None, :]
        grid_offset = rows_n[:, None] * groups + (column // group_size)[None, :]
        scale = tl.load(scales_ptr + grid_offset, mask=grid_mask, other=0.0).to(tl.float32)
        if HAS_ZEROS:
            zero = tl.load(zeros_ptr + grid_offset, mask=grid_mask, other=0.0).to(tl.float32)
        else:
            zero = (2**BITS - 1) / 2
        weight = ((code.to(tl.float32) - zero) * scale).to(x_ptr.dtype.element_ty)
        x_offset = rows_m[None, :] * stride_xm + column.to(tl.int64)[:, None] * stride_xk
        x = tl.load(x_ptr + x_offset, mask=in_m[None, :] & in_k[:, None], other=0.0)
        if UPCAST:
            accumulator = tl.dot(weight.to(tl.float32), x.to(tl.float32), accumulator, input_precision="ieee")
        else:
            accumulator = tl.dot(weight, x, accumulator)
    y_offset = rows_m[None, :] * N + rows_n[:, None]
    tl.store(y_ptr + y_offset, accumulator.to(y_ptr.dtype.element_ty), mask=in_m[None, :] & in_n[:, None])
