"""A packed weight taken apart: what of it is continuous, what is code, and which code is nearest to a target.

`tunable(weight)` gives a module whose parameters are the continuous parts in fp32 and whose call is the dequantized
weight, differentiable in them. The parts that hold codes (`coded`) can also be asked, unit by unit, for the codes
nearest to given weights; a unit is what one code stands for. Wrappers (rotations, corrections) hold other parts.

Continuous parts are stored as a reference times a parameter that begins at 1, so that one learning rate suits them all.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from quantkit.core.errors import QuantkitError
from quantkit.core.registry import names, resolve
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.dense import DenseWeight

W = TypeVar("W", bound=QuantizedWeight)
GROUP = "quantkit.tunables"


class Tunable(nn.Module, ABC):
    """A part of a packed weight; its parameters are fp32 and begin at the stored values."""

    @abstractmethod
    def forward(self) -> Tensor:
        """The weight, fp32 [out_features, in_features]."""

    @abstractmethod
    def packed(self) -> QuantizedWeight:
        """The weight as it is now, stored."""

    @abstractmethod
    def coded(self) -> Iterator["Coded"]:
        """The parts whose codes can change; outliers, which are few and finely coded, keep theirs."""


class Coded(Tunable):
    """A part with codes of its own; `latest` is what the last call gave, with its gradient once there is one."""

    latest: Tensor
    bits: float
    """Bits of a weight's code."""
    pace: ClassVar[float] = 1.0
    """Learning rate of its targets, as a fraction of `PVSettings.code_lr`."""
    moves: ClassVar[bool] = True
    """Whether its codes move where no mode is asked for."""

    def coded(self) -> Iterator["Coded"]:
        """The part itself."""
        yield self

    def forward(self) -> Tensor:
        """See `Tunable`."""
        self.latest = self.decode()
        if self.latest.requires_grad:
            self.latest.retain_grad()
        return self.latest

    @abstractmethod
    def decode(self) -> Tensor:
        """The weight, fp32 [out_features, in_features]."""

    @abstractmethod
    def units(self, weight: Tensor) -> Tensor:
        """A weight [out_features, in_features], or anything shaped like it, as units [units, size]; zeros fill up."""

    @abstractmethod
    def nearest(self, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes within the present continuous parts.

        Args:
            index: int64 [n], the units that are asked for.
            target: [n, size].

        Returns:
            (codes [n, ...], the weights that they stand for [n, size]).
        """

    @abstractmethod
    def assign(self, index: Tensor, codes: Tensor) -> None:
        """Gives units `index` [n] other codes [n, ...], as `nearest` returns them."""


class Scaled(nn.Module):
    """A tensor as a fixed reference times a parameter.

    Attributes:
        reference: fp32, of the tensor's shape or a single one.
        parameter: fp32, of the tensor's shape.

    Args:
        value: the tensor at the beginning.
        each: every element is its own reference; else all share the root of their mean square.
    """

    reference: Tensor

    def __init__(self, value: Tensor, each: bool = False) -> None:
        super().__init__()
        value = value.detach().float()
        reference = value if each else value.square().mean().sqrt()
        reference = torch.where(reference == 0, torch.ones_like(reference), reference)
        self.register_buffer("reference", reference)
        self.parameter = nn.Parameter(value / reference)

    def forward(self) -> Tensor:
        """The tensor as it is now, fp32 of its own shape [...]."""
        return self.reference * self.parameter


class TunableFields(Tunable):
    """Any format by its schema: tensors that are marked continuous move, weights inside are taken apart, codes stay.

    Args:
        weight: whose `dequantize` is differentiable in those tensors and in what is inside.

    Raises:
        QuantkitError: nothing of it is continuous.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        schema, inside = weight.schema(), weight.nested()
        moving = {name: tensor for name, tensor in weight.tensors().items() if schema[name].continuous}
        if not moving and not inside:
            raise QuantkitError(
                f"a weight in the format {weight.format!r} cannot be tuned: its schema marks no tensor as continuous"
            )
        self._weight = replace(weight, **{name: described(one) for name, one in inside.items()})
        self._inside = {name: tunable(one) for name, one in inside.items()}
        self._moving = {name: Scaled(tensor) for name, tensor in moving.items()}
        self._dtypes = {name: tensor.dtype for name, tensor in moving.items()}
        self.parts = nn.ModuleList([*self._inside.values(), *self._moving.values()])  # which a module must know of

    def coded(self) -> Iterator["Coded"]:
        """The parts with codes of the weights inside."""
        for part in self._inside.values():
            yield from part.coded()

    def forward(self) -> Tensor:
        """What the format dequantizes, fp32 [out_features, in_features], with the parts as they are now.

        Raises:
            QuantkitError: no gradient comes back from there.
        """
        fields = {name: DenseWeight(part()) for name, part in self._inside.items()}
        moving = {name: part() for name, part in self._moving.items()}
        weight = replace(self._weight, **fields, **moving).dequantize()
        if torch.is_grad_enabled() and not weight.requires_grad:
            raise QuantkitError(
                f"a weight in the format {self._weight.format!r} cannot be tuned: its dequantize is not differentiable"
            )
        return weight

    @torch.no_grad()
    def packed(self) -> QuantizedWeight:
        """See `Tunable`."""
        fields = {name: part.packed() for name, part in self._inside.items()}
        moving = {name: storable(part(), self._dtypes[name]) for name, part in self._moving.items()}
        return replace(self._weight, **fields, **moving)


def tunable(weight: QuantizedWeight) -> Tunable:
    """A packed weight taken apart: as its format's entry in `quantkit.tunables` does it, else by its schema.

    Raises:
        QuantkitError: its format does not say what is continuous.
    """
    kind: Callable[[QuantizedWeight], Tunable] = TunableFields
    if weight.format in names(GROUP):
        kind = resolve(GROUP, weight.format)
    return kind(weight)


def described(weight: W) -> W:
    """A weight's layout, without its tensors."""
    return weight.map(lambda tensor: tensor.detach().to("meta"))


def storable(values: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """Values [...] in the type of a checkpoint, finite: what grows beyond it stays at its largest."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)
