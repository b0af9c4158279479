"""Whole-model quantization: a recipe applied to a model in memory, or to a folder of shards.

quantize(model, tokenizer, bits=3)          in place, on a loaded transformers model
quantize_checkpoint(folder, recipe, out)    from disk to disk, one block in memory at a time
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.calibrate import LayerResult, walk
from quantkit.checkpoint import CheckpointWriter, check_output
from quantkit.device import compute_dtype, pick_device
from quantkit.errors import QuantkitError
from quantkit.folder import ModelFolder, load_tokenizer, refuse_quantized
from quantkit.forward import WeightSource
from quantkit.hf import attach
from quantkit.linear import Packed
from quantkit.model import fused_expert_parameters, linear_weight, tensor_bytes
from quantkit.plan import Plan, Rules, tied
from quantkit.protocols import Quantizer
from quantkit.ranks import share_ranks, summary, survey_plan, with_ranks
from quantkit.recipe import TARGET_SHIFT, Calibration, Recipe, make_quantizer
from quantkit.report import LayerReport, Report, model_card, peak_device_bytes, peak_memory_bytes
from quantkit.rotate import Rotation
from quantkit.rotate import rotate_model as turn
from quantkit.shards import LoadedWeights, tied_names, untie
from quantkit.tuning.block import BlockTuning
from quantkit.unpacking import choose_unpacked
from quantkit.weight import QuantizedWeight

Progress = Callable[[int, int, str], None]


def _silent(_done: int, _total: int, _name: str) -> None:
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
                name, repr(plan[name]), r.weight.label, r.weight.bits_per_weight, r.relative_error, r.damping, r.tuned
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


def quantize(
    model: PreTrainedModel,
    tokenizer: Any = None,
    bits: float | None = None,
    *,
    method: str | Quantizer = "gptq",
    group_size: int | None = None,
    symmetric: bool | None = None,
    hadamard: bool | None = None,
    low_rank: int | None = None,
    low_rank_bits: float = 0,
    rotate_model: bool = False,
    tune_blocks: int | BlockTuning = 0,
    rules: Rules | None = None,
    head_bits: int | None = None,
    target_shift: float = TARGET_SHIFT,
    calibration: str | Path | list[str] | Calibration = "wikitext2",
    num_samples: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Progress = _silent,
) -> PreTrainedModel:
    """Quantizes a loaded model in place and returns it.

    Args:
        model: a decoder-only transformers model.
        tokenizer: its tokenizer; methods that read no statistics do without.
        bits: per weight, for a method given by name, 3 by default; vector formats take any fraction, and use no more.
        method: "gptq", "rtn", "pyramid", "vptq", another registered name, or a quantizer object, which holds all
            settings: what the name "vptq" stands for is `Hadamard(VPTQ(bits=3))`.
        group_size, symmetric: of the integer formats, for a method given by name; None for its defaults.
        hadamard: quantize in a rotated basis, for a method given by name; None for what suits the method.
        low_rank: rank of a correction of what rounding lost (see `quantizers.low_rank`), for a method given by name.
        low_rank_bits: extra bits per weight for such corrections, shared out over the layers by what they gain (see
            `quantkit.ranks`), instead of one rank for all.
        rotate_model: turn the model's residual stream first; see `quantkit.rotate`.
        tune_blocks: steps in which each block is tuned once it is quantized (see `tuning.block`), 0 for none; or the
            settings of those steps.
        rules: patterns over layer names -> quantizer, or None to leave layers dense; the last match decides, e.g.
            {"*.down_proj": GPTQ(bits=4), "model.layers.0.*": GPTQ(bits=8), "lm_head": None}. An embedding is only
            reached by its full name, and by quantizers that read no statistics.
        head_bits: pack the head and the input embedding too, at 1 to 8 bits (see `Recipe`); rules go before it.
        target_shift: 0 (off) to 1; see `quantizers.target_shift`.
        calibration: a dataset name, file, hub id, list of documents, or a `Calibration`.
        num_samples, seqlen, seed: the calibration's windows, where `calibration` is not a `Calibration`.
        device: where blocks are quantized; by default a GPU if there is one.
        progress: called with (blocks done, blocks in all, name).

    Returns:
        The same model, with packed layers; `save_pretrained` writes a packed checkpoint, and
        `model.quantkit_report` holds the `Report`.

    Raises:
        QuantkitError: bad input; the message says what would work.
    """
    where, start = begin(device)
    if not isinstance(calibration, Calibration):
        text = str(calibration) if isinstance(calibration, Path) else calibration
        calibration = Calibration(text, num_samples, seqlen, seed)
    bits = 3 if bits is None and isinstance(method, str) else bits
    low_rank = 1 if low_rank is None and low_rank_bits and isinstance(method, str) else low_rank
    quantizer = make_quantizer(method, hadamard, low_rank, bits=bits, group_size=group_size, symmetric=symmetric)
    rotation = Rotation() if rotate_model else None
    tuner = tune_blocks if isinstance(tune_blocks, BlockTuning) else BlockTuning(tune_blocks) if tune_blocks else None
    recipe = Recipe(
        quantizer,
        rules or {},
        target_shift,
        calibration,
        rotation=rotation,
        low_rank_bits=low_rank_bits,
        tuner=tuner,
        head_bits=head_bits,
    )
    refuse_quantized(model.config)
    plan = recipe.plan(model)
    windows = None
    if recipe.reads_text(plan):
        if tokenizer is None:
            raise QuantkitError("this run reads calibration text and needs the model's tokenizer; RTN works without")
        windows = calibration.windows(tokenizer, model)
    before, ties = tensor_bytes(model), len(tied_names(model))
    if rotation is not None:
        turn(model, rotation.seed, rotation.heads)
    untie(model, plan)
    notes = model_notes(model, plan, ties > len(tied_names(model)), rotation is not None)
    was_training = model.training
    model.eval()
    counts, sink = count_weights(model, plan), _MemorySink()
    try:
        if recipe.low_rank_bits:
            home, originals = model.device, {name: model.get_submodule(name) for name in plan}
            plan, note = _shared_ranks(model, plan, windows, recipe, LoadedWeights(model), where, progress)
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
    progress: Progress = _silent,
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
        plan, note = _shared_ranks(model, plan, windows, recipe, source.source(plan), where, progress)
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


def _shared_ranks(
    model: nn.Module,
    plan: Plan,
    windows: Tensor | None,
    recipe: Recipe,
    source: WeightSource,
    device: torch.device,
    progress: Progress,
) -> tuple[Plan, str]:
    """The plan with the ranks that a first pass finds best, and a sentence about them; leaves the model packed."""
    surveyed, spectra = survey_plan(plan)
    walk(
        model,
        surveyed,
        windows,
        source=source,
        sink=_MemorySink(),
        device=device,
        progress=lambda done, total, name: progress(done, total, f"ranks: {name}" if name else name),
        true_sequential=recipe.true_sequential,
    )
    ranks = share_ranks(spectra, recipe.low_rank_bits)
    return with_ranks(plan, ranks), summary(spectra, ranks, recipe.low_rank_bits)


def begin(device: str | torch.device | None) -> tuple[torch.device, float]:
    """(the run's device, with its peak memory counted from now; the time)."""
    where = pick_device(device)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    return where, time.monotonic()


class _MemorySink:
    """Keeps what is known of each layer; its tensors live in the model."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerResult] = {}

    def finished(self, index: int) -> dict[str, QuantizedWeight] | None:
        return None

    def write(self, index: int, name: str, layers: dict[str, LayerResult]) -> None:
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
