"""`quantkit search`: the best candidate of every layer under a budget, as a packed checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from quantkit.cli import options
from quantkit.cli.display import aside, console, made, report_table
from quantkit.cli.progress import duration, search_progress
from quantkit.core.constants import TARGET_SHIFT
from quantkit.core.errors import Interrupted
from quantkit.core.units import size
from quantkit.evopress.settings import CANDIDATES, Evolution, parse_stages, stages_text

if TYPE_CHECKING:
    from quantkit.evopress.estimate import SearchEstimate
    from quantkit.evopress.run import Searched

_BUDGET, _SEARCH, _CANDIDATES = "The budget", "The search", "Candidates"
STAGES = stages_text(Evolution.stages)


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
    typer.Option(help="Prune instead: fraction of the layers' weights that become zero.", rich_help_panel=_BUDGET),
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
    int, typer.Option(help="Sequences of other text that the search measures on.", rich_help_panel=_SEARCH)
]
_HeldOut = Annotated[
    int, typer.Option(help="So many of them only for the comparison at the end.", rich_help_panel=_SEARCH)
]
_Stages = Annotated[str, typer.Option(help="Survivors x tokens of each selection.", rich_help_panel=_SEARCH)]
_Measure = Annotated[
    Literal["kl", "perplexity"], typer.Option(help="kl (to the full model) or perplexity.", rich_help_panel=_SEARCH)
]
_EachExpert = Annotated[
    bool,
    typer.Option(
        "--each-expert",
        help="Search each of a mixture's experts by itself, instead of a block's at the same place together.",
        rich_help_panel=_SEARCH,
    ),
]
_Start = Annotated[
    Literal["best", "uniform", "predicted"],
    typer.Option(
        "--start-from",
        "--start",
        help="best (of uniform, greedy and knapsack), uniform, or predicted: by what a pass back through the model "
        "says, without measuring layers.",
        rich_help_panel=_SEARCH,
    ),
]
_Top = Annotated[
    int, typer.Option(help="Top-k tokens of each place that are kept of the full model.", rich_help_panel=_SEARCH)
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
    fisher: options.Fisher = None,
    search_samples: _SearchSamples = 256,
    held_out: _HeldOut = 32,
    generations: Annotated[int, typer.Option(help="Of the search.", rich_help_panel=_SEARCH)] = Evolution.generations,
    offspring: Annotated[int, typer.Option(help="In each.", rich_help_panel=_SEARCH)] = Evolution.offspring,
    stages: _Stages = STAGES,
    measure: _Measure = "kl",
    start: _Start = "best",
    top: _Top = 512,
    each_expert: _EachExpert = False,
    output: Annotated[Path | None, typer.Option(help="Folder to make; by default NAME-searched.")] = None,
    device: options.Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the search and of its text.")] = 0,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Search the best bits for every layer: candidates are made once, then an evolution chooses among them.

    Beside the checkpoint lie quantkit_plan.json, which `quantkit quantize --plan` takes, quantkit_search.json and a
    picture. An interrupted search continues with --resume. Several processes share the work under torchrun.
    """
    from quantkit.api import search
    from quantkit.evopress.estimate import SearchEstimate
    from quantkit.evopress.run import Watch

    output = output or Path(f"{Path(model).resolve().name}-searched")
    shown, notes = options.is_first_process(), list[str]()
    try:
        with search_progress(shown, generations) as (told, progress):
            found = search(
                model, output, avg_bits=avg_bits, size=total, fit=fit, latency_ms=latency_ms, timings=timings,
                sparsity=sparsity, drop_blocks=drop_blocks, context=context, batch=batch, kv_bits=kv_bits,
                candidates=candidates, base=base, head_bits=head_bits, include=include or (), ignore=ignore or (),
                database=database, calibration=calibration, num_samples=num_samples, seqlen=seqlen,
                target_shift=target_shift, fisher=fisher, search_samples=search_samples, held_out=held_out,
                measure=measure,
                evolution=Evolution(generations, offspring, parse_stages(stages)), start=start, top=top, device=device,
                each_expert=each_expert,
                seed=seed, resume=resume, overwrite=overwrite, dry_run=dry_run,
                watch=Watch(told, progress, notes.append if as_json else aside.print),
            )  # fmt: skip
    except KeyboardInterrupt:
        raise Interrupted("stopped; repeat the command with --resume to continue") from None
    if found is None or not shown:
        return
    if as_json:
        record = asdict(found) if isinstance(found, SearchEstimate) else found.to_json() | {"notes": notes}
        print(json.dumps(record, indent=2))
    elif isinstance(found, SearchEstimate):
        _say_estimate(found, model, output)
    else:
        _say(found, top)


def _say_estimate(expected: SearchEstimate, model: str, output: Path) -> None:
    console.print(f"[bold]{escape(model)}[/] -> {escape(str(output))}", soft_wrap=True)
    levels = f", each at one of {expected.levels} levels at most" if expected.database else ""
    console.print(f"{'layers' if expected.database else 'blocks'} to search   {expected.items}{levels}")
    if expected.database is not None:
        there = expected.candidates - expected.missing
        console.print(f"candidates         {expected.candidates:,}, {expected.missing:,} to make and {there:,} there")
        console.print(
            f"their database     {escape(expected.database)}: {size(expected.candidate_bytes)}, "
            f"{size(expected.missing_bytes)} of them to make",
            soft_wrap=True,
        )
    console.print(f"predictions        {size(expected.prediction_bytes)} of the full model's")
    span = f"these take {expected.least:,} to {expected.most:,}"
    console.print(f"budget             {expected.budget:,} {expected.unit}; {span}")
    text = f"{expected.sequences:,} sequences of {expected.seqlen:,}"
    about = f"{expected.generations:,} generations, their starts and the comparison at the end"
    console.print(f"evaluations        at most {expected.evaluations:,}, of {about}")
    console.print(f"tokens             at most {expected.tokens:,}, of {text}")
    if expected.database is not None:
        console.print(f"time of candidates about {duration(expected.candidate_seconds)}, on this machine as it is now")
    console.print(f"time of the search not estimated, nor is its memory; on {expected.device}")
    for note in expected.notes:
        console.print(escape(note), soft_wrap=True)


def _say(found: Searched, top: int) -> None:
    if found.report is None:
        aside.print(f"left out: {', '.join(found.left_out)}")
    else:
        report_table(found.report)
        if not found.picture:
            aside.print("no picture: matplotlib is not installed (pip install matplotlib)")
    outcome = found.outcome
    table = Table(title="on held-out text", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("assignment")
    table.add_column("KL" if found.measure == "kl" else "log-likelihood", justify="right")
    for name, figure in outcome.held_out.items():
        table.add_row(name, f"{figure:.4f}")
    aside.print(table)
    if found.measure == "kl":
        seen = f"{100 * outcome.seen:.1f}% of the full KL (one held-out sequence)"
        aside.print(f"seen             {seen} in the top {top} tokens and the rest as one")
    aside.print(f"budget           {outcome.spent:,} of {outcome.budget:,} spent")
    made(found.output)
