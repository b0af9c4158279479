"""A quantized matrix in a checkpoint's files: of which tensors it is made, and how; and codes in words."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.io.shards import Shards


@dataclass(frozen=True, eq=False)
class Numbers:
    """A matrix of whole numbers: (codes - zeros) * scales, those of a column's group.

    Attributes:
        codes: int64 [rows, columns], from 0 to 2^bits - 1.
        zeros: int64 or fp32 [rows, groups].
        scales: fp32 [rows, groups].
        group: int64 [columns], of each column.
        bits: of a code.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    group: Tensor
    bits: int

    def values(self) -> Tensor:
        """The matrix, fp32 [rows, columns]."""
        return (self.codes - self.zeros[:, self.group]).float() * self.scales[:, self.group]


@dataclass(frozen=True)
class Quantized:
    """A matrix of which its quantized parts are stored.

    Attributes:
        parts: name of each stored tensor that it is made of, by what it is.
        shape: of the matrix.
        make: gives it in fp32, of those tensors.
        numbers: gives the whole numbers that it is made of; None where it is not.
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    make: Callable[[Mapping[str, Tensor]], Tensor]
    numbers: Callable[[Mapping[str, Tensor]], Numbers] | None = None


def of_numbers(
    parts: Mapping[str, str], shape: tuple[int, ...], numbers: Callable[[Mapping[str, Tensor]], Numbers]
) -> Quantized:
    """A matrix of whole numbers; see `Quantized`."""
    return Quantized(parts, shape, lambda p: numbers(p).values(), numbers)


def with_offsets(codes: Tensor, scales: Tensor, offsets: Tensor, group: Tensor, bits: int) -> Numbers:
    """The numbers codes * scales + offsets: zeros are no whole numbers then, where offsets are none of the steps.

    Args:
        codes: int64 [rows, columns].
        scales, offsets: fp32 [rows, groups].
        group: int64 [columns].
        bits: of a code.
    """
    level = scales == 0  # groups of one number, which is their offset: of a step of 1 they are no steps
    codes = codes.masked_fill(level[:, group], 0)
    scales = scales.masked_fill(level, 1.0)
    return Numbers(codes, -offsets / scales, scales, group, bits)


def places(shards: Shards, *suffixes: str) -> dict[str, dict[str, str]]:
    """Beginnings of names that are followed by the first suffix -> names by suffix, of those that are there."""
    first = [name.removesuffix(suffixes[0]) for name in shards.specs if name.endswith(suffixes[0])]
    return {place: {s: f"{place}{s}" for s in suffixes if f"{place}{s}" in shards.specs} for place in first}


def check_words(shards: Shards, *names: str) -> None:
    """Raises ValueError where tensors are no words of 32 bits, whose codes would be read from other numbers."""
    for name in names:
        if shards.specs[name][0] != "I32":
            raise ValueError(f"{name} is {shards.specs[name][0]}")


def with_inputs(found: dict[str, Quantized], shards: Shards, suffix: str) -> dict[str, Quantized]:
    """Matrices with the factors of their layers' inputs, which are left as they are here, among their parts."""
    for names in places(shards, suffix, ".weight").values():
        made = found.get(names.get(".weight", ""))
        if made is not None:
            found[names[".weight"]] = Quantized({**made.parts, "inputs": names[suffix]}, made.shape, made.make)
    return found


def groups_of(columns: int, groups: int, config: Mapping[str, Any]) -> Tensor:
    """Each column's group, int64 [columns], of groups side by side."""
    asked = config.get("group_size")
    size = -(-columns // groups) if asked is None else int(asked)  # where nobody says it, as many as there are
    size = columns if size <= 0 else size
    if -(-columns // size) != groups:
        raise ValueError(f"{groups} groups of {size} for {columns} columns")
    return torch.arange(columns) // size


def stream(words: Tensor, bits: int, count: int) -> Tensor:
    """The first codes of a bit stream in each row of int32 [rows, words], lowest bits first: int64 [rows, count]."""
    start = torch.arange(count) * bits
    word, shift = start // 32, start % 32
    held = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    low, high = held[:, word], held[:, (word + 1).clamp(max=held.shape[1] - 1)]
    return ((low | high << 32) >> shift) & (2**bits - 1)
