"""`quantkit search`: the best candidate of every layer under a budget, as a packed checkpoint."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.table import Table

from quantkit.cli import options
from quantkit.cli.display import console, report_table, search_progress, size
from quantkit.core.constants import TARGET_SHIFT
from quantkit.core.errors import Interrupted, QuantkitError
from quantkit.search.settings import Evolution, parse_stages, stages_text

if TYPE_CHECKING:
    import torch

    from quantkit.core.protocols import Quantizer
    from quantkit.search.budget import Budget
    from quantkit.search.build import Database
    from quantkit.search.evolve import State
    from quantkit.search.session import Outcome, Session
    from quantkit.search.spaces import Space

_BUDGET, _SEARCH, _CANDIDATES = "The budget", "The search", "Candidates"
CANDIDATES = "gptq(2), gptq(3), gptq(4), gptq(5), gptq(6), gptq(8)"
HEAD_BITS = 6
"""Of head and embedding, where a budget is for all of the model."""
STAGES = stages_text(Evolution.stages)
SPARSITY_STEPS = (-0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3)


_AvgBits = Annotated[
    float | None,
    typer.Option(help="Bits per weight of the searched layers, every stored byte counted.", rich_help_panel=_BUDGET),
]
_Total = Annotated[
    str | None,
    typer.Option("--size", help="Of all weight files: 4GB, 3.5GiB, 800MB.", rich_help_panel=_BUDGET),
]
_Fit = Annotated[
    str | None,
    typer.Option(
        help="Peak memory of generation at --context tokens: weights, KV cache, activations, allocator, libraries.",
        rich_help_panel=_BUDGET,
    ),
]
_LatencyMs = Annotated[
    float | None,
    typer.Option(help="Of all packed layers' kernels for one token, by --timings.", rich_help_panel=_BUDGET),
]
_Timings = Annotated[
    Path | None, typer.Option(help="Measured kernels, for --latency-ms; JSON.", rich_help_panel=_BUDGET)
]
_Sparsity = Annotated[
    float | None,
    typer.Option(help="Prune instead: share of the layers' weights that become zero.", rich_help_panel=_BUDGET),
]
_DropBlocks = Annotated[
    int | None, typer.Option(help="Prune instead: leave out so many decoder blocks.", rich_help_panel=_BUDGET)
]
_Candidates = Annotated[
    str | None,
    typer.Option(
        show_default=CANDIDATES,
        help="Ways to pack a layer, e.g. 'gptq(3), hadamard(pyramid(2.5)), low_rank(gptq(2), 4)'.",
        rich_help_panel=_CANDIDATES,
    ),
]
_Base = Annotated[
    str | None,
    typer.Option(
        help="The candidate that packs the layers in front, while a layer is calibrated; gptq(3) by default.",
        rich_help_panel=_CANDIDATES,
    ),
]
_HeadBits = Annotated[
    int | None,
    typer.Option(
        show_default="6 with --size and --fit",
        help="Of the head (GPTQ) and the input embedding, which are not searched, 1 to 8; 0 or 16 leaves them dense.",
        rich_help_panel=_CANDIDATES,
    ),
]
_Include = Annotated[
    list[str] | None,
    typer.Option(help="Pattern of layers outside the blocks to pack too, e.g. lm_head.", rich_help_panel=_CANDIDATES),
]
_Ignore = Annotated[
    list[str] | None, typer.Option(help="Pattern of layers to leave dense.", rich_help_panel=_CANDIDATES)
]
_Database = Annotated[
    Path | None,
    typer.Option(help="Folder of the candidates, NAME-candidates by default: made once, used by all searches."),
]
_SearchSamples = Annotated[
    int, typer.Option(help="Windows of other text that the search measures on.", rich_help_panel=_SEARCH)
]
_HeldOut = Annotated[
    int, typer.Option(help="So many of them only for the comparison at the end.", rich_help_panel=_SEARCH)
]
_Stages = Annotated[str, typer.Option(help="Survivors x tokens of each selection.", rich_help_panel=_SEARCH)]
_Measure = Annotated[
    Literal["kl", "perplexity"], typer.Option(help="kl (to the full model) or perplexity.", rich_help_panel=_SEARCH)
]
_Start = Annotated[
    Literal["best", "uniform"],
    typer.Option(help="best (of uniform, greedy and knapsack) or uniform.", rich_help_panel=_SEARCH),
]
_Top = Annotated[
    int, typer.Option(help="Successors of a token that are kept of the full model.", rich_help_panel=_SEARCH)
]


def search_command(
    model: options.Model,
    avg_bits: _AvgBits = None,
    total: _Total = None,
    fit: _Fit = None,
    latency_ms: _LatencyMs = None,
    timings: _Timings = None,
    sparsity: _Sparsity = None,
    drop_blocks: _DropBlocks = None,
    context: Annotated[int | None, typer.Option(help="Tokens, for --fit.", rich_help_panel=_BUDGET)] = None,
    batch: Annotated[int, typer.Option(help="Sequences, for --fit.", rich_help_panel=_BUDGET)] = 1,
    kv_bits: options.KvBits = None,
    candidates: _Candidates = None,
    base: _Base = None,
    head_bits: _HeadBits = None,
    include: _Include = None,
    ignore: _Ignore = None,
    database: _Database = None,
    calibration: options.Text = "wikitext2",
    num_samples: options.NumSamples = 128,
    seqlen: options.Seqlen = None,
    target_shift: options.Shift = TARGET_SHIFT,
    search_samples: _SearchSamples = 256,
    held_out: _HeldOut = 32,
    generations: Annotated[int, typer.Option(help="Of the search.", rich_help_panel=_SEARCH)] = Evolution.generations,
    offspring: Annotated[int, typer.Option(help="In each.", rich_help_panel=_SEARCH)] = Evolution.offspring,
    stages: _Stages = STAGES,
    measure: _Measure = "kl",
    start: _Start = "best",
    top: _Top = 512,
    output: Annotated[Path | None, typer.Option(help="Folder to make; by default NAME-searched.")] = None,
    device: options.Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the search and of its text.")] = 0,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Search the best bits for every layer: candidates are made once, then an evolution chooses among them.

    Beside the checkpoint lie quantkit_plan.json, which `quantkit quantize --plan` takes, quantkit_search.json and a
    picture. An interrupted search continues with --resume. Several processes share the work under torchrun.
    """
    from quantkit.io.checkpoint import check_output
    from quantkit.io.source import resolve_folder
    from quantkit.run.recipe import Calibration, Recipe
    from quantkit.search.build import build
    from quantkit.search.session import SearchSettings, Session, check_text
    from quantkit.search.spaces import BlockSpace, CandidateSpace

    begun = time.monotonic()
    folder = resolve_folder(model)
    output = output or Path(f"{Path(model).resolve().name}-searched")
    unfinished = output.with_name(output.name + ".search")
    check_output(output, folder, resume=resume, overwrite=overwrite)
    if unfinished.exists() and not (resume or overwrite):
        raise QuantkitError(f"{unfinished} holds an unfinished search; --resume continues it, --overwrite starts anew")
    processes, where = options.begin_processes(device)
    ends_bits = _ends_bits(head_bits, total is not None or fit is not None, drop_blocks is not None)
    room = (fit, context, batch, kv_bits, where, ends_bits is not None)
    budget = _budget(folder, avg_bits, total, room, latency_ms, timings, sparsity, drop_blocks)
    evolution = Evolution(generations, offspring, parse_stages(stages))
    settings = SearchSettings(evolution, measure, start, held_out, top, seed=seed)
    text = Calibration(calibration, search_samples, seqlen, seed=1_000_003 + seed)
    offers, first = _candidates(candidates, base, sparsity)
    rules: dict[str, Quantizer | None] = dict.fromkeys(include or (), first)
    rules |= dict.fromkeys(ignore or ())
    recipe = Recipe(first, rules, target_shift, Calibration(calibration, num_samples, seqlen), head_bits=ends_bits)
    place = database or Path(f"{Path(model).resolve().name}-candidates")
    main = processes.is_main_process
    check_text(search_samples, settings)
    if main and not resume:
        _remove(unfinished)
    try:
        with search_progress(main, generations) as (told, progress):
            made: Database | None = None
            if drop_blocks is None:
                with processes.main_process_first():
                    made = build(folder, recipe, offers, place, budget=budget, device=where, progress=told)
                more = budget.check(made.source, tuple(made.blocks), made.quantizers.values(), made.fixed)
                if main and more:
                    console.print(f"note: {more}")
            make_space: Callable[..., Space] = BlockSpace
            if made is not None:
                make_space = partial(CandidateSpace, database=made, cost=budget.cost)
            predictions = unfinished if made is None else place
            session = Session(folder, make_space, predictions, text, settings, where, told)
            names = session.space.names
            allowed = budget.units(made.source, names, made.fixed) if made else budget.units(None, names)
            session.space.index.check_budget(allowed)
            unfinished.mkdir(parents=True, exist_ok=True)

            def show(now: State) -> None:
                progress(len(now.history), now.history[-1].fitness, now.history[-1].cost / allowed)

            outcome = session.search(allowed, unfinished / "search.json", show)
    except KeyboardInterrupt:
        raise Interrupted("stopped; repeat the command with --resume to continue") from None
    if main and made is None:
        _publish_pruned(folder, session, outcome, unfinished, output)
    elif main and made is not None:
        _publish(model, folder, session, made, outcome, output, where, begun, overwrite)
    if main:
        _say_outcome(session, outcome, output)
        _remove(unfinished)
    processes.wait_for_everyone()


