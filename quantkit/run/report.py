"""What a run did and what it cost: one record, printed as a table and written as JSON."""

import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

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
        tokens: of an expert's layer, those of the calibration text that chose it; None for all other layers.
    """

    name: str
    quantizer: str
    format: str
    bits_per_weight: float
    relative_error: float
    damping: float | None
    tuned: tuple[float, float] | None = None
    predicted_kl: float | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Check:
    """What the packed model does to held-out text beside the full one, as a run measures at its end.

    Attributes:
        source: the text: a dataset's name, a file, or "documents".
        sequences, seqlen: sequences, and their tokens.
        tokens: scored: all but the first of each sequence.
        kl, kl_se: mean KL(full || packed) in nats a token, and its standard error over sequences.
        top1_agreement: fraction of places where both models' first choices are the same token.
        flip_rate: fraction of places where exactly one of the two has the true token as its first choice.
        baseline_perplexity, perplexity: of the full model and of the packed one.
        seconds: of the run's time that it took.
    """

    source: str
    sequences: int
    seqlen: int
    tokens: int
    kl: float
    kl_se: float
    top1_agreement: float
    flip_rate: float
    baseline_perplexity: float
    perplexity: float
    seconds: float

    def kl_text(self, digits: int = 5) -> str:
        """KL and its standard error, as far as one sequence or more tell it."""
        return f"{self.kl:.{digits}f}" + (f" ± {self.kl_se:.{digits}f}" if self.sequences > 1 else "")

    @property
    def where(self) -> str:
        """How much text it is, in words."""
        return f"{self.sequences} held-out sequence{'s' * (self.sequences > 1)} of {self.seqlen} tokens"


@dataclass(frozen=True)
class Piece:
    """A token of a text, and what both models would have put there.

    Attributes:
        text: the token's, or that of several which are characters only together.
        choices: first choices of the full model and of the packed one where they differ, else None.
    """

    text: str
    choices: tuple[str, str] | None = None


@dataclass(frozen=True)
class Continuation:
    """A prompt, and how the full and the packed model go on with it, always taking their first choice."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Samples:
    """Text that shows what the packed model does, for readers.

    Attributes:
        texts: beginnings of held-out sequences.
        continuations: of the first tokens of some of them.
        left_out: why there are no continuations, or "".
    """

    texts: tuple[tuple[Piece, ...], ...]
    continuations: tuple[Continuation, ...] = ()
    left_out: str = ""


@dataclass(frozen=True)
class Tuning:
    """What tuning a packed model end to end has gained.

    Attributes:
        teacher: the full-precision model, as it was given.
        sequences, seqlen: held-out sequences that were measured on, and their tokens.
        steps: of the optimizer, at each measurement.
        kl: to the teacher in nats a token, at each measurement; the model is that of the least. At the last step it is
            that of the state or of the mean of the last steps, whichever is lower.
    """

    teacher: str
    sequences: int
    seqlen: int
    steps: tuple[int, ...]
    kl: tuple[float, ...]

    @property
    def kl_text(self) -> str:
        """KL before and after."""
        return f"{self.kl[0]:.5f} → {min(self.kl):.5f}"


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
        check: what the packed model does to held-out text; None where nobody measured it.
        samples: such text; no part of the JSON.
        tuning: of the packed model afterwards; None where it was not tuned end to end. Layers' errors are from before.
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
    check: Check | None = None
    samples: Samples | None = None
    tuning: Tuning | None = None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Report":
        """What `to_json` gave, without the samples.

        Raises:
            AttributeError, LookupError, TypeError, ValueError: it is something else.
        """
        found = {one.name: record[one.name] for one in fields(cls) if one.name in record}
        layers = [layer | {"tuned": layer["tuned"] and tuple(layer["tuned"])} for layer in record["layers"]]
        found |= {"layers": tuple(LayerReport(**layer) for layer in layers), "notes": tuple(record["notes"])}
        if (check := found.get("check")) is not None:
            found["check"] = Check(**check)
        if (tuning := found.get("tuning")) is not None:
            found["tuning"] = Tuning(**tuning | {name: tuple(tuning[name]) for name in ("steps", "kl")})
        return cls(**found)

    @property
    def bits_model(self) -> float:
        """Bits per weight of the whole model, dense tensors and all."""
        return 8 * self.bytes_after / max(self.all_weights, 1)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        found = {name: value for name, value in asdict(self).items() if name != "samples"}
        return found | {"bits_model": self.bits_model}

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
