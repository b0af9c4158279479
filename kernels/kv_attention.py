"""Attention of a few queries over packed keys and values: what is packed, the launch, and merging of shares.

The format is that of `kvcache.codec`: keys with a scale per channel and group of tokens, values per token and group of
channels, codes in bytes by planes (3 bits = 2 + 1), channels in order. A result is not normalised: output, maximum and
sum of its softmax, in base 2, so that parts over different tokens can be merged.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.kernels import launching

LARGEST_ROWS = 64
"""Queries of a key head, at most."""


BLOCKS = {False: (64, 32, 16), True: (32, 16)}
"""Tokens at a time, by whether a head has 128 channels or outliers: no register is spilled."""


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


class Part(NamedTuple):
    """Attention over some tokens.

    Attributes:
        output: fp32 [batch, heads, rows, D], not normalised.
        highest, total: fp32 [batch, heads, rows], maximum of the scores (base 2) and sum of their powers beyond it.
    """

    output: Tensor
    highest: Tensor
    total: Tensor


def joined(parts: Part) -> Part:
    """One part of several, which lie side by side in dimension 2."""
    highest = parts.highest.amax(2)
    base = torch.where(highest == -math.inf, torch.zeros_like(highest), highest)  # nothing is seen
    shares = torch.exp2(parts.highest - base[:, :, None])
    return Part((shares[..., None] * parts.output).sum(2), highest, (shares * parts.total).sum(2))


def merge(parts: list[Part]) -> Tensor:
    """Attention over all parts' tokens, fp32 [batch, heads, rows, D]."""
    output, _, total = joined(Part(*(torch.stack(tensors, 2) for tensors in zip(*parts, strict=True))))
    return output / total.clamp_min(1e-30)[..., None]


def dense(q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None = None) -> Part:
    """Attention over tokens as they are.

    Args:
        q: [batch, heads, rows, D].
        k, v: [batch, heads, tokens, D].
        scaling: of the scores.
        mask: bool, broadcasts to [batch, heads, rows, tokens]; True where a token is seen.
    """
    scores = (q.float() @ k.float().mT) * (scaling / math.log(2))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    highest = scores.amax(-1)
    p = torch.exp2(scores - torch.where(highest == -math.inf, torch.zeros_like(highest), highest)[..., None])
    return Part(p @ v.float(), highest, p.sum(-1))


def supported(packed: Packed, rows: int) -> bool:
    """Whether the kernel takes these shapes."""
    size = packed.k_scale.shape[-1]
    groups = packed.k.shape[2] // max(packed.k_scale.shape[2], 1)
    power = size & (size - 1) == 0 and 32 <= size <= 256
    return power and groups % 16 == 0 and rows <= LARGEST_ROWS


def packed_attention(q: Tensor, packed: Packed, scaling: float, mask: Tensor | None = None, splits: int = 0) -> Part:
    """Runs the kernel; a tensor in the CPU's memory means Triton's interpreter.

    Args:
        q: [batch, heads, rows, D], all rows that read a head of keys; fp16, bf16 or fp32.
        packed: keys and values.
        scaling: of the scores.
        mask: bool [batch, tokens], True where a token is seen; None for all.
        splits: shares of the tokens; 0 for as many as fill the GPU.

    Raises:
        ValueError: shapes that `supported` says no to.
    """
    batch, heads, rows, size = q.shape
    if not supported(packed, rows):
        raise ValueError(f"the kernel takes heads of 32 to 256 channels, a power of two, and {LARGEST_ROWS} rows")
    tokens = packed.k.shape[2]
    k_group = tokens // packed.k_scale.shape[2]
    block_n = next(block for block in BLOCKS[size >= 128 or packed.places is not None] if k_group % block == 0)
    if not splits:
        _, processors, _ = launching.properties(q.device)
        splits = max(1, min(-(-tokens // (4 * block_n)), 3 * processors // (batch * heads)))
    share = -(-tokens // (splits * block_n)) * block_n
    splits = -(-tokens // share)
    q = q.contiguous()
    projected = None if packed.down is None else (q.float() @ packed.down.float()).contiguous()
    output = torch.empty(batch, heads, splits, rows, size, dtype=torch.float32, device=q.device)
    highest, total = (torch.empty(batch, heads, splits, rows, dtype=torch.float32, device=q.device) for _ in range(2))
    rank = 0 if packed.up is None else packed.up.shape[3]
    factor = 8 if packed.up is not None and packed.up_scale is not None else 16
    up_group = tokens // packed.up_scale.shape[2] if packed.up_scale is not None else tokens
    seen = None if mask is None else mask.contiguous().view(torch.uint8)
    from quantkit.kernels.kv_attention_triton import decode_kernel  # Triton exists on Linux alone

    def pointer(tensor: Tensor | None) -> Tensor:
        return launching.or_stand_in(tensor, q)

    def head(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.stride(1)

    with torch.cuda.device_of(q):
        decode_kernel[(batch * heads, splits)](
            q, packed.k, packed.k_scale, packed.k_low, packed.v, packed.v_scale, packed.v_low,
            pointer(projected), pointer(packed.up), pointer(packed.up_scale), pointer(packed.up_low),
            pointer(packed.places), pointer(packed.kept), pointer(seen), output, highest, total,
            tokens, share, head(packed.k), head(packed.k_scale), head(packed.v), head(packed.v_scale),
            head(packed.up), head(packed.up_scale), head(packed.places), tokens, heads, scaling,
            ROWS=rows, BLOCK_M=max(16, 1 << (rows - 1).bit_length()), BLOCK_N=block_n, D=size,
            K_BITS=packed.k_bits, V_BITS=packed.v_bits, K_GROUP=k_group, GROUPS=packed.v_scale.shape[3],
            RANK=rank, UP_BITS=factor, UP_GROUP=up_group, KEPT=0 if packed.places is None else packed.places.shape[3],
            MASKED=mask is not None, num_warps=4, num_stages=2,
        )  # fmt: skip
    return joined(Part(output, highest, total))
