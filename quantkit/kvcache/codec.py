"""The codec: a chunk of keys or values -> codes, a low-rank correction and outliers, and back (GEAR, section 3).

    X  ~=  Q + L + S        X [batch, heads, tokens, channels]

    S   the largest and smallest numbers of every vector, kept exactly; for Q they count as the vector's mean
    Q   integers with a minimum and a step for every group
    L   the best rank-r approximation of X - Q, a head: A B^T, with B from a block power iteration

S is stored as what Q + L lack there, so that decoding is a sum of three.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.kernels.bitpack import planes

TINY = 1e-8


@dataclass
class Grid:
    """Integer codes of a chunk of keys or values, and their grids.

    Attributes:
        codes: uint8 [batch, heads, tokens, bytes], see `pack`.
        scale, low: fp16, step and minimum of each group: [batch, heads, groups, channels] where a group is of tokens,
            [batch, heads or 1, tokens, groups] where it is of channels.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., channels] -> uint8 [..., channels * bits / 8].

    By planes, lowest bits first. A plane of W words of 16 bits has channel f W + w in field f of word w, so that a
    kernel masks a field of neighbouring words to get neighbouring channels.
    """
    packed, shift = [], 0
    for width in planes(bits):
        fields = ((codes >> shift) & (2**width - 1)).unflatten(-1, (16 // width, -1))
        shifts = torch.arange(0, 16, width, dtype=torch.int32, device=codes.device)[:, None]
        words = (fields.int() << shifts).sum(-2, dtype=torch.int32)
        packed.append(words.to(torch.int16))
        shift += width
    return torch.cat(packed, -1).view(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., channels] from what `pack` made of them."""
    words = packed.view(torch.int16)
    channels = packed.shape[-1] * 8 // bits
    codes, shift, start = torch.zeros(*packed.shape[:-1], channels, dtype=torch.uint8, device=packed.device), 0, 0
    for width in planes(bits):
        count = channels * width // 16
        shifts = torch.arange(0, 16, width, dtype=torch.int16, device=packed.device)[:, None]
        fields = (words[..., None, start : start + count] >> shifts) & (2**width - 1)
        codes |= fields.to(torch.uint8).flatten(-2) << shift
        start, shift = start + count, shift + width
    return codes


def groups_of_tokens(x: Tensor, bits: int, size: int, packed: bool = True) -> Grid:
    """Rounds fp32 [batch, heads, tokens, channels] to one grid per channel and `size` tokens.

    Where not `packed`, a code has a byte of its own.
    """
    grouped = x.unflatten(2, (-1, size))
    scale, low = _range(grouped, 3, bits)
    codes = _round(grouped, scale, low, bits).flatten(2, 3)
    return Grid(pack(codes, bits) if packed else codes, scale.squeeze(3), low.squeeze(3))


def groups_of_channels(x: Tensor, bits: int, size: int | None) -> Grid:
    """Rounds fp32 [batch, heads, tokens, channels] to one grid per token and `size` channels of a head.

    With None for `size` all channels of all heads share one.
    """
    if size is None:
        scale, low = _range(x.transpose(1, 2).flatten(2)[:, None], 3, bits)  # of [batch, 1, tokens, heads * channels]
        return Grid(pack(_round(x, scale, low, bits), bits), scale, low)
    grouped = x.unflatten(3, (-1, size))
    scale, low = _range(grouped, 4, bits)
    return Grid(pack(_round(grouped, scale, low, bits).flatten(3, 4), bits), scale.squeeze(4), low.squeeze(4))


def _range(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """(step, minimum) along a dimension, as they are stored."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    low = low.half()
    return ((high - low.float()) / (2**bits - 1)).clamp_min(TINY).half().clamp_min(6e-8), low


def _round(x: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    return (x - low.float()).div_(scale.float()).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def values(grid: Grid, bits: int | None, by_token: bool) -> Tensor:
    """The numbers that codes stand for, fp32 [batch, heads, tokens, channels].

    Args:
        grid: codes and scales.
        bits: of a code; None where each has a byte of its own.
        by_token: groups are of channels; else of tokens.
    """
    codes = (grid.codes if bits is None else unpack(grid.codes, bits)).float()
    dim = 3 if by_token else 2
    grouped = codes.unflatten(dim, (grid.scale.shape[dim], -1))  # a view
    grouped.mul_(grid.scale.float().unsqueeze(dim + 1)).add_(grid.low.float().unsqueeze(dim + 1))
    return codes


def extremes(x: Tensor, count: int, dim: int) -> Tensor:
    """Indices of the `count` / 2 largest and smallest numbers of x [...] along `dim`, int64, `count` of them."""
    order, smallest = x.argsort(stable=True, dim=dim), count // 2
    largest = count - smallest
    return torch.cat([order.narrow(dim, 0, smallest), order.narrow(dim, x.shape[dim] - largest, largest)], dim)


def without(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """`x` [...] with the numbers at the indices that `extremes` gives, int64, replaced by the others' mean."""
    rest = x.scatter(dim, index, 0.0).sum(dim, keepdim=True) / max(x.shape[dim] - index.shape[dim], 1)
    return x.scatter(dim, index, rest.expand_as(index))


def basis(error: Tensor, rank: int, weights: Tensor | None, iterations: int) -> Tensor:
    """B of the correction, fp32 [batch, heads, channels, rank]: block power iteration (PowerSGD, GEAR algorithm 1).

    Args:
        error: fp32 [batch, heads, tokens, channels].
        rank: of the correction; cut to what the error has.
        weights: [heads, channels] or [batch, heads, channels] by which errors count, or None.
        iterations: of the power iteration.
    """
    weighted = error if weights is None else error * weights.unsqueeze(-2)
    rank = min(rank, *error.shape[-2:])
    generator = torch.Generator().manual_seed(0)  # the same for every head and row: none depends on others
    found = torch.randn(error.shape[-1], rank, generator=generator).to(error.device).expand(*error.shape[:2], -1, -1)
    for _ in range(iterations):
        found = torch.linalg.qr(weighted.mT @ (weighted @ found))[0]
    return found if weights is None else found / weights.unsqueeze(-1)


def coordinates(error: Tensor, found: Tensor, weights: Tensor | None) -> Tensor:
    """A of the correction, fp32 [batch, heads, tokens, rank]: the least-squares fit of the error in a given basis."""
    if weights is not None:
        error, found = error * weights.unsqueeze(-2), found * weights.unsqueeze(-1)
    gram = found.mT @ found
    ridge = 1e-6 * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[..., None, None]
    gram = gram + ridge * torch.eye(gram.shape[-1], device=gram.device)
    return torch.linalg.solve(gram, (error @ found).mT).mT
