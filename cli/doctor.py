"""`quantkit doctor`: what will happen on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.table import Table

from quantkit.cli import options
from quantkit.cli.display import console
from quantkit.cli.progress import check_progress
from quantkit.core.units import size

if TYPE_CHECKING:
    from quantkit.evals.doctor import Findings


def doctor_command(
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Say what will happen on this machine: versions, memory, kernels; each format is checked and timed.

    Ends with exit code 1 if a result is wrong. On a GPU the kernels' self-checks are repeated, and remembered.
    """
    from quantkit.core.device import pick_device
    from quantkit.evals.doctor import examine

    where = pick_device(device)
    if where.type == "cuda" and where.index is None:
        where = pick_device("cuda:0")
    with check_progress() as progress:
        found = examine(where, progress)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _print(found)
    if found.faults:
        raise typer.Exit(1)


def _print(found: Findings) -> None:
    versions = ", ".join(f"{name} {known or 'missing'}" for name, known in found.versions.items())
    console.print(f"versions   {versions}", soft_wrap=True)
    for gpu in found.gpus:
        what = f"{gpu['name']}, compute capability {gpu['capability']}, driver {gpu['driver']}"
        console.print(f"GPU        {what}, {size(gpu['free'])} of {size(gpu['total'])} free", soft_wrap=True)
    if not found.gpus:
        console.print("GPU        none that torch sees")
    ram, cores = found.memory["ram"], f"{found.memory['cores']} cores, {found.memory['threads']} threads"
    console.print(f"memory     {size(ram['free'])} of {size(ram['total'])} free, {cores}")
    for path, free in found.memory["disk"].items():
        console.print(f"disk       {'unknown' if free is None else size(free)} free at {path}", markup=False)
    console.print(f"kernels    {found.kernels}")
    if found.families:
        table = _table("kernels, each checked against fp64", "family", "verdict", "seconds")
        for family in found.families:
            table.add_row(family.name, family.verdict, f"{family.seconds:.1f}")
        console.print(table)
    _print_products(found)
    for name, known in found.optional.items():
        if known is None:
            _say_missing(name)
    for fault in found.faults:
        console.print("[bold red]wrong[/]     ", end="")
        console.print(fault, markup=False, soft_wrap=True)
    console.print("[bold]all is sound[/]" if not found.faults else f"[bold red]{len(found.faults)} faults[/]")


def _print_products(found: Findings) -> None:
    table = _table(f"products on {found.device}", "format", "error", "one row", "dense", "x dense")
    for product in found.products:
        error = "fails" if product.error is None else f"{product.error:.1e}"
        seconds, dense = product.seconds, product.dense_seconds
        times = ["" if value is None else f"{1e3 * value:.3f} ms" for value in (seconds, dense)]
        ratio = "" if seconds is None or dense is None else f"{seconds / dense:.2f}"
        table.add_row(product.name, error, *times, ratio)
    console.print(table)
    console.print(
        "error: the largest of any element over the result's root mean square; times are warm, weights in cache"
    )


def _say_missing(name: str) -> None:
    from quantkit.evals.doctor import OPTIONAL

    extra, purpose = OPTIONAL[name]
    console.print(f"missing    {name}: {purpose} (pip install 'quantkit-llm[{extra}]')", markup=False, soft_wrap=True)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", overflow="fold")
    return table
