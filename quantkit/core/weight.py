"""QuantizedWeight: what a quantizer returns, a checkpoint stores and a linear layer multiplies by.

A storage format is a frozen dataclass. Its tensor fields are the payload, fields that are themselves
QuantizedWeights nest (tensor names are joined with dots), and every other field is JSON metadata.
State, loading, device moves and measured size follow from the fields; layout and validation from the
`schema` that a format declares. It adds `dequantize` and, where it has a kernel, `matmul`.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from quantkit.core.errors import CheckpointError
from quantkit.core.registry import resolve
from quantkit.core.schema import DTYPES, TensorSpec, check_metadata, dtype_name, field_types, fits, in_words

W = TypeVar("W", bound="QuantizedWeight")
UNPACKED_EACH_TIME = 20.0
"""`cpu_slowdown` of weights that are unpacked in each product, by torch's operations."""
SIDES = ("outputs", "inputs")
"""What the dimensions of a weight are."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight(ABC):
    """A linear layer's weight [out_features, in_features] in some storage format."""

    format: ClassVar[str]

    def __init_subclass__(cls, format: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.format = format

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    @property
    def label(self) -> str:
        """The format in few words, with what it wraps: "rotated(pyramid D=8 K=6)"."""
        inner = ", ".join(weight.label for weight in self.nested().values())
        return f"{self.format}({inner})" if inner else self.format

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the payload stands for, [out_features, in_features]."""

    @property
    def by_rows(self) -> bool:
        """Whether `rows` reads no more than the rows that it is asked for."""
        return False

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of the weight, as an embedding gives them.

        Args:
            index: int32 or int64 [...], of output features.
            dtype: of the result.

        Returns:
            [..., in_features], what `dequantize` gives there.

        Raises:
            IndexError: an index is negative or too large; on a GPU, as from torch's embedding, an assertion there.
        """
        return self._rows(index.reshape(-1)).to(dtype).view(*index.shape, self.shape[1])

    def _rows(self, index: Tensor) -> Tensor:
        """Rows [n, in_features] for an index [n]; by default the whole weight is dequantized for it, each time."""
        return self.dequantize().index_select(0, index)

    def matmul(
        self, x: Tensor, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None
    ) -> Tensor:
        """x @ (weight + up @ down)^T + bias for x [..., in_features]; result [..., out_features] in x's dtype.

        Args:
            x: the inputs.
            bias: [out_features].
            up, down: a correction of low rank, [out_features, rank] and [rank, in_features] in x's dtype, or neither.
        """
        y = torch.nn.functional.linear(x, self.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
        return corrected(y, x, up, down)

    @staticmethod
    def side_by_side(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
        """One weight with the outputs of all, in order; None where their format cannot, or they are unlike."""
        return type(weights[0]).concatenated(weights) if len({type(weight) for weight in weights}) == 1 else None

    @classmethod
    def concatenated(cls, weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
        """`side_by_side` for weights of this format."""
        return None

    @staticmethod
    def stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
        """The weights of experts as one: each tensor holds theirs, with a dimension in front; None where they differ.

        Such a stack has nothing but `chosen` and `part`.
        """
        first = weights[0]
        if any(weight.metadata() != first.metadata() for weight in weights[1:]):
            return None
        fields: dict[str, Any] = {name: torch.stack([w.tensors()[name] for w in weights]) for name in first.tensors()}
        for name in first.nested():
            fields[name] = QuantizedWeight.stacked([weight.nested()[name] for weight in weights])
        return first._changed(fields)

    def part(self, index: int) -> QuantizedWeight:
        """One of the weights of a stack; its tensors are views."""
        return self.map(lambda tensor: tensor[index])

    def chosen(self, x: Tensor, experts: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """Of a stack on a GPU: each row's products with the experts that it chose, in one launch.

        Args:
            x: [rows, in_features].
            experts: int [pairs], those of the first row, then those of the second, and so on.
            bias: [experts, out_features].

        Returns:
            [pairs, out_features] in x's dtype; None where the format has no such kernel for these numbers.
        """
        return None

    def split(self, sizes: Sequence[int]) -> list[QuantizedWeight]:
        """The inverse of `side_by_side`: views of `sizes` outputs each.

        Raises:
            NotImplementedError: this format is not put side by side.
        """
        raise NotImplementedError(f"{self.format} does not split")

    def cut(self, dim: int, start: int, stop: int) -> QuantizedWeight:
        """A part of the weight, packed as it is: one of several that machines share the layer in.

        Args:
            dim: 0 for outputs, 1 for inputs.
            start, stop: the first of them, and the one behind the last.

        Returns:
            `dequantize()[start:stop]`, or `[:, start:stop]`, in this format; views where they can be.

        Raises:
            ValueError: there are no such features, or the format keeps what lies around a border together.
        """
        size = self.shape[dim]
        if not 0 <= start < stop <= size:
            raise ValueError(f"{SIDES[dim]} {start} to {stop} are none of {size}")
        return self if (start, stop) == (0, size) else self._cut(dim, start, stop)

    def _cut(self, dim: int, start: int, stop: int) -> QuantizedWeight:
        """`cut` for a part that is not the whole."""
        raise self._uncut(dim, f"keeps all {self.shape[dim]} together")

    def _uncut(self, dim: int, why: str) -> ValueError:
        return ValueError(f"{self.format} {why} ({SIDES[dim]})")

    def _cut_at(self, dim: int, start: int, stop: int, step: int, what: str) -> tuple[int, int]:
        """The first of the pieces of `step` features that a part has, and the one behind its last."""
        if start % step or (stop % step and stop < self.shape[dim]):
            raise self._uncut(dim, f"divides between {what} of {step}, not at {start} and {stop}")
        return start // step, -(-stop // step)

    @property
    def cpu_slowdown(self) -> float:
        """Time of a product with one row on a CPU, in times of a dense fp32 one's of a large layer.

        `python -m quantkit.evals.cpu_decode` measures it. Formats without compiled loops are unpacked in each product.
        """
        return UNPACKED_EACH_TIME

    def prepared(self) -> QuantizedWeight:
        """The form in which products take this weight, where its tensors are; itself where it is as stored."""
        return self._with({name: weight.prepared() for name, weight in self.nested().items()})

    def stored(self) -> QuantizedWeight:
        """The form that a checkpoint has, of a weight that was `prepared`."""
        return self._with({name: weight.stored() for name, weight in self.nested().items()})

    def divides(self, sizes: Sequence[int]) -> bool:
        """Whether `split` gives views for these sizes."""
        return all(weight.divides(sizes) for weight in self.nested().values())

    def _with(self, nested: dict[str, QuantizedWeight]) -> QuantizedWeight:
        changed = {name: weight for name, weight in nested.items() if weight is not getattr(self, name)}
        return self._changed(changed) if changed else self

    def _changed(self: W, fields: Mapping[str, Any]) -> W:
        return dataclasses.replace(self, **fields)

    def prepare(self) -> None:  # noqa: B027  (most formats have nothing to prepare)
        """Called when the tensors have come to where they will be used."""

    @abstractmethod
    def schema(self) -> Mapping[str, TensorSpec]:
        """What each tensor field must be, from the other fields, and from a tensor's own size where no field has it.

        It is asked once the fields are of their types, weights inside are valid and `_check_fields` has passed.
        """

    def laid_out(self: W) -> W:
        """The same weight on the meta device, with tensors, where they are not None, as the schema gives them."""
        schema = self.schema()
        return self._changed({name: schema[name].empty(tensor.dtype) for name, tensor in self.tensors().items()})

    def validate(self) -> None:
        """Checks that no kernel can read out of bounds, and that numbers are finite; allocates nothing on meta.

        Raises:
            ValueError: a field of another type or out of its range, a tensor that is missing or is not what the schema
                gives, or that holds NaN or Inf; here or in a weight inside.
        """
        for name, hint in field_types(type(self)).items():
            if not fits(value := getattr(self, name), hint):
                raise self._refused(name, value, inspect.formatannotation(hint))
        for name, weight in self.nested().items():
            try:
                weight.validate()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            if not weight.state():
                raise self._refused(name, weight.label, "a weight with tensors")
        self._check_fields()
        if min(self.shape) < 1:
            raise self._refused("its shape", list(self.shape), "at least one feature on either side")
        schema, tensors = self.schema(), self.tensors()
        for name in [*schema, *(tensors.keys() - schema.keys())]:
            tensor, spec = tensors.get(name), schema.get(name)
            if spec is None or not spec.fits(tensor):
                raise self._refused(name, tensor, spec or "no such tensor")
            if tensor is not None and tensor.is_floating_point() and not tensor.is_meta and not _finite(tensor):
                raise ValueError(f"{name} holds NaN or Inf")
        if not any(tensor.is_meta for tensor in tensors.values()):
            self._check_values()

    def _check_fields(self) -> None:  # noqa: B027  (not all fields have ranges)
        """Raises ValueError where a field that is no tensor is out of its range."""

    def _check_values(self) -> None:  # noqa: B027  (of most codes any bits are valid)
        """Raises ValueError where a tensor, of the schema's dtype and shape, holds what stands for nothing."""

    def _refused(self, name: str, found: Any, wanted: Any) -> ValueError:
        return ValueError(f"{name} is {in_words(found)}; {self.format} takes {wanted}")

    def tensors(self) -> dict[str, Tensor]:
        """This level's tensor fields, of the shapes and dtypes of `schema` (a field that is None is left out)."""
        return {k: v for k, v in self._fields().items() if isinstance(v, Tensor)}

    def nested(self) -> dict[str, QuantizedWeight]:
        """This level's fields that are quantized weights."""
        return {k: v for k, v in self._fields().items() if isinstance(v, QuantizedWeight)}

    def state(self) -> dict[str, Tensor]:
        """All tensors, each of the shape that `schema` gives, by dotted name: the checkpoint payload."""
        state = self.tensors()
        for name, weight in self.nested().items():
            state |= {f"{name}.{key}": tensor for key, tensor in weight.state().items()}
        return state

    def metadata(self) -> dict[str, Any]:
        """JSON: the format's name, all other fields, and the dtype and shape of each tensor."""
        meta: dict[str, Any] = {"format": self.format}
        for name, value in self._fields().items():
            if isinstance(value, QuantizedWeight):
                meta[name] = value.metadata()
            elif value is not None and not isinstance(value, Tensor):
                meta[name] = value
        meta["tensors"] = {k: [dtype_name(v.dtype), list(v.shape)] for k, v in self.tensors().items()}
        return meta

    @staticmethod
    def from_state(metadata: Mapping[str, Any], state: Mapping[str, Tensor]) -> QuantizedWeight:
        """The inverse of `metadata` and `state`.

        Raises:
            CheckpointError: the metadata are damaged, or a tensor is missing or differs from them in dtype or shape.
            UnknownName: no installed package knows the format.
        """
        check_metadata(metadata)
        fields: dict[str, Any] = {}
        for name, value in metadata.items():
            if isinstance(value, Mapping) and "format" in value:
                prefix = f"{name}."
                inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                fields[name] = QuantizedWeight.from_state(value, inner)
            elif name not in ("format", "tensors"):
                fields[name] = value
        for name, (dtype, shape) in metadata["tensors"].items():
            wanted, found = TensorSpec(DTYPES[dtype], tuple(shape)), state.get(name)
            if found is None or not wanted.fits(found):
                raise CheckpointError(
                    f"tensor {name!r} is {in_words(found)}; the checkpoint's config declares it as {wanted}"
                )
            fields[name] = found
        try:
            weight: QuantizedWeight = resolve("quantkit.formats", metadata["format"])(**fields)
        except TypeError as error:
            raise CheckpointError(f"format {metadata['format']!r} does not fit its metadata: {error}") from error
        return weight

    @staticmethod
    def empty(metadata: Mapping[str, Any]) -> QuantizedWeight:
        """A weight of the described layout, on the meta device: nothing is allocated.

        Raises:
            CheckpointError: the metadata are damaged.
            UnknownName: no installed package knows the format.
        """
        check_metadata(metadata)
        return QuantizedWeight.from_state(metadata, _empty_state(metadata))

    def map(self: W, fn: Callable[[Tensor], Tensor]) -> W:
        """The same weight with `fn` applied to every tensor, e.g. a move to another device.

        Args:
            fn: keeps a tensor's shape [...].
        """
        changes: dict[str, Any] = {name: fn(tensor) for name, tensor in self.tensors().items()}
        changes |= {name: weight.map(fn) for name, weight in self.nested().items()}
        return self._changed(changes)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state().values())

    @property
    def bits_per_weight(self) -> float:
        """Measured: every stored byte, over the number of weights."""
        out_features, in_features = self.shape
        return 8 * self.nbytes / (out_features * in_features)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files hold the fields, and nothing that was derived from them."""
        return self._fields()

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def corrected(y: Tensor, x: Tensor, up: Tensor | None, down: Tensor | None) -> Tensor:
    """y + (x @ down^T) @ up^T, for products whose kernel does not add the correction itself.

    Args:
        y: [..., out_features].
        x: [..., in_features].
        up, down: [out_features, rank] and [rank, in_features], or neither.
    """
    return y if up is None or down is None else y + (x @ down.T) @ up.T


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.half() if tensor.element_size() == 1 else tensor).all())  # no such test of fp8


def _empty_state(metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    described = metadata["tensors"].items()
    state = {name: TensorSpec(DTYPES[dtype], tuple(shape)).empty() for name, (dtype, shape) in described}
    for name, value in metadata.items():
        if isinstance(value, Mapping) and "format" in value:
            state |= {f"{name}.{key}": tensor for key, tensor in _empty_state(value).items()}
    return state
