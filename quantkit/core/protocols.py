"""The protocols that plugins fill."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.core.result import LayerResult
    from quantkit.core.stats import LayerStats
    from quantkit.core.weight import QuantizedWeight


class Needs(IntEnum):
    """What a quantizer must be given, from cheap to dear."""

    NOTHING = 0  # the weight alone
    HESSIAN = 1  # inputs behind the quantized prefix
    CROSS = 2  # those, and the same tokens' inputs in the full-precision model


@runtime_checkable
class Quantizer(Protocol):
    """One method with its settings: a frozen dataclass, pure in (weight, stats)."""

    @property
    def needs(self) -> Needs:
        """The statistics that `quantize` reads."""
        ...

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> QuantizedWeight:
        """Quantizes a weight.

        Args:
            weight: fp32 or fp64 [out_features, in_features].
            stats: statistics of the layer's inputs; None where `needs` is NOTHING.
        """
        ...

    def layout(self, out_features: int, in_features: int) -> QuantizedWeight:
        """What `quantize` would return for this shape, on the meta device: exact sizes without data."""
        ...


class LayerHook(Protocol):
    """What a walk over a model does with each layer."""

    def needs(self, name: str) -> Needs:
        """The statistics that a layer's call reads."""

    def __call__(self, name: str, weight: Tensor, stats: LayerStats | None) -> LayerResult:
        """Packs a layer.

        Args:
            name: of the layer, in full.
            weight: fp32 [out_features, in_features].
            stats: of the layer's inputs; None where `needs` is NOTHING. Layers that are fed by the same tensor share
                them.
        """