def _remove(unfinished: Path) -> None:
    """Deletes a search's own files, and its folder where nothing else is in it."""
    (unfinished / "search.json").unlink(missing_ok=True)
    for made in (*unfinished.glob("teacher-*"), *unfinished.glob("checkpoint")):
        shutil.rmtree(made)
    if unfinished.is_dir() and not any(unfinished.iterdir()):
        unfinished.rmdir()


def _ends_bits(head_bits: int | None, of_all: bool, drops: bool) -> int | None:
    """Bits of head and embedding; None leaves them dense."""
    if head_bits is None:
        return HEAD_BITS if of_all else None
    if head_bits not in (0, 16, *range(1, 9)):
        raise QuantkitError(f"--head-bits {head_bits}: give 1 to 8, or 0 (or 16) to leave head and embedding dense")
    if drops:
        raise QuantkitError("--head-bits is given with --drop-blocks, which makes a dense model; leave it out")
    return head_bits % 16 or None


def _candidates(
    candidates: str | None, base: str | None, sparsity: float | None
) -> tuple[tuple[Quantizer, ...], Quantizer]:
    """(all candidates, the base)."""
    from quantkit.core import spec
    from quantkit.run.recipe import fraction_of, with_bits

    if sparsity is not None and candidates is None:
        levels = sorted({round(max(0.0, min(0.95, sparsity + step)), 3) for step in SPARSITY_STEPS})
        candidates = ", ".join(f"sparse({level:g})" for level in levels)
        base = base or f"sparse({sparsity:g})"
    offers = spec.read_several(CANDIDATES if candidates is None else candidates)
    default = spec.read("gptq(3)")
    first = spec.read(base) if base else default if default in offers else offers[0]
    for quantizer in dict.fromkeys((*offers, first)):
        if (bits := fraction_of(quantizer)) is not None:
            lower, upper = (spec.write(with_bits(quantizer, int(bits) + more)) for more in (0, 1))
            raise QuantkitError(
                f"the candidate {spec.write(quantizer)}: a layer gets a whole number of bits; offer {lower} and "
                f"{upper}, and the search mixes them"
            )
    return tuple(dict.fromkeys((*offers, first))), first


