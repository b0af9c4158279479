"""The facade: what `import quantkit` offers for models in memory and in folders."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Quantizer
from quantkit.io.hf import attach
from quantkit.io.shards import LoadedWeights
from quantkit.io.source import refuse_quantized
from quantkit.models.linear import Packed
from quantkit.models.plan import Rules
from quantkit.models.rotation import Rotation
from quantkit.models.rotation import rotate_model as turn
from quantkit.models.structure import tensor_bytes
from quantkit.models.ties import tied_names, untie
from quantkit.models.unpacking import choose_unpacked
from quantkit.run.pipeline import MemorySink, Progress, Run, begin, count_weights, model_notes, shared_ranks, silent
from quantkit.run.recipe import TARGET_SHIFT, Calibration, Recipe, default_bits, make_quantizer
from quantkit.run.sequential import walk
from quantkit.tuning.block import BlockTuning


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
    progress: Progress = silent,
) -> PreTrainedModel:
    """Quantizes a loaded model in place and returns it.

    Args:
        model: a decoder-only transformers model.
        tokenizer: its tokenizer; methods that read no statistics do without.
        bits: per weight, for a method given by name, 3 by default; vector formats take any fraction, and use no more.
        method: "gptq", "rtn", "pyramid", "vptq", another registered name; or a quantizer object, or its text, which
            hold all settings: what the name "vptq" stands for is `Hadamard(VPTQ(bits=3))`, or "hadamard(vptq(3))".
        group_size, symmetric: of the integer formats, for a method given by name; None for its defaults.
        hadamard: quantize in a rotated basis, for a method given by name; None for what suits the method.
        low_rank: rank of a correction of what rounding lost (see `quantizers.low_rank`), for a method given by name.
        low_rank_bits: extra bits per weight for such corrections, shared out over the layers by what they gain (see
            `quantkit.run.ranks`), instead of one rank for all.
        rotate_model: turn the model's residual stream first; see `quantkit.models.rotation`.
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
    named = isinstance(method, str) and "(" not in method
    bits = default_bits(method) if bits is None else bits
    low_rank = 1 if low_rank is None and low_rank_bits and named else low_rank
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
