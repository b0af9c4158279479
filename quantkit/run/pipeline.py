"""A recipe applied to a folder of shards, with one block in memory at a time; and what runs have in common."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.core.device import compute_dtype
from quantkit.core.errors import QuantkitError
from quantkit.core.result import LayerResult
from quantkit.core.weight import QuantizedWeight
from quantkit.io.checkpoint import CheckpointWriter, check_output
from quantkit.io.hf import attach
from quantkit.io.source import ModelFolder, load_tokenizer, refuse_quantized
from quantkit.io.weights import LoadedWeights
from quantkit.models.forward import WeightSource
from quantkit.models.linear import Packed
from quantkit.models.plan import Plan, tied
from quantkit.models.rotation import rotate_model
from quantkit.models.structure import tensor_bytes
from quantkit.models.ties import tied_names, untie
from quantkit.models.unpacking import choose_unpacked
from quantkit.run.ranks import Survey, share_ranks, summary, with_ranks
from quantkit.run.recipe import Recipe
from quantkit.run.record import Run, begin, count_weights, model_notes, publish
from quantkit.run.report import Report
from quantkit.run.sequential import walk

Progress = Callable[[int, int, str], None]


def silent(_done: int, _total: int, _name: str) -> None:
    """The progress of a run that nobody watches."""


def quantize_model(
    model: PreTrainedModel,
    tokenizer: Any,
    recipe: Recipe,
    device: str | torch.device | None = None,
    progress: Progress = silent,
) -> PreTrainedModel:
    """Quantizes a loaded model in place and returns it.

    Args:
        model: a decoder-only transformers model.
        tokenizer: its tokenizer; None where the recipe reads no text.
        recipe: what to do.
        device: where blocks are quantized; by default a GPU if there is one.
        progress: called with (blocks done, blocks in all, name).

    Returns:
        The same model, with packed layers and its report as `model.quantkit_report`.

    Raises:
        QuantkitError: bad input; the message says what would work.
    """
    where, start = begin(device)
    refuse_quantized(model.config)
    plan = recipe.plan(model)
    windows = None
    if recipe.reads_text(plan):
        if tokenizer is None:
            raise QuantkitError("this run reads calibration text and needs the model's tokenizer; RTN works without")
        windows = recipe.calibration.windows(tokenizer, model)
    before, ties, rotation = tensor_bytes(model), len(tied_names(model)), recipe.rotation
    if rotation is not None:
        rotate_model(model, rotation.seed)
    untie(model, plan, tied(plan))
    notes = model_notes(model, plan, ties > len(tied_names(model)), rotation is not None)
    was_training = model.training
    model.eval()
    counts, sink = count_weights(model, plan), MemorySink()
    try:
        if recipe.low_rank_bits:
            home, originals = model.device, {name: model.get_submodule(name) for name in plan}
            plan, note = shared_ranks(model, plan, windows, recipe, LoadedWeights(model), where, progress)
            for layer, module in originals.items():
                model.set_submodule(layer, module.to(home))
            notes = (*notes, note)
        run = Run(start, where, before, counts, recipe.settings(plan, windows), notes)
        walk(
            model,
            plan,
            windows,
            source=LoadedWeights(model),
            sink=sink,
            device=where,
            progress=progress,
            true_sequential=recipe.true_sequential,
            tuner=recipe.tuner,
        )
    except QuantkitError as error:
        if any(isinstance(module, Packed) for module in model.modules()):
            error.args = (f"{error}; the model in memory is partly packed now: load it anew",)
        raise
    finally:
        model.train(was_training)
    results = {name: sink.layers[name] for name in plan}
    attach(model, {name: result.weight.metadata() for name, result in results.items()})
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    model.quantkit_report = run.report(name, plan, results, tensor_bytes(model))  # type: ignore[assignment]
    choose_unpacked(model)
    return model


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
