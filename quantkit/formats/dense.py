"""Dense: a weight kept in its own floating-point type, for layers that a plan names but leaves alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.weight import QuantizedWeight


@dataclass(frozen=True, eq=False)
class DenseWeight(QuantizedWeight, format="dense"):
    """weight: any float dtype [out_features, in_features]."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.weight.shape[0], self.weight.shape[1]

    def validate(self) -> None:
        """Checks that the weight is finite."""
        if not self.weight.is_meta and not bool(torch.isfinite(self.weight).all()):
            raise ValueError("weight holds NaN or Inf")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight itself."""
        return self.weight.to(dtype)

    @property
    def by_rows(self) -> bool:
        """Yes."""
        return True

    def _rows(self, index: Tensor) -> Tensor:
        """The rows themselves."""
        return self.weight.index_select(0, index)
