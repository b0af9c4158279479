"""What the fields of a storage format must be: declared once by each format, and what is there is held against it.

A format's `schema` gives a TensorSpec for each of its tensors, from its other fields. Its layout, the checks of what a
file declares or holds, and which of its tensors tuning may move follow from that.
"""

import math
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from quantkit.core.errors import CheckpointError

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights that are not packed."""
DEEPEST = 8
"""Weights in weights that a checkpoint may have."""
_NAMES = "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64"
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in (*_NAMES.split(), "float8_e4m3fn", "float8_e5m2")
}
"""What safetensors files can hold."""


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of a storage format must be.

    Attributes:
        dtype: of the stored tensor; several where the format leaves a choice, the usual one first.
        shape: of the stored tensor.
        continuous: whether its values may move by gradients, as scales, levels and centroids may; codes may not.
        optional: whether a weight may do without it.
    """

    dtype: torch.dtype | tuple[torch.dtype, ...]
    shape: tuple[int, ...]
    continuous: bool = False
    optional: bool = False

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """All dtypes that are allowed."""
        return self.dtype if isinstance(self.dtype, tuple) else (self.dtype,)

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """Such a tensor [shape] on the meta device, of this dtype where the format leaves that choice."""
        return torch.empty(self.shape, dtype=dtype if dtype in self.dtypes else self.dtypes[0], device="meta")

    def fits(self, tensor: Tensor | None) -> bool:
        """Whether a tensor, or None where there is none, is of this dtype and shape."""
        if tensor is None:
            return self.optional
        return tensor.dtype in self.dtypes and tuple(tensor.shape) == self.shape

    def __str__(self) -> str:
        return f"{' or '.join(map(dtype_name, self.dtypes))} {list(self.shape)}"


def in_words(value: Any) -> str:
    """What a field holds, on one short line; of a tensor its dtype and shape: "float16 [2, 768]"."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    return "missing" if value is None else reprlib.repr(value)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name in metadata: "float16"."""
    return str(dtype).removeprefix("torch.")


def extent(tensor: Tensor, dimension: int) -> int:
    """The size of a tensor [...] along a dimension; 0 where it has no such dimension."""
    return tensor.shape[dimension] if tensor.dim() > dimension else 0


def unset(*sizes: int) -> Tensor:
    """A tensor [sizes] on the meta device that stands for such a one until `QuantizedWeight.laid_out` replaces it."""
    return torch.empty(sizes, device="meta")


@lru_cache
def field_types(kind: type) -> dict[str, Any]:
    """The annotation of each field of a dataclass, by name."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def fits(value: Any, hint: Any) -> bool:
    """Whether a field's value is of its annotated type; a bool is no int, an int is below 2^63, a float is finite."""
    kind, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if kind is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if kind in (list, tuple):  # a file knows lists alone
        return isinstance(value, list | tuple) and all(fits(item, arguments[0]) for item in value)
    if hint is int:
        return type(value) is int and abs(value) < 2**63
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return isinstance(value, NoneType if hint is None else kind or hint)


def check_metadata(metadata: Any, depth: int = 0) -> None:
    """Refuses metadata of a weight from which no tensors could be made, before any is.

    Raises:
        CheckpointError: they name no format or describe no tensors, here or in a weight inside.
    """
    entries = metadata.get("tensors") if isinstance(metadata, Mapping) else None
    described = isinstance(entries, Mapping) and all(map(_describes_tensor, entries.values()))
    if not described or not isinstance(metadata.get("format"), str):
        raise CheckpointError("a packed layer's metadata lack its format or its tensors; the checkpoint is damaged")
    if depth > DEEPEST:
        raise CheckpointError(f"a packed layer's metadata hold weights in weights, {depth} deep; that is damage")
    for value in metadata.values():
        if isinstance(value, Mapping) and "format" in value:
            check_metadata(value, depth + 1)


def _describes_tensor(entry: Any) -> bool:
    """Whether an entry of metadata is [dtype, shape] of a tensor that a machine could hold."""
    if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], list | tuple):
        return False
    name, shape = entry
    whole = isinstance(name, str) and name in DTYPES and all(type(size) is int and size >= 0 for size in shape)
    return whole and len(shape) <= 8 and math.prod(max(1, size) for size in shape) < 2**48