def _budget(
    folder: Path,
    avg_bits: float | None,
    total: str | None,
    room: tuple[str | None, int | None, int, int | None, torch.device, bool],
    latency_ms: float | None,
    timings: Path | None,
    sparsity: float | None,
    drop_blocks: int | None,
) -> Budget:
    """The one budget that was given."""
    from transformers import AutoConfig

    from quantkit.search.budget import Budget, parse_size, read_timings

    fit, context = room[:2]
    budgets = {
        "--avg-bits": avg_bits, "--size": total, "--fit": fit, "--latency-ms": latency_ms, "--sparsity": sparsity,
        "--drop-blocks": drop_blocks,
    }  # fmt: skip
    given = [name for name, value in budgets.items() if value is not None]
    silent = ("--context", "--fit", context), ("--kv-bits", "--fit", room[3]), ("--timings", "--latency-ms", timings)
    for name, reader, there in silent:
        if there is not None and budgets[reader] is None:
            raise QuantkitError(f"{name} is given without {reader}, which reads it")
    if len(given) != 1:
        what = "none is given" if not given else f"{' and '.join(given)} are given"
        raise QuantkitError(f"give one budget, such as --avg-bits 3, --size 4GB or --fit 12GB; {what}")
    if avg_bits is not None:
        if not 0 < avg_bits <= 16:
            raise QuantkitError(f"--avg-bits {avg_bits:g}: give bits per weight, such as 3")
        return Budget(avg_bits, "bits")
    if total is not None:
        return Budget(parse_size(total), "bytes")
    if sparsity is not None:
        if not 0 < sparsity < 1:
            raise QuantkitError(f"--sparsity {sparsity:g}: give a share between 0 and 1, such as 0.5")
        return Budget(1 - sparsity, "weights")
    if drop_blocks is not None:
        if drop_blocks < 1:
            raise QuantkitError(f"--drop-blocks {drop_blocks}: give at least 1")
        blocks = AutoConfig.from_pretrained(folder).get_text_config().num_hidden_layers
        if drop_blocks >= blocks:
            raise QuantkitError(f"--drop-blocks {drop_blocks}: the model has {blocks} blocks, and one must stay")
        return Budget(blocks - drop_blocks, "blocks")
    if latency_ms is not None:
        if timings is None or not 0 < latency_ms < 1e6:
            raise QuantkitError("--latency-ms needs a positive time, and --timings, a table of measured kernels")
        return Budget(latency_ms, "latency", read_timings(timings))
    return Budget(_fitting(folder, *room), "bytes")


