"""The header of a GGUF file: what it says of itself, and where its tensors lie.

Read here before any library reads the file: readers of GGUF take lengths and counts as they stand, so that a file which
ends early, or lies, ends in errors of their arrays, or in loops of 2^60 steps. Here every count is held against the
file's own length first. The layout is that of the GGUF specification, versions 2 and 3.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.core.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of metadata of one size, as `struct` has them."""
_STRING, _ARRAY = 8, 9
_DEEPEST, _LONGEST = 4, 2**16
"""Dimensions of a tensor, and bytes of its name or of a key, at most."""


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of the file.

    Attributes:
        shape: as torch has it, the last dimension first in the file.
        kind: number of its ggml type.
        offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def elements(self) -> int:
        """Numbers in it."""
        found = 1
        for size in self.shape:
            found *= size
        return found


@dataclass(frozen=True)
class Header:
    """A file's header.

    Attributes:
        metadata: scalars and texts by key; of an array its length.
        tensors: by name.
        nbytes: of the whole file.
    """

    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]
    nbytes: int


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, whatever it is called."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """The header of a file.

    Raises:
        CheckpointError: it cannot be read, is no GGUF file, of another version, or ends within its header.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(content).header()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        what = "it ends within its header" if isinstance(error, struct.error) else str(error)
        raise CheckpointError(f"{path} is truncated or damaged ({what}); fetch it anew") from error


class _Reader:
    """Walks through a header from its beginning."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at = content, len(MAGIC)

    def header(self) -> Header:
        """All of it."""
        version, tensors, entries = self._numbers("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"its GGUF version is {version}; versions 2 and 3, little-endian, are read")
        self._bound(tensors + entries, 8)
        metadata = {self._name(): self._value() for _ in range(entries)}
        found = [(self._name(), *self._place()) for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= _LONGEST:
            raise ValueError(f"general.alignment is {alignment}")
        start = -(-self._at // alignment) * alignment
        places = {name: TensorPlace(shape, kind, start + offset) for name, shape, kind, offset in found}
        if len(places) < tensors:
            raise ValueError("two tensors have one name")
        return Header(metadata, places, len(self._content))

    def _place(self) -> tuple[tuple[int, ...], int, int]:
        (count,) = self._numbers("I")
        if count > _DEEPEST:
            raise ValueError(f"a tensor has {count} dimensions")
        *sizes, kind, offset = self._numbers(f"{count}QIQ")
        return tuple(reversed(sizes)), kind, offset

    def _value(self) -> Any:
        (kind,) = self._numbers("I")
        if kind in _SCALARS:
            return self._numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"metadata has a value of type {kind}")
        inner, count = self._numbers("IQ")
        if inner in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[inner]}")
            self._bound(count, width)
            self._at += count * width
        elif inner == _STRING:
            self._bound(count, 8)
            for _ in range(count):
                self._skip()
        else:
            raise ValueError(f"metadata has an array of type {inner}")
        return count

    def _name(self) -> str:
        found = self._text()
        if len(found) > _LONGEST:
            raise ValueError("a name is longer than any that is in use")
        return found

    def _text(self) -> str:
        begin = self._at + 8
        self._skip()
        return self._content[begin : self._at].decode()

    def _skip(self) -> None:
        (length,) = self._numbers("Q")
        self._bound(length, 1)
        self._at += length

    def _bound(self, count: int, width: int) -> None:
        if count * width > len(self._content) - self._at:
            raise struct.error

    def _numbers(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{layout}", self._content, self._at)
        self._at += struct.calcsize(f"<{layout}")
        return found


def check_extents(path: Path, header: Header, block: Callable[[int], tuple[int, int] | None]) -> None:
    """Holds the places of all tensors against the file's length.

    Args:
        path: of the file, for the message.
        header: of it.
        block: a ggml type -> (numbers in a block, bytes of it); None for a type that it does not know.

    Raises:
        CheckpointError: the file ends before a tensor does, or a row is no whole number of blocks.
    """
    for name, place in header.tensors.items():
        found = block(place.kind)
        if found is None:
            raise CheckpointError(f"{path}: {name} has ggml type {place.kind}, which the package gguf does not know")
        numbers, nbytes = found
        if place.shape and place.shape[-1] % numbers:
            raise CheckpointError(f"{path} is damaged: rows of {name} are no whole blocks of {numbers}; fetch it anew")
        end = place.offset + place.elements // numbers * nbytes
        if end > header.nbytes:
            raise CheckpointError(
                f"{path} is truncated: {name} would end at byte {end:,}, the file has {header.nbytes:,}; fetch it anew"
            )
