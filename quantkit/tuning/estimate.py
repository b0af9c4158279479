"""What a run of tuning would do and hold, from shapes and from its text."""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from quantkit.core.device import compute_dtype, parse_dtype, pick_device
from quantkit.io.classes import meta_model
from quantkit.io.run_folder import RunFolder
from quantkit.io.shards import Shards
from quantkit.io.source import load_tokenizer, packed_structure
from quantkit.models.linear import put_in_places
from quantkit.models.structure import tensor_bytes
from quantkit.run.estimate import resident_bytes
from quantkit.tuning.columns import ColumnScaledLinear
from quantkit.tuning.end_to_end import averaged_steps, checked_text, is_mixed, tuned_dense, tuned_layers
from quantkit.tuning.pv import TunedLinear, moving
from quantkit.tuning.request import TuningRun

FLOAT = torch.float32.itemsize
"""Bytes of a number that is tuned, and of each that an optimizer keeps of it."""


@dataclass(frozen=True)
class TuningEstimate:
    """A run that has not been made; what is None is not estimated.

    Attributes:
        steps: of the optimizer; less where `patience` ends the run.
        step_tokens, tokens: of text in a step, and in all steps; sequences come again when all have been there.
        measurements: of the held-out sequences, the one before any step and that of the mean included.
        sequences, held_out, seqlen: of the text; tokens a sequence.
        layers: packed layers that are tuned.
        trainable: how many numbers the optimizer moves, by kind: "scales" (all that is continuous in packed layers:
            scales, zeros, codebooks, gains, corrections), "codes" (targets of weights, which codes follow),
            "corrections" (where they alone are tuned), "norms", "embeddings".
        memory: bytes by what takes them: "process" (what this one holds by now, on a CPU), "teacher", "student",
            "copies" (unpacked weights, and fp32 ones of dense tensors), "targets", "gradients", "optimizer", "mean" (of
            the last steps), "best" (the best state so far).
        memory_bytes: their sum, and so the least that the run takes on its device, roughly.
        activation_bytes: None: of the passes.
        cache_bytes: of the teacher's predictions on disk; 0 without a cache.
        seconds: None.
        device: where.
    """

    steps: int
    step_tokens: int
    tokens: int
    measurements: int
    sequences: int
    held_out: int
    seqlen: int
    layers: int
    trainable: dict[str, int]
    memory: dict[str, int]
    memory_bytes: int
    cache_bytes: int
    device: str
    activation_bytes: int | None = None
    seconds: float | None = None


def estimate(
    asked: TuningRun,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> TuningEstimate:
    """What a run would do and hold; reads its text, but no weights.

    Args:
        asked: what for.
        device, dtype, resume, overwrite: see `run`.

    Raises:
        QuantkitError: bad input, as far as the run would refuse it before it measures anything.
    """
    asked.destination(resume, overwrite)  # which may refuse them
    if asked.cache is not None:
        RunFolder(asked.cache, "a teacher's predictions")
    where, settings = pick_device(device), asked.settings
    kind = parse_dtype(dtype) or compute_dtype(where)
    tokenizer = load_tokenizer(asked.folder)
    student, teacher = packed_structure(asked.folder, kind), meta_model(asked.teacher, kind)
    if any(asked.teacher.glob("*.safetensors*")):
        Shards(asked.teacher)
    cached = asked.cache is not None
    sequences = checked_text(student, teacher, tokenizer, asked.calibration, settings, cached)
    layers, dense = tuned_layers(student, settings, is_mixed(settings, where)), tuned_dense(student, settings)
    sizes = {name: _numel(student.get_submodule(name)) for name in layers}
    put_in_places(student, layers)
    trainable = _trainable(layers, sizes, settings.pv.mode)
    trainable |= {name: sum(tensor.copy.numel() for tensor in tensors) for name, tensors in dense.items()}
    tuned = [*layers.values(), *chain.from_iterable(dense.values())]
    memory = {
        "process": resident_bytes() if where.type == "cpu" else 0,
        "teacher": tensor_bytes(teacher),
        "student": tensor_bytes(student),
        **_held(layers, sizes, trainable),
        "best": sum(tensor.nbytes for part in tuned for tensor in part.state()),
    }
    seqlen = sequences.shape[1]
    top = min(settings.top, teacher.config.get_text_config().vocab_size)
    return TuningEstimate(
        steps=settings.steps,
        step_tokens=settings.batch * seqlen,
        tokens=settings.steps * settings.batch * seqlen,
        measurements=1 + -(-settings.steps // settings.evaluate_every) + (averaged_steps(settings.steps) > 1),
        sequences=len(sequences),
        held_out=settings.held_out,
        seqlen=seqlen,
        layers=len(layers),
        trainable={name: count for name, count in trainable.items() if count},
        memory=memory,
        memory_bytes=sum(memory.values()),
        cache_bytes=sequences.numel() * top * (torch.float16.itemsize + torch.int32.itemsize) if cached else 0,
        device=str(where),
    )


def _numel(linear: Any) -> int:
    """Weights of a linear layer."""
    return int(linear.out_features * linear.in_features)


def _trainable(layers: dict[str, Any], sizes: dict[str, int], mode: str) -> dict[str, int]:
    """Numbers that the optimizer moves in packed layers of so many weights, by kind."""
    found = {"scales": 0, "codes": 0, "corrections": 0}
    for name, layer in layers.items():
        if isinstance(layer, TunedLinear):
            found["scales"] += sum(parameter.numel() for parameter in layer.parts.parameters())
            found["codes"] += sum(sizes[name] for _ in moving(layer, mode))
        else:
            found["corrections"] += layer.up.numel() + layer.down.numel()
    return found


def _held(layers: dict[str, Any], sizes: dict[str, int], trainable: dict[str, int]) -> dict[str, int]:
    """Bytes that a step takes beside the models: an unpacked weight has a gradient where it is made of what moves.

    Args:
        layers: as they are tuned.
        sizes: weights of each.
        trainable: numbers that the optimizer moves, by kind.
    """
    made = kept = 0
    for name, layer in layers.items():
        if isinstance(layer, ColumnScaledLinear):
            kept += sizes[name] * layer.kind.itemsize
        elif isinstance(layer, TunedLinear):
            made += sizes[name]
    copied, moved = trainable["norms"] + trainable["embeddings"], sum(trainable.values())
    return {
        "copies": FLOAT * (made + copied) + kept,
        "targets": FLOAT * trainable["codes"],
        "gradients": FLOAT * (made + moved),
        "optimizer": 2 * FLOAT * moved,
        "mean": FLOAT * (moved - trainable["codes"]),
    }
