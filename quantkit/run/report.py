"""What a run did and what it cost: one record, printed as a table and written as JSON."""

import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from quantkit.core.units import size
from quantkit.core.weight import QuantizedWeight


@dataclass(frozen=True)
class LayerReport:
    """A packed layer, its bits and its error.

    Attributes:
        name: full layer name.
        quantizer: the quantizer and its settings.
        format: storage format.
        bits_per_weight: measured.
        relative_error: relative proxy loss E(Q) / E(0).
        damping: with which the Hessian factored, or None.
        tuned: relative output error of the layer's block before and after it was tuned, or None; `relative_error` is
            from before.
        predicted_kl: what the layer alone is expected to cost, in nats a token, or None where that was not measured.
    """

    name: str
    quantizer: str
    format: str
    bits_per_weight: float
    relative_error: float
    damping: float | None
    tuned: tuple[float, float] | None = None
    predicted_kl: float | None = None


@dataclass(frozen=True)
class Report:
    """A run: its layers, bits, bytes, memory and time.

    Attributes:
        model: what was quantized.
        layers: packed layers in model order.
        bits_per_weight: measured over all packed layers.
        bytes_before, bytes_after: all tensors of the model.
        packed_weights, all_weights: how many weights are packed, and how many there are.
        seconds: wall-clock time of this process's part of the run.
        peak_memory_bytes: resident memory of the process, at most.
        peak_device_bytes: memory allocated on the GPU, at most; 0 without one.
        settings: everything that the result depends on.
        notes: what a user should know, such as parts that stayed dense.
    """

    model: str
    layers: tuple[LayerReport, ...]
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    packed_weights: int
    all_weights: int
    seconds: float
    peak_memory_bytes: int
    peak_device_bytes: int
    settings: dict[str, Any]
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return asdict(self)

    def remeasured(self, weights: Mapping[str, QuantizedWeight]) -> "Report":
        """The record with the formats and sizes that layers have by now, as after a merge of an adapter.

        Errors are those of the run: what has changed a layer since had another aim.

        Args:
            weights: of layers, by name, of the shapes that they had; on the meta device they do.
        """
        layers, more = [], 0
        for layer in self.layers:
            if layer.name in weights:
                weight = weights[layer.name]
                rows, columns = weight.shape
                more += weight.nbytes - round(layer.bits_per_weight * rows * columns / 8)
                layer = replace(layer, format=weight.label, bits_per_weight=weight.bits_per_weight)
            layers.append(layer)
        bits = self.bits_per_weight + 8 * more / self.packed_weights
        return replace(self, layers=tuple(layers), bits_per_weight=bits, bytes_after=self.bytes_after + more)


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int:
    """Largest memory that torch has allocated on a GPU since the run began; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def model_card(report: Report) -> str:
    """The README.md that goes beside a checkpoint: how to load it comes first."""
    percent = 100 * report.packed_weights / max(report.all_weights, 1)
    return f"""---
library_name: quantkit
tags: [quantkit, quantized]
---
# {report.model}, {report.bits_per_weight:.2f} bits per weight

**Load this checkpoint with quantkit.** Without it transformers only warns about an unknown quantization
method and then runs with random weights.

```python
import quantkit
model = quantkit.load("path/to/this/folder")
```

`AutoModelForCausalLM.from_pretrained` works too, after `import quantkit`.

- measured bits per weight: {report.bits_per_weight:.3f} in packed layers, which hold {percent:.1f}% of the weights
- size: {size(report.bytes_after)}, from {size(report.bytes_before)}
- per-layer errors and all settings: `quantkit_report.json`
"""
