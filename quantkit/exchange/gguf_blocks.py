"""ggml's blocks of 32 numbers: a scale d, mostly an offset m, and the numbers, whose widths a name tells.

    Q4_0, Q5_0, Q8_0     weight = d * n,        n signed: -8 to 7, -16 to 15, -127 to 127
    Q4_1, Q5_1           weight = d * n + m,    n from 0 to 15, 0 to 31

d and m are fp16. Layouts are those of ggml's `block_q4_0` and its like: d, m, the fifth bits of all 32 numbers in a
word, then their lower four, the first 16 in the low halves of bytes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 32
"""Numbers of a block."""


@dataclass(frozen=True)
class Kind:
    """A type of blocks.

    Attributes:
        name, number: ggml's.
        bits: of a number.
        offset: whether there is one, and numbers count from 0.
    """

    name: str
    number: int
    bits: int
    offset: bool

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return 2 * (1 + self.offset) + BLOCK * self.bits // 8

    def pack(self, numbers: Tensor, scales: Tensor, offsets: Tensor | None) -> np.ndarray:
        """Blocks of a weight.

        Args:
            numbers: int16 [rows, columns].
            scales, offsets: fp16 [rows, columns / 32].

        Returns:
            uint8 [rows, bytes of a row's blocks].
        """
        rows = len(numbers)
        of_blocks = numbers.view(rows, -1, BLOCK)
        parts = [_bytes(scales)] if offsets is None else [_bytes(scales), _bytes(offsets)]
        if self.bits == 8:
            parts.append(of_blocks.to(torch.int8).view(torch.uint8).numpy())
        else:
            codes = (of_blocks if self.offset else of_blocks + 2 ** (self.bits - 1)).to(torch.uint8).numpy()
            if self.bits == 5:
                parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
            parts.append((codes[..., :16] & 15) | ((codes[..., 16:] & 15) << 4))
        return np.concatenate(parts, axis=-1).reshape(rows, -1)

    def unpack(self, blocks: np.ndarray) -> tuple[Tensor, Tensor, Tensor | None]:
        """The inverse of `pack`.

        Args:
            blocks: uint8 [rows, bytes of a row's blocks].

        Returns:
            (numbers counted from 0, int64 [rows, columns]; scales, fp32 [rows, columns / 32]; offsets alike, or None).
        """
        each = blocks.reshape(len(blocks), -1, self.nbytes)
        scales, offsets = _numbers(each[..., :2]), _numbers(each[..., 2:4]) if self.offset else None
        rest = each[..., 4 if self.offset else 2 :]
        if self.bits == 8:
            codes = rest.view(np.int8).astype(np.int64) + 128
        else:
            low = rest[..., -BLOCK // 2 :]
            codes = np.concatenate([low & 15, low >> 4], axis=-1).astype(np.int64)
            if self.bits == 5:
                codes |= np.unpackbits(rest[..., :4], axis=-1, bitorder="little").astype(np.int64) << 4
        return torch.from_numpy(codes.reshape(len(blocks), -1)), scales, offsets


def _bytes(values: Tensor) -> np.ndarray:
    """fp16 [rows, blocks] -> uint8 [rows, blocks, 2]."""
    return values.contiguous().unsqueeze(-1).view(torch.uint8).numpy()


def _numbers(halves: np.ndarray) -> Tensor:
    """uint8 [rows, blocks, 2] -> fp32 [rows, blocks]."""
    return torch.from_numpy(np.ascontiguousarray(halves).view(np.float16)[..., 0].astype(np.float32))


SYMMETRIC = (Kind("Q4_0", 2, 4, False), Kind("Q5_0", 6, 5, False), Kind("Q8_0", 8, 8, False))
WITH_ZEROS = (Kind("Q4_1", 3, 4, True), Kind("Q5_1", 7, 5, True))


def kind_of(bits: int, has_zeros: bool) -> Kind | None:
    """The narrowest type that holds numbers of so many bits; None where there is none."""
    return next((kind for kind in (WITH_ZEROS if has_zeros else SYMMETRIC) if kind.bits >= bits), None)
