"""A recipe applied to a folder of shards, with one block in memory at a time; and what runs have in common."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core import spec
from quantkit.core.device import compute_dtype, pick_device
from quantkit.core.result import LayerResult
from quantkit.core.weight import QuantizedWeight
from quantkit.io.checkpoint import CheckpointWriter, check_output
from quantkit.io.source import ModelFolder, load_tokenizer
from quantkit.models.forward import WeightSource
from quantkit.models.plan import Plan, tied
from quantkit.models.structure import fused_expert_parameters, linear_weight
from quantkit.run.ranks import Survey, share_ranks, summary, with_ranks
from quantkit.run.recipe import Recipe
from quantkit.run.report import LayerReport, Report, model_card, peak_device_bytes, peak_memory_bytes
from quantkit.run.sequential import walk

Progress = Callable[[int, int, str], None]


def silent(_done: int, _total: int, _name: str) -> None:
    """The progress of a run that nobody watches."""


@dataclass(frozen=True)
class Run:
    """What a report says of a run, beyond what came out.

    Attributes:
        start: time.monotonic() at its beginning.
        device: where it takes place.
        bytes_before: all tensors of the model.
        weights: (weights in the plan's layers, weights of the model).
        settings: everything that the result depends on.
        notes: what a user should know.
    """

    start: float
    device: torch.device
    bytes_before: int
    weights: tuple[int, int]
    settings: dict[str, Any]
    notes: tuple[str, ...]

    def report(self, model: str, plan: Plan, results: dict[str, LayerResult], bytes_after: int) -> Report:
        """The record of the finished run."""
        layers = tuple(
            LayerReport(
                name,
                spec.write(plan[name]),
                r.weight.label,
                r.weight.bits_per_weight,
                r.relative_error,
                r.damping,
                r.tuned,
            )
            for name, r in results.items()
        )
        packed, in_all = self.weights
        return Report(
            model=model,
            layers=layers,
            bits_per_weight=8 * sum(result.weight.nbytes for result in results.values()) / packed,
            bytes_before=self.bytes_before,
            bytes_after=bytes_after,
            packed_weights=packed,
            all_weights=in_all,
            seconds=time.monotonic() - self.start,
            peak_memory_bytes=peak_memory_bytes(),
            peak_device_bytes=peak_device_bytes(self.device),
            settings=self.settings,
            notes=self.notes,
        )


def quantize_checkpoint(
    folder: Path,
    recipe: Recipe,
    output: Path,
    *,
    name: str = "",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Report:
    """Quantizes a folder of safetensors shards into another, with one block in memory at a time.

    Args:
        folder: the model, as transformers saves it.
        recipe: what to do.
        output: the folder to make; it appears whole or not at all.
        name: of the model, for reports; by default the folder's name.
        device: where blocks run; by default a GPU if there is one.
        dtype: of the computation; by default fp32 on a CPU and the checkpoint's own type on a GPU.
        resume, overwrite: see `CheckpointWriter`.
        progress: called with (blocks done, blocks in all, name).

    Returns:
        The report, which is also written beside the checkpoint as quantkit_report.json.

    Raises:
        QuantkitError: bad input; the message says what would work.
    """
    check_output(output, folder, resume=resume, overwrite=overwrite)
    where, start = begin(device)
    source = ModelFolder(folder, dtype or compute_dtype(where))
    model = source.model
    plan = recipe.plan(model)
    before = source.nbytes()
    if recipe.rotation is not None:
        source.rotate(recipe.rotation)
    source.untie(plan)
    dense_bytes = source.nbytes() - source.packed_nbytes(plan)
    weights = count_weights(model, plan)
    windows = None
    if recipe.reads_text(plan):
        windows = recipe.calibration.windows(load_tokenizer(folder), model)
    notes = model_notes(model, plan, source.untied, recipe.rotation is not None)
    if recipe.low_rank_bits:
        plan, note = shared_ranks(model, plan, windows, recipe, source.source(plan), where, progress)
        source = ModelFolder(folder, dtype or compute_dtype(where))  # the first pass packed the other's layers
        if recipe.rotation is not None:
            source.rotate(recipe.rotation)
        source.untie(plan)
        model, notes = source.model, (*notes, note)
    run = Run(start, where, before, weights, recipe.settings(plan, windows), notes)
    identity = run.settings | {"model": source.shards.fingerprint(), "device": where.type, "dtype": str(model.dtype)}
    writer = CheckpointWriter(output, len(source.blocks), source.dense, identity, resume=resume, overwrite=overwrite)
    walk(
        model,
        plan,
        windows,
        source=source.source(plan),
        sink=writer,
        device=where,
        progress=progress,
        true_sequential=recipe.true_sequential,
        tuner=recipe.tuner,
    )
    return publish(writer, source, plan, run, name or folder.name, dense_bytes)


def publish(
    writer: CheckpointWriter,
    source: ModelFolder,
    plan: Plan,
    run: Run,
    name: str,
    dense_bytes: int,
    files: Mapping[str, str] | None = None,
) -> Report:
    """Makes a checkpoint of finished blocks, with its report beside it.

    Args:
        writer: has all blocks.
        source: the full-precision model.
        plan: what each packed layer was quantized with.
        run: what the report says of the run.
        name: of the model, for reports.
        dense_bytes: of all tensors outside the plan.
        files: further text files by name.
    """
    entries = writer.entries()
    results = {layer: _described(entries[layer]) for layer in plan}
    packed_bytes = sum(result.weight.nbytes for result in results.values())
    report = run.report(name, plan, results, dense_bytes + packed_bytes)
    texts = {
        "quantkit_report.json": json.dumps(report.to_json(), indent=2) + "\n",
        "README.md": model_card(report),
        **(files or {}),
    }
    writer.finish(source.folder, source.config | ({"tie_word_embeddings": False} if source.untied else {}), texts)
    return report


def shared_ranks(
    model: nn.Module,
    plan: Plan,
    windows: Tensor | None,
    recipe: Recipe,
    source: WeightSource,
    device: torch.device,
    progress: Progress,
) -> tuple[Plan, str]:
    """The plan with the ranks that a first pass finds best, and a sentence about them; leaves the model packed."""
    survey = Survey(plan)
    walk(
        model,
        plan,
        windows,
        source=source,
        sink=MemorySink(),
        device=device,
        on_layer=survey,
        progress=lambda done, total, name: progress(done, total, f"ranks: {name}" if name else name),
        true_sequential=recipe.true_sequential,
    )
    ranks = share_ranks(survey.spectra, recipe.low_rank_bits)
    return with_ranks(plan, ranks), summary(survey.spectra, ranks, recipe.low_rank_bits)


def begin(device: str | torch.device | None) -> tuple[torch.device, float]:
    """(the run's device, with its peak memory counted from now; the time)."""
    where = pick_device(device)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    return where, time.monotonic()


class MemorySink:
    """Keeps what is known of each layer; its tensors live in the model."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerResult] = {}

    def finished(self, index: int) -> dict[str, QuantizedWeight] | None:
        """Nothing: no block was packed before."""
        return None

    def write(self, index: int, name: str, layers: dict[str, LayerResult]) -> None:
        """Takes note of a block's layers."""
        for layer, result in layers.items():
            described = result.weight.map(lambda tensor: tensor.to("meta"))
            self.layers[layer] = dataclasses.replace(result, weight=described)


def _described(entry: dict[str, Any]) -> LayerResult:
    """A layer as the checkpoint's sidecars describe it, without its tensors."""
    weight, tuned = QuantizedWeight.empty(entry["metadata"]), entry.get("tuned")
    return LayerResult(weight, entry["relative_error"], entry["damping"], tuple(tuned) if tuned else None)


def count_weights(model: nn.Module, plan: Plan) -> tuple[int, int]:
    """(weights in the plan's layers, weights of the model)."""
    packed = sum(linear_weight(model.get_submodule(name)).numel() for name in plan.keys() - tied(plan).keys())
    return packed, sum(p.numel() for p in model.parameters())


def model_notes(model: nn.Module, plan: Plan, untied: bool, rotated: bool) -> tuple[str, ...]:
    """What a user should know of a packed model: what is rotated, tied, untied, or stays dense."""
    notes = []
    if rotated:
        notes.append("the residual stream is rotated: embedding, norms and head differ from the original model's")
    for embedding, head in tied(plan).items():
        notes.append(f"{embedding} and {head} stay one weight, packed as {head}, stored and counted once")
    if untied and not tied(plan):
        notes.append("the head was tied to the embedding; each is stored by itself now")
    fused = fused_expert_parameters(model)
    if fused:
        share = 100 * sum(fused.values()) / sum(p.numel() for p in model.parameters())
        notes.append(
            f"{len(fused)} fused expert tensors ({share:.0f}% of the weights) are no linear layers and stay dense"
        )
    return tuple(notes)
