"""Dense: a weight kept in its own floating-point type, for layers that a plan names but leaves alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.schema import FLOATING, TensorSpec, extent
from quantkit.core.weight import QuantizedWeight


@dataclass(frozen=True, eq=False)
class DenseWeight(QuantizedWeight, format="dense"):
    """A weight that is not packed.

    Attributes:
        weight: fp16, bf16, fp32 or fp64 [out_features, in_features].
    """

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return extent(self.weight, 0), extent(self.weight, 1)

    def schema(self) -> dict[str, TensorSpec]:
        """The weight; no tuning moves it, for it has no parts."""
        return {"weight": TensorSpec(FLOATING, self.shape)}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features]: the weight itself."""
        return self.weight.to(dtype)

    @property
    def by_rows(self) -> bool:
        """True: its rows are those of the tensor."""
        return True

    def _cut(self, dim: int, start: int, stop: int) -> QuantizedWeight:
        """At any border."""
        return DenseWeight(self.weight.narrow(dim, start, stop - start))

    def _rows(self, index: Tensor) -> Tensor:
        """The rows themselves."""
        return self.weight.index_select(0, index)
