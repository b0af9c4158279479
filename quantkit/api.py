"""The facade: what `import quantkit` offers for models in memory and in folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from quantkit.core.protocols import Quantizer
from quantkit.evopress.fitness import Measure
from quantkit.evopress.run import Searched, SearchRun, Watch
from quantkit.evopress.run import run as run_search
from quantkit.evopress.session import SearchSettings
from quantkit.evopress.settings import Evolution
from quantkit.evopress.wanted import Wanted, candidates_of, head_bits_of
from quantkit.io.source import resolve_folder
from quantkit.models.plan import Rules
from quantkit.models.rotation import Rotation
from quantkit.run.pipeline import Progress, quantize_model, silent
from quantkit.run.recipe import TARGET_SHIFT, Calibration, Recipe, default_bits, make_quantizer
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
    return quantize_model(model, tokenizer, recipe, device, progress)


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
    timings: Path | None = None,
    candidates: str | None = None,
    base: str | None = None,
    head_bits: int | None = None,
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    target_shift: float = TARGET_SHIFT,
    calibration: str | list[str] = "wikitext2",
    num_samples: int = 128,
    seqlen: int | None = None,
    search_samples: int = 256,
    held_out: int = 32,
    evolution: Evolution | None = None,
    measure: Measure = "kl",
    start: Literal["best", "uniform"] = "best",
    top: int = 512,
    database: str | Path | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> Searched | None:
    """Searches the best bits for every layer of a model under one budget, and makes a packed checkpoint of them.

    Args:
        model: folder or hub id of a full-precision model.
        output: folder to make; its plan can be packed again with `quantkit quantize --plan`.
        avg_bits, size, fit, latency_ms, sparsity, drop_blocks: the budget, one of them; see `evopress.wanted.Wanted`.
        context, batch, kv_bits: of the generation that is to `fit`; timings: measured kernels, for `latency_ms`.
        candidates: ways to pack a layer, texts of quantizers with commas between (`quantkit.core.spec`).
        base: the one that packs the layers in front, while a layer is calibrated; gptq(3) by default.
        head_bits: of the head and the input embedding, which are not searched; 0 or 16 leaves them dense.
        include: patterns of layers outside the blocks to pack too; ignore: of layers to leave dense.
        target_shift: 0 (off) to 1; see `quantizers.target_shift`.
        calibration: dataset name, file, hub id or documents, for the candidates and for the search.
        num_samples, seqlen: windows of the candidates' calibration, and their tokens.
        search_samples: windows of other text that the search measures on; held_out: so many only for the comparison.
        evolution: generations, offspring and stages.
        measure: "kl" to the full model, or "perplexity".
        start: the "best" of uniform, greedy and knapsack, or "uniform".
        top: likeliest tokens that are kept of the full model's predictions.
        database: folder of the candidates, NAME-candidates by default; made once, used by all searches.
        device: where the model runs; by default a GPU if there is one.
        seed: of the search and of its text.
        resume: go on with an unfinished search; overwrite: replace one, and the output.
        watch: what is told on the way.

    Returns:
        What was found and made; None in processes other than the first.

    Raises:
        QuantkitError: bad input; the message says what would work.
    """
    wanted = Wanted(
        avg_bits, size, fit, latency_ms, sparsity, drop_blocks, context, batch, kv_bits, timings
    )  # fmt: skip
    offers, first = candidates_of(wanted, candidates, base)
    rules: dict[str, Quantizer | None] = {**dict.fromkeys(include, first), **dict.fromkeys(ignore)}
    packed_ends = head_bits_of(wanted, head_bits)
    text = Calibration(calibration, num_samples, seqlen)
    name = Path(model).resolve().name
    asked = SearchRun(
        folder=resolve_folder(str(model)),
        name=str(model),
        output=Path(output),
        database=Path(database or f"{name}-candidates"),
        wanted=wanted,
        candidates=offers,
        recipe=Recipe(first, rules, target_shift, text, head_bits=packed_ends),
        text=Calibration(calibration, search_samples, seqlen, seed=1_000_003 + seed),
        settings=SearchSettings(evolution or Evolution(), measure, start, held_out, top, seed=seed),
    )
    return run_search(asked, device, resume=resume, overwrite=overwrite, watch=watch)
