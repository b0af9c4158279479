"""n-bit codes <-> int32 words, in the order in which a tensor-core kernel wants to read them.

A code of `bits` bits is cut into *planes* whose widths are powers of two (3 = 2 + 1, 7 = 4 + 2 + 1;
the first plane holds the lowest bits). Within a row and a plane of width b, every *tile* of 128
columns fills 4 lanes x b words. With P = 16 / b fields in half a word, column k of the tile stands at

    k = 8 * (P * r + p) + 2 * lane + half    ->    word  lane * b + r,    bits  b * p + 16 * half

so that one 16-byte load gives a lane of an m16n8k16 fragment all it multiplies, and the two codes of
a pair share a mask (`word >> b*p & 0x00mm00mm`). The words of a plane follow those of the one before.
A last tile of fewer than 128 columns keeps ceil(octets / P) words a lane instead of b: the padding
is below one word per lane and plane, whatever the width of the row.
"""

import torch
from torch import Tensor

TILE = 128
LANES = 4


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a `bits`-bit code, lowest bits first: 3 -> (2, 1).

    Raises:
        ValueError: bits is not in 1..16.
    """
    if bits not in range(1, 17):
        raise ValueError(f"bits={bits}: codes have 1 to 16 bits")
    return tuple(width for width in (16, 8, 4, 2, 1) if bits & width)


def row_words(in_features: int, bits: int) -> int:
    """int32 words that a row of `in_features` codes occupies."""
    return sum(_plane_words(in_features, width) for width in planes(bits))


def tail_words_per_lane(in_features: int, width: int) -> int:
    """Words a lane that a last, short tile keeps in the plane of a width; 0 where all tiles are full."""
    octets = -(-(in_features % TILE) // 8)
    return -(-octets * width // 16)


def _plane_words(in_features: int, width: int) -> int:
    return LANES * (in_features // TILE * width + tail_words_per_lane(in_features, width))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes into words.

    Args:
        codes: integers [rows, in_features], each in [0, 2^bits).
        bits: 1..16.

    Returns:
        int32 [rows, row_words(in_features, bits)].
    """
    rows, in_features = codes.shape
    tiles = -(-in_features // TILE)
    padded = torch.nn.functional.pad(codes, (0, tiles * TILE - in_features))
    packed = []
    shift = 0
    for width in planes(bits):
        fields = (padded >> shift) & (2**width - 1)
        fields = fields.view(rows, tiles, width, 16 // width, LANES, 2)
        words = torch.zeros(rows, tiles, LANES, width, dtype=torch.int32, device=codes.device)
        for p in range(16 // width):
            for half in range(2):
                field = fields[:, :, :, p, :, half].transpose(2, 3).to(torch.int32)
                words |= field << (width * p + 16 * half)
        packed.append(_cut_tail(words, in_features, width))
        shift += width
    return torch.cat(packed, dim=1)


def _cut_tail(words: Tensor, in_features: int, width: int) -> Tensor:
    """[rows, tiles, LANES, width] -> [rows, plane words], without the tail's empty words."""
    full = in_features // TILE
    body = words[:, :full].flatten(1)
    tail = words[:, full:, :, : tail_words_per_lane(in_features, width)].flatten(1)
    return torch.cat([body, tail], dim=1)


def unpack(words: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        words: int32 [rows, row_words(in_features, bits)].

    Returns:
        uint8 [rows, in_features], or int32 where codes have more than 8 bits.

    Raises:
        ValueError: the row length does not fit in_features and bits.
    """
    expected = row_words(in_features, bits)
    if words.shape[1] != expected:
        raise ValueError(
            f"codes have {words.shape[1]} words a row; {in_features} columns of {bits} bits take {expected}"
        )
    dtype = torch.uint8 if bits <= 8 else torch.int32
    codes = torch.zeros(words.shape[0], in_features, dtype=dtype, device=words.device)
    start = shift = 0
    for width in planes(bits):
        length = _plane_words(in_features, width)
        codes |= _fields(words[:, start : start + length], width, in_features, dtype) << shift
        start += length
        shift += width
    return codes


def _fields(plane: Tensor, width: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """The fields of one plane in the order of columns, [rows, in_features]."""
    body = in_features // TILE * LANES * width
    bits = width * torch.arange(16 // width, dtype=torch.int32, device=plane.device)
    shifts = torch.stack([bits, bits + 16], dim=1)  # of field p in either half
    parts = []
    for words, stride in ((plane[:, :body], width), (plane[:, body:], tail_words_per_lane(in_features, width))):
        if words.shape[1]:
            lanes = words.reshape(len(words), words.shape[1] // (LANES * stride), LANES, stride, 1, 1)
            fields = ((lanes >> shifts) & (2**width - 1)).to(dtype)  # [rows, tiles, lane, r, p, half]
            parts.append(fields.permute(0, 1, 3, 4, 2, 5).flatten(1))
    return torch.cat(parts, dim=1)[:, :in_features] if len(parts) != 1 else parts[0][:, :in_features]
