"""The form that integer weights take on a GPU: tiles one after the other, each with its scales.

A checkpoint's rows are as long as the weight is wide (`bitpack`): of one a program reads 16 to 64 bytes, and the next
lies kilobytes away, as do the scales, and the bits of a second plane. Here whatever a program needs for 64 rows of a
tile of 128 columns is one piece of memory,

    stream[block of rows, tile] = words of the codes [64, 4 * bits], scales [groups, 64], zeros [groups, 64]

in the order in which it is multiplied; scales and zeros are fp16, two a word, of the 1, 2 or 4 groups in the tile (of a
wider group they are repeated). Rows that fill the last block have scales of 0. The codes of a row are the words that
`bitpack` gives for its tile, plane after plane, but for 3 bits, whose two planes would cost an instruction more a
weight. Theirs are three words a lane, [3, 64, 4], with octet o (8 neighbouring columns) in both halves of a word at

    o = 0..2 -> word 0, bits 0, 6, 12     8, 9   -> word 0, bits 3, 9
        3..5 -> word 1, bits 0, 6, 12     10, 11 -> word 1, bits 3, 9     14 -> word 2, bits 12
        6, 7 -> word 2, bits 0, 6         12, 13 -> word 2, bits 3, 9     15 -> bit 15 of words 0, 1, 2

so that a mask takes out two of them without a shift: the floats of the first 8 octets are 128 + code, those of the
others 128 + 8 * code, and their product counts an eighth.

Nothing is lost: `restored` gives back the checkpoint's bytes.
"""

import torch
from torch import Tensor

from quantkit.kernels.bitpack import LANES, TILE, pack, unpack

ROWS = 64
"""Rows of a block."""
BETWEEN, STORED, WHOLE = 0, 1, 2
"""Where a grid's zero is: at (2^bits - 1) / 2, at a stored number of each group, or at 2^(bits - 1)."""
AT_ONCE = 2**23
"""Bytes of packed codes that are brought into this form together: it takes many times as many for a moment."""
THREE = [(0, 0), (0, 6), (0, 12), (1, 0), (1, 6), (1, 12), (2, 0), (2, 6)]
THREE += [(0, 3), (0, 9), (1, 3), (1, 9), (2, 3), (2, 9), (2, 12)]
"""Word and first bit of octets 0 to 14 of 3-bit codes; octet 15 has a bit in each word."""


