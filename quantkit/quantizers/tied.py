"""Tied: an embedding shares the packed weight of another layer, as a rule the head's."""

from dataclasses import dataclass

from torch import Tensor

from quantkit.core.protocols import Needs
from quantkit.core.stats import LayerStats
from quantkit.formats.tied import TiedWeight


@dataclass(frozen=True)
class Tied:
    """Stores nothing of its own.

    Attributes:
        layer: whose weight it is.
    """

    layer: str

    @property
    def needs(self) -> Needs:
        """Nothing: the other layer's quantizer decides."""
        return Needs.NOTHING

    def quantize(self, weight: Tensor, stats: LayerStats | None = None) -> TiedWeight:
        """Where the weight is."""
        return self.layout(weight.shape[0], weight.shape[1])

    def layout(self, out_features: int, in_features: int) -> TiedWeight:
        """Where the weight is."""
        return TiedWeight(self.layer, out_features, in_features)
