"""What a run would make and need: from shapes, from its text, and from a trial of its quantizers."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from quantkit.core.device import compute_dtype, free_memory, pick_device
from quantkit.core.products import full_width
from quantkit.core.protocols import Needs
from quantkit.io.source import Loaded, Source, open_folder
from quantkit.models.experts import place
from quantkit.models.forward import BATCH_TOKENS, divided
from quantkit.models.plan import Plan, plan_needs, tied, with_own_weight
from quantkit.models.replay import REPLAY_FRACTION
from quantkit.models.structure import block_linears, context_length, linear_weight
from quantkit.run import fisher
from quantkit.run.check import LOGITS
from quantkit.run.experts import MOMENTS
from quantkit.run.processes import BUNDLE, Together
from quantkit.run.ranks import with_ranks
from quantkit.run.recipe import Recipe, sequence_length
from quantkit.run.record import model_notes
from quantkit.run.report import peak_memory_bytes
from quantkit.run.samples import LARGEST
from quantkit.run.trial import pass_seconds, rounding_seconds

IMPORTS = 1.03
"""Of this process's peak: a run that packs imports a little more than a trial."""
HEAP = 1.28
"""Resident bytes for each byte of tensors: freed ones leave holes between those that are kept (evals.dry_run)."""


@dataclass(frozen=True)
class Estimate:
    """The outcome of a run that has not been made.

    Attributes:
        layers: linear layers that would be packed.
        packed_weights, all_weights: weights in them, and in the model.
        bits_per_weight: of the packed layers; exact, from the formats' layouts, but for ranks by budget, which may
            spend less, and 4 bytes of each layer whose weights are so small or large that it has a factor.
        bytes_before, bytes_after: of all tensors; as exact.
        memory_bytes: peak of the process, roughly: what this one holds with the libraries, one block, the streams of
            activations and the largest layer's statistics and working copies.
        seconds: of the run, roughly, on this machine as it is now; without block-wise tuning.
        processes: that share the run, `memory_bytes` being what each of them takes.
        device: where the run would take place.
        notes: what a user should know, such as parts that would stay dense.
    """

    layers: int
    packed_weights: int
    all_weights: int
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    memory_bytes: int
    seconds: float
    device: str
    processes: int = 1
    notes: tuple[str, ...] = ()


@full_width()
def estimate(folder: Path, recipe: Recipe, device: str | None = None, processes: int = 1) -> Estimate:
    """Sizes of the packed model, memory and time of the run; reads its text, but no weights.

    Args:
        folder: the full-precision model.
        recipe: what would be done.
        device: where.
        processes: that are to share the run, each with such a device.

    Raises:
        QuantkitError: bad input; the message says what would work.
    """
    where = pick_device(device)
    source = open_folder(folder, compute_dtype(where), structure_only=True)
    model = source.model
    plan = recipe.plan(model)
    tokens = None
    if recipe.reads_text(plan):
        tokens = recipe.calibration.sequences(source.tokenizer(), model)
    seconds = expected_seconds(source, recipe, 0 if tokens is None else tokens.numel(), where, processes)
    laid_out = sizes(source, recipe)
    working = working_bytes(source, recipe, plan, tokens, where, processes)
    if recipe.check:
        length = sequence_length(recipe.calibration.seqlen, context_length(model))
        weights = sum(p.numel() for p in model.parameters())
        seconds += pass_seconds(2 * recipe.check * length * weights, model.dtype, where)
    return Estimate(
        layers=len(plan),
        packed_weights=laid_out.packed_weights,
        all_weights=sum(p.numel() for p in model.parameters()),
        bits_per_weight=laid_out.bits_per_weight,
        bytes_before=laid_out.bytes_before,
        bytes_after=laid_out.bytes_after,
        memory_bytes=max(int(IMPORTS * peak_memory_bytes()), resident_bytes() + working),
        seconds=seconds,
        device=str(where),
        processes=processes,
        notes=(*source.notes, *model_notes(model, plan, source.untied, recipe.rotation is not None)),
    )


@dataclass(frozen=True)
class Sizes:
    """Of a packed model, from its layout.

    Attributes:
        packed_weights: weights in packed layers.
        bits_per_weight: of these, every stored byte counted; see `Estimate`.
        bytes_before, bytes_after: of all tensors.
    """

    packed_weights: int
    bits_per_weight: float
    bytes_before: int
    bytes_after: int


