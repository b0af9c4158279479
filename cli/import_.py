"""`quantkit import`: a model that another program has quantized, as a packed checkpoint of the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from quantkit.cli import options
from quantkit.cli.progress import block_progress
from quantkit.cli.voice import Voice, voice
from quantkit.core.errors import Interrupted
from quantkit.core.units import size


def import_command(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of GPTQ, AWQ, auto-round, compressed-tensors, MLX; or a GGUF file.")
    ],
    output: Annotated[Path | None, typer.Option(help="Folder to make; by default ./MODEL-quantkit.")] = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Pack a model that is quantized already, with the very numbers that it has: nothing is rounded."""
    from quantkit.api import import_model

    file = Path(model).expanduser()
    asked = output or Path(f"{file.resolve().stem if file.is_file() else file.resolve().name}-quantkit")
    try:
        with block_progress(voice() != Voice.QUIET and not as_json) as progress:
            made = import_model(model, asked, resume=resume, overwrite=overwrite, progress=progress)
    except KeyboardInterrupt:
        raise Interrupted("stopped; repeat the command with --resume to continue") from None
    if as_json:
        print(json.dumps(made.to_json() | {"output": str(asked)}, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{len(made.layers)} layers as they were, {made.bits_per_weight:.3f} bits per weight; "
        f"{escape(str(asked))}, {size(made.bytes_after)}"
    )
    for note in made.notes:
        console.print(escape(note))
    console.print(f"inspect it: quantkit inspect {escape(str(asked))}")
