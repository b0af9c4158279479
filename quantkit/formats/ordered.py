"""ordered: any weight whose input features come in another order, as groups by activation order leave them.

W[:, order] = base        y = base x[order]
"""

from __future__ import annotations

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

    def prepare(self) -> None:
        """Prepares the base."""
        self.base.prepare()

    def matmul(
        self, x: Tensor, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None
    ) -> Tensor:
        """[..., in_features] -> [..., out_features]: the base's product with the inputs in its order."""
        own_down = None if down is None else down.index_select(1, self.order)
        return self.base.matmul(x.index_select(-1, self.order), bias, up, own_down)