def _fitting(
    folder: Path,
    fit: str | None,
    context: int | None,
    batch: int,
    kv_bits: int | None,
    device: torch.device,
    packs_head: bool,
) -> int:
    """Bytes of weights that leave room for what generation needs beside them."""
    from quantkit.io.source import ModelFolder
    from quantkit.kvcache.config import KVCacheConfig
    from quantkit.models.structure import block_linears, ends
    from quantkit.search.budget import parse_size
    from quantkit.search.memory import beside_weights

    assert fit is not None
    if context is None or context < 1 or batch < 1:
        raise QuantkitError("--fit needs --context, the tokens that the KV cache is to hold, and --batch of at least 1")
    source = ModelFolder(folder, structure_only=True)
    kv = None if kv_bits is None else KVCacheConfig.gear(kv_bits)
    head = ends(source.model)[1] if packs_head else None
    need = beside_weights(source.model, [*block_linears(source.model)], context, batch, kv, device, head)
    left = parse_size(fit) - need.total
    console.print(
        f"{fit} at {context:,} tokens x {batch}: {size(need.cache)} of KV cache, {size(need.activations)} of "
        f"activations, {size(need.reserve)} for allocators and libraries; {size(max(left, 0))} for the model"
    )
    if left <= 0:
        raise QuantkitError(f"--fit {fit}: {size(need.total)} are needed beside the weights at this context and batch")
    return left


