"""tied: an embedding that looks up the rows of another layer's weight, which is stored there and counted there."""

from dataclasses import dataclass
from typing import NoReturn

import torch

from quantkit.core.schema import TensorSpec
from quantkit.core.weight import QuantizedWeight


@dataclass(frozen=True, eq=False)
class TiedWeight(QuantizedWeight, format="tied"):
    """Stands in a checkpoint's list of layers for the weight of another one.

    Attributes:
        layer: that one's name.
        out_features, in_features: of its weight.
    """

    layer: str
    out_features: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def label(self) -> str:
        """The layer whose weight it is."""
        return f"tied to {self.layer}"

    def schema(self) -> dict[str, TensorSpec]:
        """No tensors."""
        return {}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> NoReturn:
        """Gives nothing.

        Raises:
            ValueError: always; the weight is elsewhere.
        """
        raise ValueError(f"the weight is that of {self.layer}; ask it")
