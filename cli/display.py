"""What the verbs print: one console, progress bars, tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from quantkit.core.units import size

if TYPE_CHECKING:
    from quantkit.run.report import Report
    from quantkit.tuning.end_to_end import Progress as TuningProgress

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    eta = (TextColumn("ETA"), TimeRemainingColumn(compact=True, elapsed_when_finished=False))
    return Progress(*columns, *eta, console=Console(stderr=True), transient=False)


@contextmanager
def block_progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar over blocks: yields a callback (blocks done, blocks in all, name of the block begun)."""
    with _bar() as bar:
        task = bar.add_task("calibration text", total=None)

        def update(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name or "done")

        yield update


@contextmanager
def window_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar over sequences: yields a callback (sequences done, sequences in all)."""
    with _bar() as bar:
        task = bar.add_task("sequences", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def tuning_progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar over kernel launches: yields a callback (done, in all, what is being measured)."""
    with _bar() as bar:
        task = bar.add_task("tuning", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name or "done")


@contextmanager
def check_progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar over checks: yields a callback (done, in all, what is being checked)."""
    with _bar() as bar:
        task = bar.add_task("checks", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name or "done")


@contextmanager
def tuning_bars() -> Iterator[dict[str, Callable]]:
    """A bar over the sequences that are cached, then over tuning steps: yields `tune`'s callbacks by name."""
    with _bar() as bar:
        task = bar.add_task("teacher and student", total=None)

        def progress(now: TuningProgress) -> None:
            text = f"loss {now.loss:.3f}, {now.changed} codes, KL {now.kl:.4f}"
            bar.update(task, completed=now.step, total=now.steps, description=text)

        def caching(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description="teacher's predictions")

        yield {"progress": progress, "caching": caching}


@contextmanager
def search_progress(shown: bool, generations: int) -> Iterator[tuple[Callable, Callable]]:
    """A bar over what comes before a search, and one over its generations.

    Yields:
        callbacks (done, in all, of what) and (generations done, fitness, fraction of the budget); silent unless
        `shown`.
    """
    if not shown:
        yield lambda *_: None, lambda *_: None
        return
    with _bar() as bar:
        # nothing is shown before something happens: what was asked for may be refused
        before = bar.add_task("candidates", total=None, visible=False)
        after = bar.add_task("generations", total=generations, visible=False)

        def told(done: int, total: int, name: str) -> None:
            bar.update(before, completed=done, total=total, description=name or "candidates", visible=True)
            bar.update(after, visible=True)

        def progress(done: int, fitness: float, fraction: float) -> None:
            text = f"fitness {fitness:.4f}, {100 * fraction:.2f}% of the budget"
            bar.update(after, completed=done, description=text, visible=True)

        yield told, progress


def made(output: Path) -> None:
    """Says where a checkpoint lies; a path may hold what rich would read as markup."""
    line = f"checkpoint: [bold]{escape(str(output))}[/]   load it with {escape(f'quantkit.load({str(output)!r})')}"
    console.print(line, soft_wrap=True)


def report_table(report: Report) -> None:
    """Prints a quantization report."""
    table = Table(title=escape(report.model), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    tuned = any(layer.tuned for layer in report.layers)
    for heading in ("format", "bits/w", "error", "damping", *(["block tuned"] if tuned else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in report.layers:
        damping = "" if layer.damping is None else f"{layer.damping:g}"
        cells = [layer.name, layer.format, f"{layer.bits_per_weight:.3f}", f"{layer.relative_error:.2e}", damping]
        table.add_row(*cells, *(["{:.2e} -> {:.2e}".format(*layer.tuned)] if layer.tuned else []))
    console.print(table)
    fraction = 100 * report.packed_weights / report.all_weights
    console.print(
        f"bits per weight  {report.bits_per_weight:.3f} measured, in layers that hold {fraction:.1f}% of the weights"
    )
    ratio = report.bytes_before / report.bytes_after
    console.print(f"size             {size(report.bytes_before)} -> {size(report.bytes_after)} ({ratio:.2f}x smaller)")
    gpu = f", {size(report.peak_device_bytes)} on the GPU" if report.peak_device_bytes else ""
    console.print(f"peak memory      {size(report.peak_memory_bytes)}{gpu}")
    console.print(f"time             {report.seconds:.1f} s")
    for note in report.notes:
        console.print(f"note             {note}")
