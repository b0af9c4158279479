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
gives exactly the dequantized weight. The kernel itself stands in `int_group_matmul_triton.py`, so that this file
imports where there is no Triton.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

TILE = 128
OPTIONS = {"num_warps": 4, "num_stages": 2}
"""Two stages keep shared memory below 99 KiB, so the kernel runs on every GPU since sm_80."""


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


def launch(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Runs the Triton kernel; arguments and result as in `reference`.

    Raises:
        ValueError: shapes or dtypes that the kernel's addresses do not allow.
    """
    from quantkit.kernels.int_group_matmul_triton import int_group_matmul_kernel  # Triton exists on Linux alone

    check(x, codes, scales, zeros, bits, group_size)
    (N, words), K = codes.shape, x.shape[-1]
    rows = x.reshape(-1, K)
    M = len(rows)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M and N:
        tails = {f"TAIL_{b}": _tail_stride(K, b) for b in (8, 4, 2, 1)}
        block_m, block_n = min(64, max(16, 1 << (M - 1).bit_length())), 64
        upcast = x.dtype == torch.float32 or x.device.type == "cpu"  # the interpreter's bf16 dot is wrong
        with torch.cuda.device_of(x):
            int_group_matmul_kernel[(-(-N // block_n), -(-M // block_m))](
                rows, codes, scales, codes if zeros is None else zeros, y,
                M, N, K, words, scales.shape[1], group_size, rows.stride(0), rows.stride(1),
                BITS=bits, HAS_ZEROS=zeros is not None, **tails,
                BLOCK_M=block_m, BLOCK_N=block_n, UPCAST=upcast, **OPTIONS,
            )  # fmt: skip
    return y.view(*x.shape[:-1], N)


def check(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> None:
    """Raises ValueError unless every address that follows from the arguments lies inside the tensors."""
    K = x.shape[-1]
    if bits not in range(1, 9) or group_size < 1:
        raise ValueError(f"bits={bits}, group_size={group_size}: bits are 1 to 8 and groups hold at least one column")
    if any(t is not None and t.device != x.device for t in (codes, scales, zeros)):
        raise ValueError(f"x is on {x.device}; codes, scales and zeros must be there too")
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
