"""ordered: any weight whose input features come in another order, as groups by activation order leave them.

W[:, order] = base        y = base x[order]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.schema import TensorSpec
from quantkit.core.weight import QuantizedWeight


@dataclass(frozen=True, eq=False)
class OrderedWeight(QuantizedWeight, format="ordered"):
    """A weight behind an order of its inputs.

    Attributes:
        base: [out_features, in_features].
        order: int32 [in_features], a permutation: which input each column of the base is for.
    """

    base: QuantizedWeight
    order: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.base.shape

    def schema(self) -> dict[str, TensorSpec]:
        """The order, which nothing moves."""
        return {"order": TensorSpec(torch.int32, (self.shape[1],))}

    def _check_values(self) -> None:
        if not torch.equal(self.order.sort().values, torch.arange(self.shape[1], device=self.order.device)):
            raise self._refused("order", self.order, "each input once")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features]: the base's columns, each at its place."""
        dense = self.base.dequantize(dtype)
        return torch.empty_like(dense).index_copy_(1, self.order.long(), dense)

    @property
    def by_rows(self) -> bool:
        """True where the base reads single rows."""
        return self.base.by_rows

    def _rows(self, index: Tensor) -> Tensor:
        """Rows of the base, each number at its place."""
        rows = self.base.rows(index)
        return torch.empty_like(rows).index_copy_(1, self.order.long(), rows)

    @property
    def cpu_slowdown(self) -> float:
        """The base's: inputs are few beside weights."""
        return self.base.cpu_slowdown

    def _cut(self, dim: int, start: int, stop: int) -> QuantizedWeight:
        """Outputs where the base can be; inputs of one part lie all over the base."""
        if dim == 1:
            raise self._uncut(dim, "has its inputs in an order of its own")
        return OrderedWeight(self.base.cut(dim, start, stop), self.order)

    @classmethod
    def concatenated(cls, weights: Sequence[QuantizedWeight]) -> OrderedWeight | None:
        """One weight with the outputs of all, where their inputs are in one order and the bases go together.

        Layers that read the same inputs are rounded by the same moments, and so have the same order.
        """
        parts = [weight for weight in weights if isinstance(weight, OrderedWeight)]
        order = parts[0].order
        base = QuantizedWeight.side_by_side([part.base for part in parts])
        alike = base is not None and all(torch.equal(part.order, order) for part in parts)
        return cls(base, order) if base is not None and alike else None

    def split(self, sizes: Sequence[int]) -> list[QuantizedWeight]:
        """Views of `sizes` outputs each."""
        return [OrderedWeight(base, self.order) for base in self.base.split(sizes)]

    def prepare(self) -> None:
        """Prepares the base."""
        self.base.prepare()

    def matmul(
        self, x: Tensor, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None
    ) -> Tensor:
        """[..., in_features] -> [..., out_features]: the base's product with the inputs in its order."""
        own_down = None if down is None else down.index_select(1, self.order)
        return self.base.matmul(x.index_select(-1, self.order), bias, up, own_down)
