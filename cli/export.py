"""`quantkit export`: a packed checkpoint in the form that another program reads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from quantkit.cli import options
from quantkit.cli.progress import block_progress
from quantkit.cli.voice import Voice, voice
from quantkit.core.errors import Interrupted, QuantkitError
from quantkit.core.units import size


def export_command(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a packed checkpoint.")],
    to: Annotated[str, typer.Option(help="compressed-tensors (vLLM), gguf (llama.cpp), mlx, gptq, or dense.")],
    output: Annotated[Path | None, typer.Option(help="What to make; by default ./MODEL-FORM.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of scales and dense weights; by default what keeps scales, and dense as it was.")
    ] = None,
    carrier: Annotated[
        int | None, typer.Option(help="Bits of the numbers that hold the codes; by default the fewest that do.")
    ] = None,
    requantize: Annotated[
        int | None, typer.Option(help="Round anew by GPTQ, to so many bits, what the form does not hold; KL is told.")
    ] = None,
    calibration: options.Text = "wikitext2",
    num_samples: options.NumSamples = 128,
    seqlen: options.Seqlen = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write a packed model as another program's: bit for bit where that form holds the same, else refused by name.

    --requantize BITS writes any packed model, rounded anew.
    """
    from quantkit.core.device import parse_dtype
    from quantkit.exchange.export import export_folder
    from quantkit.exchange.packed import named_after
    from quantkit.exchange.requantize import requantize_folder
    from quantkit.io.hf import resolve_folder
    from quantkit.run.recipe import Calibration

    folder = resolve_folder(model)
    asked = output or named_after(model, to)
    try:
        with block_progress(voice() != Voice.QUIET and not as_json) as progress:
            kept = parse_dtype(dtype)
            if requantize is None:
                made, check = export_folder(folder, asked, to, kept, carrier, resume, overwrite, progress), None
            elif resume:
                raise QuantkitError("`requantize` begins anew; leave out `resume`")
            else:
                text = Calibration(calibration, num_samples, seqlen)
                found = requantize_folder(
                    folder, asked, to, requantize, text, overwrite=overwrite, progress=progress, dtype=kept,
                    carrier=carrier,
                )  # fmt: skip
                made, check = found.exported, found.check
    except KeyboardInterrupt:
        more = "repeat the command with --resume to continue" if requantize is None else "nothing is kept"
        raise Interrupted(f"stopped; {more}") from None
    if as_json:
        print(json.dumps({**vars(made), "output": str(made.output), "check": check and asdict(check)}, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    exact = "exactly" if made.error == 0 else f"within {made.error:.1e} of each layer's weights (relative, Frobenius)"
    if made.layers:
        console.print(f"{made.layers} layers are packed as {to}, {exact}")
    if made.dense:
        what = ", ".join(made.dense[:2]) + (f" and {len(made.dense) - 2} more" if len(made.dense) > 2 else "")
        console.print(f"dense: {escape(what)}")
    if check is not None:
        console.print(f"rounded anew: KL {check.kl_text()} to the packed model, on {check.where} of {check.source}")
    console.print(f"{to}: {escape(str(made.output))}, {size(made.nbytes)}")