def groups_of(group_size: int) -> int:
    """Groups of a tile."""
    return max(1, TILE // group_size)


def arranges(in_features: int, group_size: int) -> bool:
    """Whether weights of this width and these groups have this form: of whole tiles, no group ends inside a part."""
    return in_features % TILE == 0 and (group_size in (32, 64) or group_size % TILE == 0 or group_size >= in_features)


def prefers(bits: int, in_features: int, group_size: int) -> bool:
    """Whether weights are brought into this form: not 8 bits in groups of 32, for which ptxas runs out of registers."""
    return arranges(in_features, group_size) and (bits, group_size) != (8, 32)


def zero_of(zeros: Tensor | None) -> int:
    """Where the zero of a checkpoint's weight is: BETWEEN, STORED or WHOLE."""
    return BETWEEN if zeros is None else WHOLE if zeros.dim() == 1 else STORED


def zeros_dtype(zeros: Tensor | None) -> torch.dtype:
    """That of stored zeros: fp32 where they are, fp16 in every other case."""
    wide = zeros is not None and zeros.dim() > 1 and zeros.dtype == torch.float32
    return torch.float32 if wide else torch.float16


def middle(bits: int, zero: int) -> float:
    """The number of the zero that no group stores."""
    return 2.0 ** (bits - 1) if zero == WHOLE else (2**bits - 1) / 2


def words_of_block(bits: int, group_size: int, zero: int) -> int:
    """int32 words of a block of rows and a tile."""
    return ROWS * LANES * bits + groups_of(group_size) * (ROWS // 2) * (1 + (zero == STORED))


def arranged(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Tensor:
    """The stream of a checkpoint's tensors.

    Args:
        codes, scales, zeros: as in `int_group_matmul`, of a weight that `arranges`.

    Returns:
        int32 [blocks of rows, tiles, words_of_block].
    """
    step = max(1, AT_ONCE // (ROWS * LANES * codes.shape[1])) * ROWS
    parts = [
        _arranged(
            codes[at : at + step],
            [grid[:, at : at + step] for grid in (scales, zeros) if grid is not None and grid.dim() == 2],
            bits,
            group_size,
        )
        for at in range(0, len(codes), step)
    ]
    return torch.cat(parts)


def _arranged(codes: Tensor, grids: list[Tensor], bits: int, group_size: int) -> Tensor:
    """`arranged` for some rows; the scales, and zeros where there are any."""
    tiles = codes.shape[1] // (LANES * bits)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % ROWS))
    if bits == 3:
        words = _three(unpack(codes, 3, tiles * TILE)).view(-1, ROWS, tiles, 3, LANES).permute(0, 2, 3, 1, 4)
    else:
        planes = [plane.view(-1, ROWS, tiles, LANES * width) for plane, width in _planes(codes, bits, tiles)]
        words = torch.cat(planes, dim=-1).transpose(1, 2)
    parts = [words.flatten(2)]
    parts += [_grid_words(grid, group_size, tiles) for grid in grids]
    return torch.cat(parts, dim=2)


def restored(
    stream: Tensor, bits: int, group_size: int, zero: int, out_features: int, index: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The checkpoint's (codes, scales, zeros); the inverse of `arranged`.

    Args:
        index: int64 [n], of the rows that are wanted; None for all.
    """
    blocks, tiles, _ = stream.shape
    size = ROWS * LANES * bits
    index = torch.arange(out_features, device=stream.device) if index is None else index
    block, row = index // ROWS, index % ROWS
    words = stream[:, :, :size]
    if bits == 3:
        codes = pack(_unpacked_three(words.view(blocks, tiles, 3, ROWS, LANES)[block, :, :, row]), 3)
    else:
        fields = words.view(blocks, tiles, ROWS, LANES * bits)[block, :, row]
        planes = fields.split([LANES * width for width in _widths(bits)], dim=2)
        codes = torch.cat([plane.flatten(1) for plane in planes], dim=1)
    found = []
    for grid in stream[:, :, size:].view(torch.float16).chunk(1 + (zero == STORED), dim=2):
        of_rows = grid.unflatten(2, (-1, ROWS))[block, :, :, row].flatten(1).T
        every = max(1, min(group_size // TILE, tiles))  # tiles that repeat a group's
        found.append(of_rows[::every].contiguous())
    if zero == WHOLE:
        return codes, found[0], found[0].new_full((1,), middle(bits, zero))
    return codes, found[0], found[1] if zero == STORED else None


def _widths(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]


def _planes(codes: Tensor, bits: int, tiles: int) -> list[tuple[Tensor, int]]:
    widths = _widths(bits)
    return list(zip(codes.split([LANES * width * tiles for width in widths], dim=1), widths, strict=True))


def _grid_words(grid: Tensor, group_size: int, tiles: int) -> Tensor:
    """fp16 [groups, rows] -> int32 [blocks, tiles, groups of a tile * ROWS / 2]."""
    padded = torch.nn.functional.pad(grid, (0, -grid.shape[1] % ROWS))
    if group_size >= TILE:
        padded = padded.repeat_interleave(min(group_size // TILE, tiles), dim=0)[:tiles]
    of_tiles = padded.reshape(tiles, -1, padded.shape[1] // ROWS, ROWS).permute(2, 0, 1, 3)
    return of_tiles.flatten(2).contiguous().view(torch.int32)


def _three(codes: Tensor) -> Tensor:
    """3-bit codes [rows, columns] -> int32 [rows, tiles, 3, LANES]."""
    pairs = codes.int().view(len(codes), -1, 16, LANES, 2)
    pairs = pairs[..., 0] | pairs[..., 1] << 16  # [rows, tiles, octet, lane]
    words = torch.zeros(len(codes), pairs.shape[1], 3, LANES, dtype=torch.int32, device=codes.device)
    for octet, (word, bit) in enumerate(THREE):
        words[:, :, word] |= pairs[:, :, octet] << bit
    for word in range(3):
        words[:, :, word] |= (pairs[:, :, 15] >> word & 0x00010001) << 15
    return words


def _unpacked_three(words: Tensor) -> Tensor:
    """The inverse of `_three`."""
    pairs = [words[:, :, word] >> bit & 0x00070007 for word, bit in THREE]
    last = [(words[:, :, word] >> 15 & 0x00010001) << word for word in range(3)]
    octets = torch.stack([*pairs, last[0] | last[1] | last[2]], dim=2)  # [rows, tiles, octet, lane]
    return torch.stack([octets & 0xFFFF, octets >> 16 & 0xFFFF], dim=-1).flatten(1).to(torch.uint8)
