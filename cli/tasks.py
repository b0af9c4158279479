"""`quantkit eval --tasks`: scores on tasks of lm-evaluation-harness, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from quantkit.cli.display import console
from quantkit.core.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.evals.tasks import TaskResults

_PANEL = "Tasks"
Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[,NAME]",
        help="Tasks of lm-evaluation-harness instead of text, e.g. arc_easy,hellaswag; needs the extra `tasks`.",
        rich_help_panel=_PANEL,
    ),
]
IncludePath = Annotated[
    Path | None, typer.Option(help="Folder of your own tasks, the harness's YAML files.", rich_help_panel=_PANEL)
]
NumFewshot = Annotated[
    int | None, typer.Option(help="Examples in front of each document; by default the task's.", rich_help_panel=_PANEL)
]
Limit = Annotated[int | None, typer.Option(help="Only so many documents of each task.", rich_help_panel=_PANEL)]
BatchSize = Annotated[
    int | None, typer.Option(help="Documents that run together, 1 by default.", rich_help_panel=_PANEL)
]


def of_tasks(settings: Mapping[str, Any]) -> bool:
    """Whether the options ask for tasks.

    Args:
        settings: of `quantkit eval`, by name.

    Raises:
        QuantkitError: options that say nothing without, or beside, --tasks.
    """
    own = ("include_path", "num_fewshot", "limit", "batch_size")
    others = ("seqlen", "stride", "num_samples", "activation_bits", "kv_bits")
    given = [name for name in (others if settings["tasks"] else own) if settings[name] is not None]
    if given:
        word = "is not read beside" if settings["tasks"] else "says nothing without"
        raise QuantkitError(f"--{given[0].replace('_', '-')} {word} --tasks; leave it out")
    return bool(settings["tasks"])


def say_tasks(settings: Mapping[str, Any]) -> None:
    """Measures and prints.

    Args:
        settings: of `quantkit eval`, by name.
    """
    from quantkit.evals.tasks import evaluate_tasks

    found = evaluate_tasks(
        settings["model"],
        [name for word in settings["tasks"].split(",") if (name := word.strip())],
        batch_size=settings["batch_size"] or 1,
        **{
            name: settings[name]
            for name in ("baseline", "include_path", "num_fewshot", "limit", "device", "dtype", "unpack")
        },
    )
    if settings["as_json"]:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _print(found)


def _print(found: TaskResults) -> None:
    compared = found.settings["baseline"] is not None
    table = Table(title=escape(found.settings["model"]), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", overflow="fold")
    table.add_column("metric")
    for heading in ("shots", "documents", "score", *(["before", "difference"] if compared else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for score in found.scores:
        cells = [escape(score.task), escape(score.metric), *(_count(n) for n in (score.shots, score.samples))]
        cells.append(_figure(score.value, score.stderr))
        if compared:
            difference = "" if score.baseline is None else f"{score.value - score.baseline:+.4f}"
            cells += [_figure(score.baseline, score.baseline_stderr), difference]
        table.add_row(*cells)
    console.print(table)
    if compared:
        console.print(f"before is {escape(found.settings['baseline'])}", soft_wrap=True)
    console.print(f"scored by {found.settings['harness']}")


def _count(value: int | None) -> str:
    return "" if value is None else str(value)


def _figure(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" + ("" if error is None else f" +- {error:.4f}")
