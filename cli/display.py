"""What the verbs print as results: one console, tables, where a checkpoint lies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantkit.cli.options import is_first_process
from quantkit.cli.voice import Voice, voice
from quantkit.core.units import size

if TYPE_CHECKING:
    from quantkit.run.report import LayerReport, Report


class _Aside(Console):
    """For what --quiet leaves out."""

    def print(self, *objects: Any, **settings: Any) -> None:
        """As any console's, or nothing; several processes say it once."""
        if voice() > Voice.QUIET and is_first_process():
            super().print(*objects, **settings)


_FORM: dict[str, Any] = {"highlight": False, "width": None if sys.stdout.isatty() else 120}
console, aside = Console(**_FORM), _Aside(**_FORM)


def made(output: Path) -> None:
    """Says where a checkpoint lies; a path may hold what rich would read as markup."""
    if voice() == Voice.QUIET:
        print(output)
        return
    line = f"checkpoint: [bold]{escape(str(output))}[/]   load it with {escape(f'quantkit.load({str(output)!r})')}"
    console.print(line, soft_wrap=True)


def _experts_together(layers: Sequence[LayerReport]) -> list[LayerReport]:
    """Layers with all experts of a block at the same place as one: how many, their mean bits and error."""
    from quantkit.models.experts import of_all

    groups: dict[str, list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault(of_all(layer.name), []).append(layer)
    found = []
    for name, (first, *others) in groups.items():
        own = [first, *others]
        formats, count = sorted({layer.format for layer in own}), len(own)
        found.append(
            replace(
                first,
                name=f"{name} ({count})" if others else first.name,
                format=formats[0] if len(formats) == 1 else f"{len(formats)} formats",
                bits_per_weight=sum(layer.bits_per_weight for layer in own) / count,
                relative_error=sum(layer.relative_error for layer in own) / count,
                damping=max((layer.damping for layer in own if layer.damping is not None), default=None),
            )
        )
    return found


def without_prefix(names: Sequence[str]) -> tuple[str, list[str]]:
    """(what the names of layers in blocks begin with, all names without it), so that 80 columns hold a row."""
    numbered = [name for name in names if any(part.isdigit() for part in name.split("."))]
    parts = numbered[0].split(".") if numbered else []
    before = ".".join(parts[: next((i for i, part in enumerate(parts) if part.isdigit()), 0)])
    if not before or not all(name.startswith(f"{before}.") for name in numbered):
        return "", list(names)
    return before, [name.removeprefix(f"{before}.") for name in names]


def report_table(report: Report) -> None:
    """Prints a quantization report; nothing with --quiet."""
    layers = _experts_together(report.layers)
    before, names = without_prefix([layer.name for layer in layers])
    table = Table(title=escape(report.model), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(escape(f"layer of {before}" if before else "layer"), overflow="fold")
    tuned = any(layer.tuned for layer in layers)
    for heading in ("format", "bits/w", "error", "damping", *(["block tuned"] if tuned else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, layer in zip(names, layers, strict=True):
        damping = "" if layer.damping is None else f"{layer.damping:g}"
        cells = [escape(name), layer.format, f"{layer.bits_per_weight:.3f}", f"{layer.relative_error:.2e}", damping]
        table.add_row(*cells, *(["{:.2e} -> {:.2e}".format(*layer.tuned)] if layer.tuned else []))
    aside.print(table)
    fraction = 100 * report.packed_weights / report.all_weights
    aside.print(
        f"bits per weight  {report.bits_per_weight:.3f} measured, in layers that hold {fraction:.1f}% of the weights; "
        f"{report.bits_model:.3f} over the whole model",
        soft_wrap=True,
    )
    ratio = report.bytes_before / report.bytes_after
    aside.print(f"size             {size(report.bytes_before)} -> {size(report.bytes_after)} ({ratio:.2f}x smaller)")
    gpu = f", {size(report.peak_device_bytes)} on the GPU" if report.peak_device_bytes else ""
    aside.print(f"peak memory      {size(report.peak_memory_bytes)}{gpu}")
    aside.print(f"time             {report.seconds:.1f} s")
    if (check := report.check) is not None:
        percent = 100 * check.seconds / report.seconds
        aside.print(
            f"check            on {check.where} of {escape(check.source)}, in {check.seconds:.1f} s "
            f"({percent:.0f}% of the time)",
            soft_wrap=True,
        )
        aside.print(f"  KL             {check.kl_text().replace('±', '+-')} nats a token to the full model")
        aside.print(f"  top-1          {100 * check.top1_agreement:.2f}% agree with it")
        aside.print(f"  perplexity     {check.baseline_perplexity:.4f} -> {check.perplexity:.4f}")
    for note in report.notes:
        aside.print(f"note             {escape(note)}", soft_wrap=True)
