"""The facade: what `import quantkit` offers for models in memory and in folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedModel

from quantkit.core.constants import TARGET_SHIFT, TOWER_BITS
from quantkit.core.device import compute_dtype, parse_dtype, pick_device
from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Quantizer
from quantkit.io.checkpoint import stored_dtype
from quantkit.io.hf import load, resolve_folder
from quantkit.io.source import load_tokenizer, refuse_adapters
from quantkit.models.plan import Rules
from quantkit.models.rotation import Rotation
from quantkit.run.pipeline import Progress, quantize_checkpoint, quantize_model, silent
from quantkit.run.recipe import Calibration, Recipe, default_bits, make_quantizer
from quantkit.tuning.settings import TuningSettings

if TYPE_CHECKING:  # each is imported by the function that needs it
    from quantkit.evopress.estimate import SearchEstimate
    from quantkit.evopress.fitness import Measure
    from quantkit.evopress.run import Searched
    from quantkit.evopress.run import Watch as SearchWatch
    from quantkit.evopress.settings import Evolution
    from quantkit.exchange.target import Exported
    from quantkit.run.report import Report
    from quantkit.tuning.block import BlockTuning
    from quantkit.tuning.end_to_end import Progress as TuningProgress


def quantize(
    model: PreTrainedModel | str | Path,
    tokenizer: Any = None,
    bits: float | None = None,
    *,
    output: str | Path | None = None,
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
    fisher: bool | None = None,
    all_experts: bool = False,
    experts_bits: float | None = None,
    include: Mapping[str, int] | Sequence[str] | str = (),
    target_shift: float = TARGET_SHIFT,
    calibration: str | Path | Sequence[Any] | Calibration = "wikitext2",
    num_samples: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    true_sequential: bool = True,
    check: int = 0,
    device: str | torch.device | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Any:
    """Quantizes a model: one in memory in place, one in a folder block by block into another folder.

    With a folder for output, processes that torchrun or `accelerate launch` has started share the work.

    Args:
        model: a decoder-only transformers model; or its folder, hub id or GGUF file.
        tokenizer: of a model in memory; methods that read no statistics do without.
        bits: per weight, for a method given by name, 3 by default; vector formats take any fraction, and use no more.
        method: "gptq", "rtn", "pyramid", "vptq", another registered name; or a quantizer object, or its text, which
            hold all settings: what the name "vptq" stands for is `Hadamard(VPTQ(bits=3))`, or "hadamard(vptq(3))".
        group_size, symmetric: of the integer formats, for a method given by name; None for its defaults.
        hadamard: quantize in a rotated basis, for a method given by name; None for what suits the method.
        low_rank: rank of a correction of what rounding lost (see `quantizers.low_rank`), for a method given by name.
        low_rank_bits: extra bits per weight for such corrections, shared out over the layers by what they gain (see
            `quantkit.run.ranks`), instead of one rank for all.
        rotate_model: rotate the model's residual stream first; see `quantkit.models.rotation`.
        tune_blocks: steps in which each block is tuned once it is quantized (see `tuning.block`), 0 for none; or the
            settings of those steps.
        rules: patterns over layer names -> quantizer, or None to leave layers dense; the last match decides, e.g.
            {"*.down_proj": GPTQ(bits=4), "model.layers.0.*": GPTQ(bits=8), "lm_head": None}. An embedding is only
            reached by its full name, and by quantizers that read no statistics.
        head_bits: pack the head and the input embedding too, at 1 to 8 bits (see `Recipe`); rules go before it.
        fisher: weigh tokens and outputs by how much predictions feel them (see `quantkit.run.fisher`), for a pass back
            through the model; None where the method wants it, as trellis codes do.
        all_experts: gather the statistics of a mixture's experts from all tokens, not from those alone that the router
            sends to each; for text in which some are rarely chosen.
        experts_bits: of experts, where they are not to have those of the other layers.
        include: patterns over names of layers outside the blocks to pack too, such as "model.visual*"; a mapping says
            at how many bits, else they are 8.
        target_shift: 0 (off) to 1; see `quantizers.target_shift`.
        calibration: a dataset name, file, hub id, list of documents, or a `Calibration`.
        num_samples, seqlen, seed: the calibration's sequences, where `calibration` is not a `Calibration`.
        output: folder to make; it appears whole or not at all. None to return the packed model.
        true_sequential: let each layer see its own block's earlier layers quantized; without it, it is faster.
        check: sequences of other pieces of the text to measure the packed model on, beside the full one, at the end; 0
            for none, and 8 are a good number. The figures are the report's `check`.
        device: where blocks are quantized; by default a GPU if there is one.
        resume: go on with an unfinished run towards `output`; overwrite: replace one, and `output`.
        progress: called with (blocks done, blocks in all, name).

    Returns:
        The model with packed layers (the same, where it was in memory); `save_pretrained` writes a packed checkpoint,
        and `model.quantkit_report` holds the `Report`. With `output` the `Report` alone.

    Raises:
        QuantkitError: bad input; the message says what would work.
    """
    text = _calibration(calibration, num_samples, seqlen, seed)
    named = isinstance(method, str) and "(" not in method
    bits = default_bits(method) if bits is None else bits
    low_rank = 1 if low_rank is None and low_rank_bits and named else low_rank
    quantizer = make_quantizer(method, hadamard, low_rank, bits=bits, group_size=group_size, symmetric=symmetric)
    rotation = Rotation() if rotate_model else None
    tuner = tune_blocks or None
    if isinstance(tuner, int):
        from quantkit.tuning.block import BlockTuning

        tuner = BlockTuning(tuner)
    recipe = Recipe(
        quantizer, rules or {}, target_shift, text, true_sequential, rotation, low_rank_bits, tuner, head_bits, fisher,
        check, all_experts, experts_bits,
        include if isinstance(include, Mapping) else dict.fromkeys(_patterns(include), TOWER_BITS),
    )  # fmt: skip
    if output is None and (resume or overwrite):
        raise QuantkitError("`resume` and `overwrite` are about an `output`; give one, or leave them out")
    if isinstance(model, PreTrainedModel):
        if output is not None:
            raise QuantkitError("a model in memory is packed in place; leave out `output`, and save_pretrained it")
        return quantize_model(model, tokenizer, recipe, device, progress)
    if isinstance(model, torch.nn.Module):  # peft's are no transformers models
        refuse_adapters(type(model).__name__, (name for name, _ in model.named_modules()))
        raise QuantkitError(f"{type(model).__name__} is no transformers model; give one, or a folder")
    if tokenizer is not None:
        raise QuantkitError("a model in a folder has its tokenizer beside it; leave `tokenizer` out")
    folder = resolve_folder(model)
    if output is not None:
        return quantize_checkpoint(
            folder, recipe, output, name=str(model), device=device, resume=resume, overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
    kind = compute_dtype(pick_device(device)) or "auto"
    loaded: Any = quantize_model(load(folder, dtype=kind), load_tokenizer(folder), recipe, device, progress)
    stored = stored_dtype(folder)
    return loaded if stored is None else loaded.to(stored)


def search(
    model: str | Path,
    output: str | Path,
    *,
    avg_bits: float | None = None,
    size: str | None = None,
    fit: str | None = None,
    latency_ms: float | None = None,
    sparsity: float | None = None,
    drop_blocks: int | None = None,
    context: int | None = None,
    batch: int = 1,
    kv_bits: int | None = None,
    timings: str | Path | None = None,
    candidates: str | None = None,
    base: str | None = None,
    head_bits: int | None = None,
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    target_shift: float = TARGET_SHIFT,
    fisher: bool | None = None,
    calibration: str | Path | Sequence[Any] | Calibration = "wikitext2",
    num_samples: int = 128,
    seqlen: int | None = None,
    search_samples: int = 256,
    held_out: int = 32,
    evolution: Evolution | None = None,
    measure: Measure = "kl",
    start: Literal["best", "uniform", "predicted"] = "best",
    top: int = 512,
    each_expert: bool = False,
    database: str | Path | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    watch: SearchWatch | None = None,
) -> Searched | SearchEstimate | None:
    """Searches the best bits for every layer of a model under one budget, and makes a packed checkpoint of them.

    Args:
        model: folder, hub id or GGUF file of a full-precision model.
        output: folder to make; its plan can be packed again with `quantkit quantize --plan`.
        avg_bits, size, fit, latency_ms, sparsity, drop_blocks: the budget, one of them; see `evopress.wanted.Wanted`.
        context, batch, kv_bits: of the generation that is to `fit`; timings: measured kernels, for `latency_ms`.
        candidates: ways to pack a layer, texts of quantizers with commas between (`quantkit.core.spec`).
        base: the one that packs the layers in front, while a layer is calibrated; gptq(3) by default.
        head_bits: of the head and the input embedding, which are not searched; 0 or 16 leaves them dense.
        include: patterns of layers outside the blocks to pack too; ignore: of layers to leave dense.
        target_shift: 0 (off) to 1; see `quantizers.target_shift`.
        fisher: as in `quantize`, for the candidates; None where the first of them or "predicted" wants it.
        calibration: dataset name, file, hub id, documents or a `Calibration`, for the candidates and for the search.
        num_samples, seqlen: sequences of the candidates' calibration, and their tokens, where it is no `Calibration`.
        search_samples: sequences of other text that the search measures on; held_out: so many only for the comparison.
        evolution: generations, offspring and stages.
        measure: "kl" to the full model, or "perplexity".
        start: the "best" of uniform, greedy and knapsack, "uniform", or "predicted": by what a pass back through the
            model says, without measuring layers; with no generations that is all of the search.
        top: k of the top-k tokens that are kept of the full model's predictions.
        each_expert: search each of a mixture's experts by itself; without it a block's experts have the same bits at
            the same place.
        database: folder of the candidates, NAME-candidates by default; made once, used by all searches.
        device: where the model runs; by default a GPU if there is one.
        seed: of the search and of its text.
        resume: go on with an unfinished search; overwrite: replace one, and the output.
        dry_run: only say what would be made and measured; no file is written.
        watch: what is told on the way.

    Returns:
        What was found and made, or with `dry_run` what would be; None in processes other than the first.

    Raises:
        QuantkitError: bad input; the message says what would work.
    """
    from quantkit.evopress.run import run
    from quantkit.evopress.session import SearchRun, SearchSettings
    from quantkit.evopress.settings import Evolution
    from quantkit.evopress.wanted import Wanted, candidates_of, head_bits_of

    wanted = Wanted(
        avg_bits, size, fit, latency_ms, sparsity, drop_blocks, context, batch, kv_bits,
        None if timings is None else Path(timings),
    )  # fmt: skip
    offers, first = candidates_of(wanted, candidates, base)
    rules: dict[str, Quantizer | None] = {**dict.fromkeys(include, first), **dict.fromkeys(ignore)}
    packed_ends = head_bits_of(wanted, head_bits)
    if start == "predicted" and (fisher is False or include or drop_blocks is not None):
        raise QuantkitError(
            "nothing is predicted of blocks that are left out, of layers outside of blocks, or without a pass back "
            "through the model: for `start` predicted, leave out `drop_blocks` and `include`, and don't switch "
            "`fisher` off"
        )
    back = True if fisher is None and start == "predicted" else fisher
    text = _calibration(calibration, num_samples, seqlen)
    name = Path(model).resolve().name
    asked = SearchRun(
        folder=resolve_folder(str(model)),
        name=str(model),
        output=Path(output),
        database=Path(database or f"{name}-candidates"),
        wanted=wanted,
        candidates=offers,
        recipe=Recipe(first, rules, target_shift, text, head_bits=packed_ends, fisher=back),
        text=replace(text, num_samples=search_samples, seed=1_000_003 + seed),
        settings=SearchSettings(
            evolution or Evolution(), measure, start, held_out, top, seed=seed, each_expert=each_expert
        ),
    )
    if dry_run:
        from quantkit.evopress.estimate import estimate

        return estimate(asked, device, resume=resume, overwrite=overwrite)
    return run(asked, device, resume=resume, overwrite=overwrite, watch=watch)


def tune(
    model: PreTrainedModel | str | Path,
    teacher: PreTrainedModel | str | Path,
    tokenizer: Any = None,
    *,
    output: str | Path | None = None,
    calibration: str | Path | Sequence[Any] | Calibration = "wikitext2",
    settings: TuningSettings | None = None,
    state: str | Path | None = None,
    cache: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[TuningProgress], None] = lambda _progress: None,
    caching: Callable[[int, int], None] = lambda _done, _total: None,
) -> Any:
    """Tunes a packed model by KL to its teacher's predictions: one in memory in place, one in a folder into another.

    Args:
        model: with packed layers, as `quantkit.load` or `quantkit.quantize` gives it; or its folder or hub id.
        teacher: the full-precision model, likewise; a packed one is refused.
        tokenizer: of a model in memory.
        output: folder to make, of a model in a folder.
        calibration: the text; sequences for tuning and held-out ones are drawn from it. Give another seed than
            quantization had (0 by default; here 1): what it was calibrated on it predicts too well to be held out.
        settings: of the run.
        state: for a model in memory, a folder to keep the run's state in; the run goes on from what is there.
        cache: a folder to keep the teacher's predictions in; they are made once, and read in every step.
        device, dtype: of models in folders; by default a GPU if there is one, and float32 on a CPU.
        resume: go on with an unfinished run towards `output`; overwrite: replace one, and `output`.
        progress: called after each step.
        caching: called with (sequences done, sequences in all) while the cache is filled.

    Returns:
        The same model in memory with the best state found; its `quantkit_tuning` holds the held-out KL at each
        measurement, and the first also the full one where the teacher was cached. With `output` that list, or None in
        processes other than the first.

    Raises:
        QuantkitError: no packed layers, a format that cannot be tuned, another vocabulary, or too little text.
    """
    from quantkit.tuning import end_to_end
    from quantkit.tuning.request import TuningRun
    from quantkit.tuning.run import run

    text = _calibration(calibration, 512, None, 1)
    watch, kept = end_to_end.Watch(progress, caching), None if cache is None else Path(cache)
    if isinstance(model, PreTrainedModel) and isinstance(teacher, PreTrainedModel):
        if output is not None or device is not None or dtype is not None or resume or overwrite:
            raise QuantkitError(
                "a model in memory is tuned in place, where it is and as it is: leave out `output`, `device`, `dtype`, "
                "`resume` and `overwrite`; `state` keeps a run"
            )
        return end_to_end.tune(
            model, teacher, tokenizer, calibration=text, settings=settings, cache=kept, watch=watch,
            state=None if state is None else Path(state),
        )  # fmt: skip
    if isinstance(model, PreTrainedModel) or isinstance(teacher, PreTrainedModel) or output is None:
        raise QuantkitError("give two models in memory, or two folders and an `output`")
    if tokenizer is not None or state is not None:
        raise QuantkitError("models in folders have their tokenizer there, and their run's state beside the `output`")
    asked = TuningRun(
        resolve_folder(model), resolve_folder(teacher), Path(output), text, settings or TuningSettings(), kept,
        str(teacher),
    )  # fmt: skip
    made = run(asked, device, dtype, resume=resume, overwrite=overwrite, watch=watch)
    return None if made is None else made.history


def export(
    model: PreTrainedModel | str | Path,
    output: str | Path,
    *,
    to: str,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    carrier: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] = lambda _done, _total, _what: None,
) -> Exported:
    """Writes a packed model as another program's, exactly where that program's form holds the same; a block at a time.

    Args:
        model: with packed layers, in memory, or its folder or hub id.
        output: folder to make; for "gguf" a file.
        to: "compressed-tensors", "gguf", "mlx", "gptq", or "dense".
        tokenizer: of a model in memory; by default that which lies where the model was loaded from.
        dtype: of scales and dense weights; by default fp16 where there are scales, which keeps them, and else what the
            model has.
        carrier: bits of the numbers that hold the codes, for compressed-tensors and gptq; by default the fewest that do
            and that readers have kernels for.
        resume: go on with an unfinished run towards `output`; overwrite: replace one, and `output`.
        progress: called with (units done, units in all, what comes next).

    Returns:
        What was written, and how far it is from what was packed.

    Raises:
        QuantkitError: the form does not hold a layer, which the message names with what would; or a package is missing.
    """
    from quantkit.exchange import export as forms

    own = parse_dtype(dtype) if isinstance(dtype, str) else dtype
    settings: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "progress": progress}
    if isinstance(model, PreTrainedModel):
        return forms.export_model(model, Path(output), to, tokenizer, dtype=own, carrier=carrier, **settings)
    if tokenizer is not None:
        raise QuantkitError("a model in a folder has its tokenizer there")
    return forms.export_folder(resolve_folder(model), Path(output), to, own, carrier, **settings)


def import_model(
    model: str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Report:
    """Packs a model that another program has quantized to whole numbers, with the very same numbers.

    Args:
        model: its folder or hub id (GPTQ, AWQ, auto-round, compressed-tensors, MLX), or a GGUF file.
        output: folder to make, a packed checkpoint.
        resume: go on with an unfinished run towards `output`; overwrite: replace one, and `output`.
        progress: called with (blocks done, blocks in all, what comes next).

    Returns:
        The report; layers that are stored in another way stay dense, experts in one tensor among them.

    Raises:
        QuantkitError: nothing there is stored as whole numbers, or not as int_group holds them.
    """
    from quantkit.exchange import importing
    from quantkit.io.gguf_header import is_gguf

    file = Path(model).expanduser()
    place = file if file.is_file() and is_gguf(file) else resolve_folder(str(model))
    return importing.import_model(
        place, Path(output), name=str(model), resume=resume, overwrite=overwrite, progress=progress
    )


def _patterns(given: str | Sequence[str]) -> Sequence[str]:
    return [given] if isinstance(given, str) else given


def _calibration(
    asked: str | Path | Sequence[Any] | Calibration, num_samples: int, seqlen: int | None, seed: int = 0
) -> Calibration:
    """The text to calibrate on, as a user may give it."""
    if isinstance(asked, Calibration):
        return asked
    return Calibration(str(asked) if isinstance(asked, Path) else asked, num_samples, seqlen, seed)
