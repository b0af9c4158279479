"""The Triton kernels behind `experts_matmul`: those of one weight, each program on the expert that its token chose.

A stack has the tensors of all experts one behind the other. A program reads which expert its row of x has chosen,
moves the pointers there, and goes on as the kernel of a single weight does with a single row. So no routing comes to
the host, and a CUDA graph that recorded a launch may be replayed with another choice.
"""

import triton
import triton.language as tl

from quantkit.kernels.int_group_matmul_triton import decode_kernel
from quantkit.kernels.trellis_matmul_triton import multiply_kernel


@triton.jit
def _chosen(chosen_ptr, experts):
    """(a program's pair, its expert); numbers beyond the last stand for no expert, and nobody reads their outputs."""
    pair = tl.program_id(1)
    return pair, tl.minimum(tl.maximum(tl.load(chosen_ptr + pair), 0), experts - 1)


@triton.jit
def int_group_kernel(
    x_ptr, chosen_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr, partial_ptr, arrived_ptr,
    experts, N, full_tiles, words, group_size, stride_xm, codes_each, scales_each,
    PER_ROW: tl.constexpr, BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr,
    ARRANGED: tl.constexpr, BLOCK_WORDS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[p] = x[p // PER_ROW] @ W[chosen[p]]^T + bias[chosen[p]]; a program BLOCK_N rows of W and one p."""
    pair, expert = _chosen(chosen_ptr, experts)
    scales = expert.to(tl.int64) * scales_each
    row = pair.to(tl.int64) * BLOCK_M  # which the kernel takes for its first of M rows
    decode_kernel(
        x_ptr + (pair // PER_ROW).to(tl.int64) * stride_xm, codes_ptr + expert.to(tl.int64) * codes_each,
        scales_ptr + scales, zeros_ptr + scales, bias_ptr + expert.to(tl.int64) * N, y_ptr, y_ptr,
        y_ptr + (pair - row) * N, partial_ptr, arrived_ptr, row + 1, N, full_tiles, words, group_size, 0, 0,
        BITS, HAS_ZEROS, HAS_BIAS, 0, GROUPS, ARRANGED, BLOCK_WORDS, SPLIT_K, BLOCK_M, BLOCK_N, PAIRS, ASM, INTERPRETED,
    )  # fmt: skip


@triton.jit
def trellis_kernel(
    x_ptr, chosen_ptr, codes_ptr, scales_ptr, scale_ptr, bias_ptr, y_ptr, partial_ptr, arrived_ptr,
    experts, N, K, lines, stride_xm,
    PER_ROW: tl.constexpr, BITS: tl.constexpr, STATE_BITS: tl.constexpr, WIDE: tl.constexpr, RAGGED: tl.constexpr,
    HAS_BIAS: tl.constexpr, WARPS: tl.constexpr, CHUNKS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr,
    ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """As `int_group_kernel`, of trellis codes: a program 128 rows of W and one p."""
    pair, expert = _chosen(chosen_ptr, experts)
    far, row = expert.to(tl.int64), pair.to(tl.int64) * BLOCK_M
    multiply_kernel(
        x_ptr + (pair // PER_ROW).to(tl.int64) * stride_xm, codes_ptr + far * lines * K, scales_ptr + far * K,
        scale_ptr + expert, bias_ptr + far * N, y_ptr, y_ptr, y_ptr + (pair - row) * N, partial_ptr, arrived_ptr,
        row + 1, N, K, lines, 0, 0,
        BITS, STATE_BITS, (), WIDE, RAGGED, HAS_BIAS, 0, WARPS, CHUNKS, SPLIT_K, BLOCK_M, ASM, INTERPRETED, False,
    )  # fmt: skip