def sizes(source: Source, recipe: Recipe) -> Sizes:
    """What a recipe would make of a model; its structure is of no use afterwards."""
    plan = recipe.plan(source.model)
    shapes = shapes_of(source, plan)
    packed_weights = sum(out * inner for name, (out, inner) in shapes.items() if name not in tied(plan))
    without = with_ranks(plan, dict.fromkeys(plan, 0)) if recipe.low_rank_bits else plan
    packed_bytes = sum(quantizer.layout(*shapes[name]).nbytes for name, quantizer in without.items())
    packed_bytes += int(recipe.low_rank_bits * packed_weights / 8)
    before = source.nbytes()
    if recipe.rotation is not None:
        source.rotate(recipe.rotation)
    source.settle(plan)
    dense_bytes = source.nbytes() - source.packed_nbytes(plan)
    return Sizes(packed_weights, 8 * packed_bytes / packed_weights, before, dense_bytes + packed_bytes)


def expected_seconds(source: Source, recipe: Recipe, tokens: int, device: torch.device, processes: int = 1) -> float:
    """Of a run, roughly, by trials on this machine as it is now.

    Args:
        source: the model.
        recipe: what would be done.
        tokens: of its text.
        device: where.
        processes: that share it.
    """
    plan = recipe.plan(source.model)
    shapes = shapes_of(source, plan)
    own = {name: (quantizer, shapes[name]) for name, quantizer in with_own_weight(plan).items()}
    seconds = rounding_seconds(own, device, processes, recipe.runs_back(plan))
    if recipe.reads_text(plan):
        chosen = 0 if recipe.all_experts else experts_chosen(source)
        work = multiplications(shapes, tokens, plan_needs(plan), recipe.runs_back(plan), chosen)
        batches = 1 if recipe.tuner is not None else max(1, -(-tokens // BATCH_TOKENS))
        share = len(Together(0, processes).turns(batches)) / batches
        seconds += share * pass_seconds(work, source.model.dtype, device)
    return seconds


def working_bytes(
    source: Source, recipe: Recipe, plan: Plan, tokens: Tensor | None, device: torch.device, processes: int = 1
) -> int:
    """Bytes that a run takes at once, in each of its processes, beside what the libraries hold.

    Args:
        source: the model.
        recipe: what would be done; plan: by it.
        tokens: of the calibration, int64 [sequences, seqlen], of which only the shape counts; None for none.
        device: where.
        processes: that share the run.
    """
    shapes, first = shapes_of(source, plan), Together(0, processes)  # which has most of the batches
    own = tokens
    if tokens is not None and recipe.tuner is None:
        own = torch.cat(divided(tokens, BATCH_TOKENS)[first.own])
    working = _walking_bytes(source, shapes, own, plan_needs(plan), recipe.tuner is not None, device, processes)
    if tokens is not None and recipe.runs_back(plan):
        back = torch.cat(divided(tokens, fisher.BATCH_TOKENS)[first.own])
        working = max(working, _reverse_bytes(source, shapes, back))
    if recipe.check:
        length = sequence_length(recipe.calibration.seqlen, context_length(source.model))
        working = max(working, _checking_bytes(source, (recipe.check, length), own))
    return working + (processes > 1) * (processes + 1) * BUNDLE


def shapes_of(source: Source, plan: Plan) -> dict[str, tuple[int, ...]]:
    """[out_features, in_features] of the planned layers."""
    return {name: tuple(linear_weight(source.model.get_submodule(name)).shape) for name in plan}


def _reverse_bytes(source: Source, shapes: Mapping[str, tuple[int, ...]], tokens: Tensor) -> int:
    """Bytes that the reverse pass takes: the blocks' inputs, and the head's logits or one block with its gradients."""
    model = source.model
    config, itemsize = model.config.get_text_config(), torch.empty(0, dtype=model.dtype).element_size()
    kept = tokens.numel() * config.hidden_size * itemsize * (len(source.blocks) + 1)
    kept = min(kept, int(fisher.KEPT_FRACTION * free_memory(torch.device("cpu"))))
    first = [shape for name, shape in shapes.items() if name.startswith(f"{source.prefix}.0.")]
    passing = min(tokens.numel(), fisher.BATCH_TOKENS) * 2 * sum(rows + columns for rows, columns in first) * itemsize
    block = source.block_nbytes(itemsize) + passing + 2 * 4 * sum(rows**2 for rows, _ in first)
    embedding = sum(p.numel() for p in model.get_input_embeddings().parameters()) * itemsize
    ends = 2 * embedding + 4 * 4 * tokens.shape[1] * config.vocab_size
    return kept + int(HEAP * max(block, ends))


def _checking_bytes(source: Source, held_out: tuple[int, int], tokens: Tensor | None) -> int:
    """Bytes that a run with a check takes at its end, when the streams of its calibration are still there.

    Args:
        source: of the model.
        held_out: sequences, and tokens of each.
        tokens: of the calibration, or None.
    """
    model = source.model
    itemsize = torch.empty(0, dtype=model.dtype).element_size()
    hidden = model.config.get_text_config().hidden_size
    logits = min(LOGITS, held_out[1] * model.config.get_text_config().vocab_size)
    ends = sum(p.numel() for p in model.parameters()) * itemsize - len(source.blocks) * source.block_nbytes(itemsize)
    streams = 2 * (held_out[0] * held_out[1] + (0 if tokens is None else tokens.numel())) * hidden * itemsize
    whole = sum(p.numel() for p in model.parameters()) * itemsize
    return int(HEAP * max(streams + max(0, ends) + 6 * 4 * logits, 2 * whole if whole <= LARGEST else 0))


_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""What configurations call the experts that a token passes through."""


def experts_chosen(source: Source) -> int:
    """Of a mixture's experts, how many a token passes through; 0 where the model does not say."""
    config = source.model.config.get_text_config()
    return next((int(found) for name in _CHOSEN if isinstance(found := getattr(config, name, None), int)), 0)


def multiplications(
    shapes: Mapping[str, tuple[int, ...]], tokens: int, needs: Needs, back: bool = False, chosen: int = 0
) -> float:
    """Of the calibration: two passes of the quantized stream, one of the full one, and the statistics.

    Args:
        shapes: of the layers, by name, [out_features, in_features].
        tokens: of the text.
        needs: the most that a quantizer reads.
        back: with a reverse pass: two forth, one back, and the outputs' statistics.
        chosen: of the experts side by side, how many a token passes through; 0 for all.
    """
    streams, places = 1 if needs < Needs.CROSS else 2, {name: place(name) for name in shapes}
    beside = Counter((at[0], at[2]) for at in places.values() if at is not None)
    work = 0.0
    for name, (rows, columns) in shapes.items():
        at = places[name]
        share = 1.0 if at is None or not chosen else min(1.0, chosen / beside[at[0], at[2]])
        inputs = columns**2 / 2  # layers side by side share their statistics
        reverse = 3 * rows * columns + rows**2 if back else 0
        work += share * (rows * columns * (1 + streams) + inputs * streams + reverse)
    return tokens * work


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return psutil.Process().memory_info().rss


def _walking_bytes(
    source: Source,
    shapes: Mapping[str, tuple[int, ...]],
    tokens: Tensor | None,
    needs: Needs,
    tuned: bool,
    device: torch.device,
    processes: int,
) -> int:
    """Bytes of one block, of the streams, and of the largest layer while it is quantized."""
    model = source.model
    itemsize = torch.empty(0, dtype=model.dtype).element_size()
    out_features, in_features = max(shapes.values(), key=lambda shape: shape[0] * shape[1])
    layer = 6 * 4 * out_features * in_features
    loaded = source.nbytes() if isinstance(source, Loaded) else 0
    if tokens is None:
        return loaded + source.block_nbytes(itemsize) + layer
    hidden = model.config.get_text_config().hidden_size
    inside = block_linears(model)
    widest = max(shape[1] for shape in shapes.values())
    replayed = tokens.numel() * (hidden + widest) * itemsize
    replayed = min(replayed, int(REPLAY_FRACTION * free_memory(device) / Together(0, processes).beside(device)))
    stream = tokens.numel() * hidden * itemsize + replayed
    streams = stream * (2 if needs == Needs.CROSS or tuned else 1)
    if tuned:  # the weights, their targets, gradients and the optimizer's two moments, in fp32
        layer = max(layer, 6 * source.block_nbytes(4))
    width = 3 * max(max(shape) for name, shape in shapes.items() if name in inside) + 3 * hidden  # of a block's pass
    if model.config._attn_implementation == "eager":  # writes out its scores, and their softmax
        heads = getattr(model.config.get_text_config(), "num_attention_heads", 0)  # none without attention
        width += 2 * heads * tokens.shape[1]
    passing = min(tokens.numel(), BATCH_TOKENS) * width * itemsize
    embedding = sum(p.numel() for p in model.get_input_embeddings().parameters()) * itemsize
    rounding = layer + 5 * 4 * widest**2 + _experts_moments(shapes, 2 if needs == Needs.CROSS else 1)
    return loaded + int(HEAP * (source.block_nbytes(itemsize) + streams + max(passing, rounding, embedding)))


def _experts_moments(shapes: Mapping[str, tuple[int, ...]], moments: int) -> int:
    """Bytes of the moments that all experts of a block have at once."""
    sums: dict[tuple[str, str], int] = {}
    for name, (_, columns) in shapes.items():
        if (at := place(name)) is not None:
            sums[at[0], at[2]] = sums.get((at[0], at[2]), 0) + 4 * moments * columns**2
    return min(MOMENTS, max(sums.values(), default=0))
