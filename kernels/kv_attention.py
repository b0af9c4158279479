"""Attention of a few queries over packed keys and values, and over the tokens around them that are not packed.

Codes lie in words of 16 bits, by planes (3 bits = 2 + 1): with W words a token, a plane's field f of word w is channel
f W + w. Keys have a scale per channel and group of tokens, values per token and group of channels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.kernels import launching

LARGEST_ROWS = 64
"""Queries of a key head, at most; 16 share what a program reads."""


class Packed(NamedTuple):
    """A layer's packed tokens; scales and factors fp16.

    Attributes:
        k, v: uint8 [batch, heads, tokens, D * bits / 8].
        k_scale, k_low: [batch, heads, tokens / group, D].
        v_scale, v_low: [batch, heads, tokens, D / group].
        k_bits, v_bits: of a code.
        down: [batch, heads, D, rank], of the keys' correction, or None.
        up: [batch, heads, tokens, rank] fp16, or uint8 with `up_scale` and `up_low` [batch, heads, groups, rank].
        places, kept: uint8 and fp16 [batch, heads, tokens, count], what keys lack in some channels, or None.
    """

    k: Tensor
    k_scale: Tensor
    k_low: Tensor
    v: Tensor
    v_scale: Tensor
    v_low: Tensor
    k_bits: int
    v_bits: int
    down: Tensor | None = None
    up: Tensor | None = None
    up_scale: Tensor | None = None
    up_low: Tensor | None = None
    places: Tensor | None = None
    kept: Tensor | None = None


class Plain(NamedTuple):
    """Tokens as they are, [batch, heads, tokens, D]."""

    k: Tensor
    v: Tensor


def supported(packed: Packed, rows: int) -> bool:
    """Whether the kernel takes these shapes."""
    size, groups, tokens = packed.k_scale.shape[-1], packed.v_scale.shape[-1], packed.k.shape[2]
    widths = [{3: 2}.get(bits, bits) for bits in (packed.k_bits, packed.v_bits)]
    power = size & (size - 1) == 0 and size <= 256 and packed.v.shape[3] * 8 == size * packed.v_bits
    words = min(widths) * size >= 128  # a token has 8 at least
    parts = packed.up is None and packed.places is None  # 8 bits leave no register for more
    rank = packed.up is None or packed.up.shape[3] <= 16
    whole = tokens // packed.k_scale.shape[2] % 16 == 0 and 16 // widths[1] % groups == 0
    return power and words and whole and rank and (parts or packed.k_bits < 8) and rows <= LARGEST_ROWS


def launch_shape(
    size: int, group: int, k_bits: int, v_bits: int, rank: int, kept: int, capability: int
) -> tuple[int, int, int]:
    """(tokens at a time, at most `group`; warps; stages): what leaves every number in a register.

    `evals/kernel_build` asserts it: what is tight are words of 8 bits, and planes of 3 bits with corrections.
    """
    three, newer = 3 in (k_bits, v_bits), capability >= 100
    if size <= 64:
        tight = three and (rank > 0 or kept > 0 or newer)
        return math.gcd(group, 32 if tight else 64), 1, 1 if three and rank > 0 and newer else 2
    if size == 128:
        tight = three and (kept > 0 or (rank > 0 and capability != 90) or (k_bits == v_bits and capability >= 120))
        one = tight or k_bits + v_bits == 16 or (rank > 0 and (kept > 0 or newer))
        return math.gcd(group, 16 if tight else 32), 1, 1 if one else 2
    tight = kept > 0 and (three if capability >= 120 else newer and (three or k_bits == 2))
    return math.gcd(group, 16 if tight else 32), 2, 3 if tight and (k_bits, v_bits) == (3, 2) else 2


def packed_attention(
    q: Tensor,
    packed: Packed,
    scaling: float,
    buffer: Plain | None = None,
    sink: Plain | None = None,
    new: int = 1,
    mask: Tensor | None = None,
    splits: int = 0,
) -> Tensor:
    """Runs the kernels; a tensor in the CPU's memory means Triton's interpreter.

    Args:
        q: [batch, heads, rows, D], all rows that read a head of keys, a sibling's new tokens side by side; fp16, bf16
            or fp32.
        packed: keys and values.
        scaling: of the scores.
        buffer: the tokens behind the packed ones; the newest are the rows' own.
        sink: the tokens before the packed ones.
        new: tokens of a sibling.
        mask: bool [batch, new, tokens of all three], True where a token is seen; None: all those up to a row's own.
        splits: shares of the packed tokens; 0 for as many as fill the GPU.

    Returns:
        [batch, heads, rows, D] in q's dtype.

    Raises:
        ValueError: shapes that `supported` says no to.
    """
    batch, heads, rows, size = q.shape
    if not supported(packed, rows):
        raise ValueError(f"the kernel takes other heads, groups, ranks or fewer than {rows} rows (see `supported`)")
    capability, processors, _ = launching.properties(q.device)
    tokens = packed.k.shape[2]
    k_group = tokens // packed.k_scale.shape[2]
    rank = 0 if packed.up is None else packed.up.shape[3]
    kept = 0 if packed.places is None else packed.places.shape[3]
    block, warps, stages = launch_shape(size, k_group, packed.k_bits, packed.v_bits, rank, kept, capability)
    if not splits:
        splits = max(1, min(tokens // 128, 8 * processors // (batch * heads)))
    share = -(-tokens // (splits * block)) * block
    splits = -(-tokens // share)
    shares = splits + 1 + (sink is not None)
    q = q if q.stride(3) == 1 else q.contiguous()
    scaled = torch.empty(q.shape, dtype=torch.float16, device=q.device)  # the kernel's own
    turned = None
    if packed.places is not None:  # what gathers channels reads the rows of a program side by side
        turned = torch.empty(batch * heads * -(-rows // 16) * 16 * size, dtype=torch.float16, device=q.device)
    partial = torch.empty(batch * heads * shares * rows * (size + 2), dtype=torch.float32, device=q.device)
    acc, highest, total = partial.split([count * batch * heads * shares * rows for count in (size, 1, 1)])
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    seen = None if mask is None else mask.contiguous().view(torch.uint8)
    from quantkit.kernels.kv_attention_triton import decode_kernel, merge_kernel  # Triton exists on Linux alone

    def pointer(tensor: Tensor | None) -> Tensor:
        return launching.or_stand_in(tensor, q)

    def head(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.stride(1)

    k_words, v_words = packed.k.view(torch.int16), packed.v.view(torch.int16)
    none = buffer or sink or Plain(q[:, :, :0], q[:, :, :0])  # what is absent has no tokens
    buffer_k, buffer_v = buffer or Plain(none.k[:, :, :0], none.v[:, :, :0])
    sink_k, sink_v = sink or Plain(none.k[:, :, :0], none.v[:, :, :0])
    with torch.cuda.device_of(q):
        decode_kernel[(batch * heads, shares, -(-rows // 16))](
            q, scaled, k_words, packed.k_scale, packed.k_low, v_words, packed.v_scale, packed.v_low,
            pointer(packed.down), pointer(packed.up), pointer(packed.up_scale), pointer(packed.up_low),
            pointer(packed.places), pointer(packed.kept), pointer(turned),
            buffer_k, buffer_v, sink_k, sink_v, pointer(seen), acc, highest, total,
            tokens, share, splits, buffer_k.shape[2], sink_k.shape[2], new, rows, heads,
            head(k_words), head(packed.k_scale), head(v_words), head(packed.v_scale), head(packed.up),
            head(packed.up_scale), head(packed.places), buffer_k.stride(1), sink_k.stride(1),
            0 if mask is None else mask.shape[2], q.stride(0), q.stride(1), q.stride(2),
            scaling / math.log(2),  # for powers of 2
            BLOCK_N=block, D=size, K_BITS=packed.k_bits, V_BITS=packed.v_bits,
            K_GROUP=k_group, GROUPS=packed.v_scale.shape[3],
            RANK=rank, UP_BITS=16 if packed.up_scale is None else 8,
            UP_GROUP=1 if packed.up_scale is None else tokens // packed.up_scale.shape[2],
            KEPT=kept, MASKED=mask is not None,
            **launching.machine(q), num_warps=warps, num_stages=stages,
            maxnreg=255,  # else the assembler rather spills a few than exceeds 168
        )  # fmt: skip
        merge_kernel[(batch * heads, rows)](
            acc, highest, total, output, shares, rows, D=size, BLOCK=16, num_warps=max(1, size // 64)
        )
    return output
