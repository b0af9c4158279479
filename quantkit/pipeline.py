"""Whole-model quantization: a recipe applied to a model in memory, or to a folder of shards.

quantize(model, tokenizer, bits=3)          in place, on a loaded transformers model
quantize_checkpoint(folder, recipe, out)    from disk to disk, one block in memory at a time
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quantkit.calibrate import LayerResult, walk
from quantkit.checkpoint import CheckpointWriter, check_output
from quantkit.device import compute_dtype, pick_device
from quantkit.errors import QuantkitError
from quantkit.folder import ModelFolder, load_tokenizer, refuse_quantized, untie
from quantkit.hf import attach
from quantkit.linear import QuantizedLinear
from quantkit.model import fused_expert_parameters, linear_weight, tensor_bytes
from quantkit.plan import Plan, Rules, plan_needs
from quantkit.protocols import Needs, Quantizer
from quantkit.recipe import TARGET_SHIFT, Calibration, Recipe, make_quantizer
from quantkit.report import LayerReport, Report, model_card, peak_device_bytes, peak_memory_bytes
from quantkit.shards import LoadedWeights
from quantkit.weight import QuantizedWeight

Progress = Callable[[int, int, str], None]


def _silent(_done: int, _total: int, _name: str) -> None:
    """The progress of a run that nobody watches."""


def quantize(
    model: PreTrainedModel,
    tokenizer: Any = None,
    bits: int = 3,
    *,
    method: str | Quantizer = "gptq",
    group_size: int = 128,
    symmetric: bool = True,
    rules: Rules | None = None,
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
        bits, group_size, symmetric: settings of a method given by name.
        method: "gptq", "rtn", another registered name, or a quantizer object.
        rules: patterns over layer names -> quantizer, or None to leave layers dense; the last match decides, e.g.
            {"*.down_proj": GPTQ(bits=4), "model.layers.0.*": GPTQ(bits=8), "lm_head": None}.
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
    start, where = time.monotonic(), _begin(device)
    if isinstance(calibration, Path):
        calibration = str(calibration)
    if not isinstance(calibration, Calibration):
        calibration = Calibration(calibration, num_samples, seqlen, seed)
    quantizer = make_quantizer(method, bits=bits, group_size=group_size, symmetric=symmetric)
    recipe = Recipe(quantizer, rules or {}, target_shift, calibration)
    refuse_quantized(model.config)
    plan = recipe.plan(model)
    windows = None
    if plan_needs(plan) > Needs.NOTHING:
        if tokenizer is None:
            raise QuantkitError("this method reads calibration text and needs the model's tokenizer; RTN works without")
        windows = calibration.windows(tokenizer, model)
    before, weights = tensor_bytes(model), _count(model, plan)
    notes = _notes(model, untie(model, plan))
    sink = _MemorySink()
    was_training = model.training
    model.eval()
    try:
        walk(
            model,
            plan,
            windows,
            source=LoadedWeights(model),
            sink=sink,
            device=where,
            progress=progress,
            true_sequential=recipe.true_sequential,
        )
    except QuantkitError as error:
        if any(isinstance(module, QuantizedLinear) for module in model.modules()):
            error.args = (f"{error}; the model in memory is partly packed now: load it anew",)
        raise
    finally:
        model.train(was_training)
    entries = {name: sink.layers[name] for name in plan}
    attach(model, {name: result.weight.metadata() for name, result in entries.items()})
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    model.quantkit_report = Report(  # type: ignore[assignment]
        model=name,
        layers=tuple(
            _layer_report(name, plan[name], r.weight, r.relative_error, r.damping) for name, r in entries.items()
        ),
        bits_per_weight=8 * sum(r.weight.nbytes for r in entries.values()) / weights[0],
        bytes_before=before,
        bytes_after=tensor_bytes(model),
        packed_weights=weights[0],
        all_weights=weights[1],
        seconds=time.monotonic() - start,
        peak_memory_bytes=peak_memory_bytes(),
        peak_device_bytes=peak_device_bytes(where),
        settings=recipe.settings(plan, windows),
        notes=notes,
    )
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
    start = time.monotonic()
    check_output(output, folder, resume=resume, overwrite=overwrite)
    where = _begin(device)
    source = ModelFolder(folder, dtype or compute_dtype(where))
    model = source.model
    plan = recipe.plan(model)
    weights, before, replaced = _count(model, plan), source.nbytes(), source.packed_nbytes(plan)
    untied = source.untie(plan)
    notes = _notes(model, untied)
    windows = None
    if plan_needs(plan) > Needs.NOTHING:
        windows = recipe.calibration.windows(load_tokenizer(folder), model)
    settings = recipe.settings(plan, windows)
    run = settings | {"model": source.shards.fingerprint(), "device": where.type, "dtype": str(model.dtype)}
    writer = CheckpointWriter(output, len(source.blocks), source.dense, run, resume=resume, overwrite=overwrite)
    walk(
        model,
        plan,
        windows,
        source=source.source(plan),
        sink=writer,
        device=where,
        progress=progress,
        true_sequential=recipe.true_sequential,
    )

    entries = writer.entries()
    packed = {layer: QuantizedWeight.empty(entries[layer]["metadata"]) for layer in plan}
    packed_bytes = sum(weight.nbytes for weight in packed.values())
    report = Report(
        model=name or folder.name,
        layers=tuple(
            _layer_report(layer, plan[layer], weight, entries[layer]["relative_error"], entries[layer]["damping"])
            for layer, weight in packed.items()
        ),
        bits_per_weight=8 * packed_bytes / weights[0],
        bytes_before=before,
        bytes_after=before - replaced + packed_bytes,
        packed_weights=weights[0],
        all_weights=weights[1],
        seconds=time.monotonic() - start,
        peak_memory_bytes=peak_memory_bytes(),
        peak_device_bytes=peak_device_bytes(where),
        settings=settings,
        notes=notes,
    )
    files = {
        "quantkit_report.json": json.dumps(report.to_json(), indent=2) + "\n",
        "README.md": model_card(report),
    }
    writer.finish(folder, source.config | ({"tie_word_embeddings": False} if untied else {}), files)
    return report


def _begin(device: str | torch.device | None) -> torch.device:
    """The run's device, with its peak memory counted from now."""
    where = pick_device(device)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    return where


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


def _layer_report(
    name: str, quantizer: Quantizer, weight: QuantizedWeight, relative_error: float, damping: float | None
) -> LayerReport:
    return LayerReport(name, repr(quantizer), weight.format, weight.bits_per_weight, relative_error, damping)


def _count(model: nn.Module, plan: Plan) -> tuple[int, int]:
    """(weights in the plan's layers, weights of the model)."""
    packed = sum(linear_weight(model.get_submodule(name)).numel() for name in plan)
    return packed, sum(p.numel() for p in model.parameters())


def _notes(model: nn.Module, untied: bool) -> tuple[str, ...]:
    notes = []
    if untied:
        notes.append("the head was tied to the embedding; it is packed on its own and the embedding stays dense")
    fused = fused_expert_parameters(model)
    if fused:
        share = 100 * sum(fused.values()) / sum(p.numel() for p in model.parameters())
        notes.append(
            f"{len(fused)} fused expert tensors ({share:.0f}% of the weights) are no linear layers and stay dense"
        )
    return tuple(notes)
