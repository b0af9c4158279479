"""Multiply by a group-wise integer weight without materialising it: y = x @ W^T.

    W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g],    g = k // group_size

Layout of `codes`, int32 [N, words], row by row: the planes of power-of-two width that make up a code
(3 bits = a 2-bit and a 1-bit plane, lowest bits first), one after the other. In a plane of width b,
column k = 128 * tile + 8 * (P * r + p) + 2 * lane + half, with P = 16 / b, stands in word
tile * 4b + lane * R + r at bits b * p + 16 * half. R is b, and for a last tile of c < 128 columns
ceil(ceil(c / 8) * b / 16). `scales` and `zeros` are fp16 [N, ceil(K / group_size)]; without `zeros`
the zero point is (2^bits - 1) / 2.

Bytes moved: N * K * bits / 8 for codes, 2 or 4 bytes a group and row, 2 * M * K for x, 2 * M * N for y.
Weights are formed in fp32, rounded to x's dtype and multiplied with fp32 accumulation, so that x = I
gives exactly the dequantized weight.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128


def reference(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Tensor:
    """The specification, on any device: y = x @ W^T for x [..., K]; y [..., N] in x's dtype."""
    in_features = x.shape[-1]
    values = torch.zeros(codes.shape[0], in_features, dtype=torch.int32, device=codes.device)
    for word, bit, mask, shift in _positions(in_features, bits, codes.device):
        values |= ((codes[:, word] >> bit) & mask) << shift
    group = torch.arange(in_features, device=codes.device) // group_size
    zero = (2**bits - 1) / 2 if zeros is None else zeros.float()[:, group]
    weight = (values.float() - zero) * scales.float()[:, group]
    return torch.nn.functional.linear(x, weight.to(x.dtype))


def _plane_widths(bits: int) -> tuple[int, ...]:
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def _tail_stride(in_features: int, width: int) -> int:
    """R of the last tile: words per lane where it is not full, else 0."""
    octets = math.ceil(in_features % TILE / 8)
    return math.ceil(octets * width / 16)


def _words(in_features: int, bits: int) -> int:
    return sum(4 * (in_features // TILE * b + _tail_stride(in_features, b)) for b in _plane_widths(bits))


@lru_cache(maxsize=64)
def _positions(in_features: int, bits: int, device: torch.device) -> list[tuple[Tensor, Tensor, int, int]]:
    """Per plane: the word and the bit of every column, the field's mask and its shift within the code."""
    k = torch.arange(in_features, device=device)
    tile, octet, lane, half = k // TILE, k % TILE // 8, k % 8 // 2, k % 2
    start = shift = 0
    planes = []
    for width in _plane_widths(bits):
        per_half = 16 // width
        stride = torch.where(tile < in_features // TILE, width, _tail_stride(in_features, width))
        word = start + tile * 4 * width + lane * stride + octet // per_half
        bit = width * (octet % per_half) + 16 * half
        planes.append((word, bit.to(torch.int32), 2**width - 1, shift))
        start += 4 * (in_features // TILE * width + _tail_stride(in_features, width))
        shift += width
    return planes


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
def _int_group_matmul_kernel(
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


def launch(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Runs the Triton kernel; arguments and result as in `reference`.

    Raises:
        ValueError: shapes or dtypes that the kernel's addresses do not allow.
    """
    check(x, codes, scales, zeros, bits, group_size)
    (N, words), K = codes.shape, x.shape[-1]
    rows = x.reshape(-1, K)
    M = len(rows)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M and N:
        tails = {f"TAIL_{b}": _tail_stride(K, b) for b in (8, 4, 2, 1)}
        block_m, block_n = min(64, max(16, triton.next_power_of_2(M))), 64
        upcast = x.dtype == torch.float32 or x.device.type == "cpu"  # the interpreter's bf16 dot is wrong
        with torch.cuda.device_of(x):
            _int_group_matmul_kernel[(triton.cdiv(N, block_n), triton.cdiv(M, block_m))](
                rows, codes, scales, codes if zeros is None else zeros, y,
                M, N, K, words, scales.shape[1], group_size, rows.stride(0), rows.stride(1),
                BITS=bits, HAS_ZEROS=zeros is not None, **tails,
                BLOCK_M=block_m, BLOCK_N=block_n, UPCAST=upcast,
            )  # fmt: skip
    return y.view(*x.shape[:-1], N)


def check(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> None:
    """Raises ValueError unless every address that follows from the arguments lies inside the tensors."""
    K = x.shape[-1]
    if bits not in range(1, 9) or group_size < 1:
        raise ValueError(f"bits={bits}, group_size={group_size}: bits are 1 to 8 and groups hold at least one column")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x is {x.dtype}; the kernel takes float16, bfloat16 or float32")
    if codes.dtype != torch.int32 or codes.dim() != 2 or codes.shape[1] != _words(K, bits) or not codes.is_contiguous():
        raise ValueError(
            f"codes are {codes.dtype} {tuple(codes.shape)}; {K} columns of {bits} bits take "
            f"contiguous int32 [N, {_words(K, bits)}]"
        )
    expected = (codes.shape[0], -(-K // group_size))
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float16 or tuple(tensor.shape) != expected or not tensor.is_contiguous():
            raise ValueError(
                f"{name} are {tensor.dtype} {tuple(tensor.shape)}; group_size={group_size} takes contiguous "
                f"float16 {expected}"
            )


_LIBRARY = torch.library.Library("quantkit", "FRAGMENT")
_LIBRARY.define(
    "int_group_matmul(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int bits, int group_size) -> Tensor"
)


def _fake(x, codes, scales, zeros, bits, group_size):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


torch.library.register_fake("quantkit::int_group_matmul", _fake, lib=_LIBRARY)
_LIBRARY.impl("int_group_matmul", reference, "CompositeExplicitAutograd")
_LIBRARY.impl("int_group_matmul", launch, "CUDA")
int_group_matmul = torch.ops.quantkit.int_group_matmul.default
