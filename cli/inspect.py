"""`quantkit inspect`: what a packed checkpoint holds, or a model that another program has made."""

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
from quantkit.core.errors import QuantkitError
from quantkit.core.units import size

if TYPE_CHECKING:
    from quantkit.core.weight import QuantizedWeight


def inspect_command(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of a packed checkpoint, or of any other model; or a GGUF file.")
    ],
    check: Annotated[
        bool,
        typer.Option("--verify", help="Hold tensors and files against their checksums; exit code 2 if one differs."),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """List a model's packed layers: format, shape, measured bits per weight, size; whoever has packed them."""
    from quantkit.io.checkpoint import contents, is_packed, read_config
    from quantkit.io.gguf_header import is_gguf
    from quantkit.io.hf import resolve_folder

    file = Path(model).expanduser()
    folder = file if file.is_file() and is_gguf(file) else resolve_folder(model)
    if folder.is_file() or not is_packed(read_config(folder)):
        if check:
            raise QuantkitError(f"{folder} was not packed by quantkit, and has no checksums to verify")
        _inspect_other(folder, as_json)
        return
    found = contents(folder, check)
    rows = {name: _row(weight) for name, weight in found.layers.items()}
    if as_json:
        bits, verified = found.bits_per_weight, found.verified
        record = {"layers": rows, "bits_per_weight": bits, "bytes": found.nbytes, "verified": verified}
        print(json.dumps(record, indent=2))
        return
    _print_table(folder, rows)
    console.print(
        f"{len(rows)} packed layers: {found.bits_per_weight:.3f} bits per weight, {size(found.packed_nbytes)} of "
        f"{size(found.nbytes)}"
    )
    if found.verified is not None:
        console.print(f"all {found.verified} tensors are as they were written")


def _inspect_other(place: Path, as_json: bool) -> None:
    """What another program has made."""
    from quantkit.exchange.survey import survey

    found = survey(place)
    rows = {
        name: {
            "format": matrix.format,
            "shape": list(matrix.shape),
            "bits": matrix.bits,
            "bits_per_weight": matrix.bits_per_weight,
            "bytes": matrix.nbytes,
        }
        for name, matrix in found.layers.items()
    }
    if as_json:
        facts = {"quantized_by": found.by, "bits_per_weight": found.bits_per_weight, "bytes": found.nbytes}
        print(json.dumps({"layers": rows, **facts}, indent=2))
        return
    if rows:
        _print_table(place, rows)
        console.print(
            f"{len(rows)} matrices quantized by {escape(str(found.by))}: {found.bits_per_weight:.3f} bits per weight, "
            f"{size(found.packed_nbytes)} of {size(found.nbytes)}; {found.dense:,} numbers are dense"
        )
    elif found.by is None:
        console.print(f"{escape(str(place))} is not quantized: {found.dense:,} numbers, {size(found.nbytes)}")
    else:
        console.print(
            f"{escape(str(place))} is quantized by {escape(found.by)}, whose tensors are not known here; "
            f"{size(found.nbytes)}"
        )


def _print_table(place: Path, rows: dict[str, dict[str, Any]]) -> None:
    table = Table(title=escape(str(place)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    before, names = without_prefix(list(rows))
    table.add_column(escape(f"layer of {before}" if before else "layer"), overflow="fold")
    for heading in ("format", "shape", "bits", "bits/w", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in zip(names, rows.values(), strict=True):
        cells = escape(name), row["format"], " x ".join(map(str, row["shape"])), str(row["bits"] or "")
        table.add_row(*cells, f"{row['bits_per_weight']:.3f}", size(row["bytes"]))
    console.print(table)


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
