"""What a run would make and need, from shapes alone."""

from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.core.device import compute_dtype, free_memory, pick_device
from quantkit.core.protocols import Needs
from quantkit.io.source import Loaded, Source, open_folder
from quantkit.models.plan import plan_needs, tied
from quantkit.models.structure import context_length, linear_weight
from quantkit.run.ranks import with_ranks
from quantkit.run.recipe import Recipe, sequence_length
from quantkit.run.report import peak_memory_bytes
from quantkit.run.sequential import REPLAY_FRACTION


@dataclass(frozen=True)
class Estimate:
    """The outcome of a run that has not been made.

    Attributes:
        layers: linear layers that would be packed.
        packed_weights, all_weights: weights in them, and in the model.
        bits_per_weight: of the packed layers; exact, from the formats' layouts, but for ranks by budget, which may
            spend less, and 4 bytes of each layer whose weights are so small or large that it has a factor.
        bytes_before, bytes_after: of all tensors; as exact.
        memory_bytes: peak of the process, roughly: torch itself, one block, the streams of activations and the
            largest layer's statistics and working copies.
        device: where the run would take place.
    """

    layers: int
    packed_weights: int
    all_weights: int
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    memory_bytes: int
    device: str


def estimate(folder: Path, recipe: Recipe, device: str | None = None) -> Estimate:
    """Sizes of the packed model and memory of the run; reads no weights.

    Args:
        folder: the full-precision model.
        recipe: what would be done.
        device: where.
    """
    where = pick_device(device)
    source = open_folder(folder, compute_dtype(where), structure_only=True)
    model = source.model
    plan = recipe.plan(model)
    shapes = {name: tuple(linear_weight(model.get_submodule(name)).shape) for name in plan}
    packed_weights = sum(out * inner for name, (out, inner) in shapes.items() if name not in tied(plan))
    without = with_ranks(plan, dict.fromkeys(plan, 0)) if recipe.low_rank_bits else plan
    packed_bytes = sum(quantizer.layout(*shapes[name]).nbytes for name, quantizer in without.items())
    packed_bytes += int(recipe.low_rank_bits * packed_weights / 8)
    before = source.nbytes()
    if recipe.rotation is not None:
        source.rotate(recipe.rotation)
    source.untie(plan)
    dense_bytes = source.nbytes() - source.packed_nbytes(plan)
    return Estimate(
        layers=len(plan),
        packed_weights=packed_weights,
        all_weights=sum(p.numel() for p in model.parameters()),
        bits_per_weight=8 * packed_bytes / packed_weights,
        bytes_before=before,
        bytes_after=dense_bytes + packed_bytes,
        memory_bytes=peak_memory_bytes()
        + (before if isinstance(source, Loaded) else 0)
        + _working_bytes(source, recipe, max(shapes.values(), key=lambda s: s[0] * s[1]), where),
        device=str(where),
    )


def _working_bytes(source: Source, recipe: Recipe, largest: tuple[int, ...], device: torch.device) -> int:
    """Bytes of one block, of the streams, and of the largest layer while it is quantized."""
    model = source.model
    itemsize = torch.empty(0, dtype=model.dtype).element_size()
    needs = plan_needs(recipe.plan(model))
    out_features, in_features = largest
    layer = 6 * 4 * out_features * in_features
    if not recipe.reads_text(recipe.plan(model)):
        return source.block_nbytes(itemsize) + layer
    tokens = recipe.calibration.num_samples * sequence_length(recipe.calibration.seqlen, context_length(model))
    hidden = model.config.get_text_config().hidden_size
    widest = max(linear_weight(module).shape[1] for module in source.linears())
    replayed = tokens * (hidden + widest) * itemsize
    replayed = min(replayed, int(REPLAY_FRACTION * free_memory(device)))
    stream = tokens * hidden * itemsize + replayed
    streams = stream * (2 if needs == Needs.CROSS or recipe.tuner else 1)
    if recipe.tuner:  # the weights, their targets, gradients and the optimizer's two moments, in fp32
        layer = max(layer, 6 * source.block_nbytes(4))
    embedding = sum(p.numel() for p in model.get_input_embeddings().parameters()) * itemsize
    return source.block_nbytes(itemsize) + layer + streams + max(embedding, 5 * 4 * widest**2)
