"""What comes out of quantizing a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantkit.core.weight import QuantizedWeight


@dataclass(frozen=True)
class LayerResult:
    """A quantized layer and what it cost.

    Attributes:
        weight: the packed weight.
        relative_error: E(Q) / E(0) with E the proxy loss tr((W - Q) H (W - Q)^T) against the quantizer's
            target; with H = I where no statistics were gathered.
        damping: the damping with which the Hessian factored, or None.
        tuned: loss of the layer's block before and after it was tuned, or None; the other figures are from before.
        predicted_kl: what the layer alone is expected to cost, in nats a token, by the curvature of the model's
            predictions (`core.metrics.predicted_kl`), or None where that was not measured.
        tokens: of an expert's layer, those of the calibration text that chose it; None for all other layers.
    """

    weight: QuantizedWeight
    relative_error: float
    damping: float | None
    tuned: tuple[float, float] | None = None
    predicted_kl: float | None = None
    tokens: int | None = None