def _publish(
    model: str,
    folder: Path,
    session: Session,
    database: Database,
    outcome: Outcome,
    output: Path,
    device: torch.device,
    begun: float,
    overwrite: bool,
) -> None:
    """Makes a checkpoint of candidates, with its plan, its record and its picture."""
    from quantkit.core import spec
    from quantkit.io.checkpoint import SEARCH_RECORD
    from quantkit.models.plan import tied, with_own_weight
    from quantkit.quantizers.target_shift import unshifted
    from quantkit.search.picture import draw
    from quantkit.search.session import assemble
    from quantkit.search.spaces import CandidateSpace

    space = session.space
    assert isinstance(space, CandidateSpace)
    chosen = space.chosen(outcome.assignment)
    plan = {layer: spec.write(database.quantizers[key]) for layer, key in chosen.items()}
    shared, packed = tied(database.fixed), with_own_weight(database.fixed)
    plan |= {layer: spec.write(unshifted(packed[shared.get(layer, layer)])) for layer in database.fixed}
    files = {
        "quantkit_plan.json": json.dumps({"layers": plan}, indent=2) + "\n",
        SEARCH_RECORD: _record(session, outcome, plan),
    }
    settings = {"search": asdict(session.settings), "budget": outcome.budget}
    report = assemble(
        folder, database, chosen, output, name=model, settings=settings, files=files, device=device,
        start=begun, overwrite=overwrite,
    )  # fmt: skip
    report_table(report)
    bits = {layer.name: layer.bits_per_weight for layer in report.layers if layer.name not in shared}
    try:
        draw(outcome, bits, session.settings.measure, output / "quantkit_search.png")
    except ImportError:
        console.print("no picture: matplotlib is not installed (pip install matplotlib)")


def _publish_pruned(folder: Path, session: Session, outcome: Outcome, unfinished: Path, output: Path) -> None:
    """Makes a dense checkpoint of the blocks that stay."""
    from quantkit.core.device import parse_dtype
    from quantkit.io.checkpoint import SEARCH_RECORD, read_config, replace_folder
    from quantkit.io.source import load_tokenizer
    from quantkit.search.spaces import BlockSpace

    space = session.space
    assert isinstance(space, BlockSpace)
    kept = {name: bool(level) for name, level in zip(space.names, outcome.assignment, strict=True)}
    finished = unfinished / "checkpoint"
    stored = parse_dtype(read_config(folder).get("dtype"))
    pruned: Any = space.pruned(outcome.assignment)
    (pruned if stored is None else pruned.to(stored)).save_pretrained(finished)
    load_tokenizer(folder).save_pretrained(finished)
    (finished / SEARCH_RECORD).write_text(_record(session, outcome, kept))
    replace_folder(finished, output)
    left_out = ", ".join(name for name, stays in kept.items() if not stays)
    console.print(f"left out: {left_out}")


def _record(session: Session, outcome: Outcome, layers: Mapping[str, Any]) -> str:
    record = asdict(outcome) | {"measure": session.settings.measure, "layers": layers}
    return json.dumps(record, indent=2) + "\n"


def _say_outcome(session: Session, outcome: Outcome, output: Path) -> None:
    table = Table(title="on held-out text", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("assignment")
    table.add_column("KL" if session.settings.measure == "kl" else "log-likelihood", justify="right")
    for name, figure in outcome.held_out.items():
        table.add_row(name, f"{figure:.4f}")
    console.print(table)
    if session.settings.measure == "kl":
        share = f"{100 * outcome.seen:.1f}% of the full KL (one held-out window)"
        console.print(
            f"seen             {share} in the likeliest {session.settings.top} successors and the rest as one"
        )
    console.print(f"budget           {outcome.spent:,} of {outcome.budget:,} spent")
    console.print(f"checkpoint: [bold]{output}[/]   load it with quantkit.load({str(output)!r})", soft_wrap=True)
