"""`quantkit inspect`: what a packed checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from quantkit.cli import options
from quantkit.cli.display import console, without_prefix
from quantkit.core.units import size

if TYPE_CHECKING:
    from quantkit.core.weight import QuantizedWeight


def inspect_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    check: Annotated[
        bool,
        typer.Option("--verify", help="Hold tensors and files against their checksums; exit code 2 if one differs."),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """List a packed checkpoint's layers: format, shape, measured bits per weight, size."""
    from quantkit.io.checkpoint import contents
    from quantkit.io.hf import resolve_folder

    folder = resolve_folder(folder)
    found = contents(folder, check)
    rows = {name: _row(weight) for name, weight in found.layers.items()}
    if as_json:
        bits, verified = found.bits_per_weight, found.verified
        record = {"layers": rows, "bits_per_weight": bits, "bytes": found.nbytes, "verified": verified}
        print(json.dumps(record, indent=2))
        return
    table = Table(title=escape(str(folder)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    before, names = without_prefix(list(rows))
    table.add_column(escape(f"layer of {before}" if before else "layer"), overflow="fold")
    for heading in ("format", "shape", "bits", "bits/w", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in zip(names, rows.values(), strict=True):
        cells = escape(name), row["format"], " x ".join(map(str, row["shape"])), str(row["bits"] or "")
        table.add_row(*cells, f"{row['bits_per_weight']:.3f}", size(row["bytes"]))
    console.print(table)
    console.print(
        f"{len(rows)} packed layers: {found.bits_per_weight:.3f} bits per weight, {size(found.packed_nbytes)} of "
        f"{size(found.nbytes)}"
    )
    if found.verified is not None:
        console.print(f"all {found.verified} tensors are as they were written")


def _row(weight: QuantizedWeight) -> dict[str, Any]:
    return {
        "format": weight.label,
        "shape": list(weight.shape),
        "bits": _bits(weight),
        "bits_per_weight": weight.bits_per_weight,
        "bytes": weight.nbytes,
    }


def _bits(weight: QuantizedWeight) -> int | None:
    """Of the codes, however deep they lie."""
    own = getattr(weight, "bits", None)
    return own if own is not None or "base" not in weight.nested() else _bits(weight.nested()["base"])
