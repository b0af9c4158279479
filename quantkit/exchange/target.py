"""What an export has to know of the form that it writes; the forms are in the files beside."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantkit.core.errors import QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.exchange.packed import PackedFolder

Told = Callable[[int, int, str], None]
"""Called with (units done, units in all, what comes next)."""


@dataclass(frozen=True)
class Written:
    """What became of the packed layers.

    Attributes:
        layers: that are packed in the new form too.
        dense: packed layers that became dense.
        error: the most by which a layer that stayed packed differs from what it was, |W' - W| / |W| (Frobenius).
        nbytes: of all tensors.
    """

    layers: int
    dense: tuple[str, ...]
    error: float
    nbytes: int


class Target(ABC):
    """A form of a model's folder that other programs read.

    Args:
        packed: what is exported.
        dtype: of scales and dense weights; None for what suits.

    Attributes:
        packed: the same.
        dtype: as it is to be.

    Raises:
        QuantkitError: a package is missing, or the form does not hold the model; the message says what would.
    """

    name: ClassVar[str]
    outer: ClassVar[bool] = False
    """Whether the form holds layers outside of the blocks, the embedding and the head."""

    def __init__(self, packed: PackedFolder, dtype: torch.dtype | None = None) -> None:
        self.packed, self.dtype = packed, dtype
        refused = {name: why for name, weight in self._held() if (why := self.refusal(name, weight))}
        if refused:
            name, why = next(iter(refused.items()))
            more = f" (and {len(refused) - 1} more layers)" if len(refused) > 1 else ""
            raise QuantkitError(f"{name}{more}: {self.name} does not hold {why}")

    def _held(self) -> list[tuple[str, QuantizedWeight]]:
        return [(name, weight) for name, weight in self.packed.layers.items() if self.holds(name)]

    def holds(self, layer: str) -> bool:
        """Whether a packed layer stays packed; the others become dense."""
        return self.outer or self.packed.inside(layer)

    @abstractmethod
    def refusal(self, name: str, weight: QuantizedWeight) -> str:
        """What of a layer on the meta device the form does not hold, and what would help; "" where it does."""

    @abstractmethod
    def tensors(self, name: str, weight: QuantizedWeight) -> tuple[dict[str, Tensor], Tensor]:
        """What is stored of a layer, by name, and the weight that readers make of it, fp32 [out, in].

        Raises:
            QuantkitError: the form does not hold its numbers.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """config.json."""

    def dense(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A unit's other tensors as they are stored."""
        return {name: self.cast(name, tensor) for name, tensor in tensors.items()}

    def cast(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of numbers in the type asked for.

        Raises:
            QuantkitError: numbers are too large for it.
        """
        if self.dtype is None or not tensor.is_floating_point() or tensor.dtype == self.dtype:
            return tensor
        made = tensor.to(self.dtype)
        if not torch.isfinite(made).all() and torch.isfinite(tensor).all():
            raise QuantkitError(f"{name} has numbers beyond {self.dtype}; give another `dtype`")
        return made


def difference(read: Tensor, weight: QuantizedWeight) -> float:
    """|W' - W| / |W| of what readers make of a weight, fp32 [out, in]."""
    exact = weight.dequantize(torch.float32)
    return float((read - exact).norm() / exact.norm().clamp_min(1e-30))
