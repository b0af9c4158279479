"""`quantkit advise`: ways to pack a model, with what each takes and costs."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from quantkit.cli import options
from quantkit.cli.display import aside, console
from quantkit.cli.progress import block_progress, duration
from quantkit.core.errors import QuantkitError
from quantkit.core.units import size

if TYPE_CHECKING:
    from quantkit.advice.advise import Advice, Choice

_Memory = Annotated[str | None, typer.Option(help="That generation may take, weights and all, such as 8GB.")]
_Context = Annotated[
    int | None, typer.Option(help="Tokens that the KV cache is to hold; by default 4096 or the model's context.")
]
_Tokens = Annotated[
    str | None,
    typer.Option(
        metavar="COUNT",
        help="Tokens that the model was trained on, such as 15e12: the more, the more a bit is worth. Read where "
        "nothing is measured.",
    ),
]
_Measure = Annotated[
    bool,
    typer.Option("--measure", help="Predict KL from a pass over the text, forth and back, instead of from a law."),
]


def advise_command(
    model: options.Model,
    memory: _Memory = None,
    context: _Context = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    kv_bits: options.KvBits = None,
    measure: _Measure = False,
    calibration: options.Text = "wikitext2",
    measure_samples: Annotated[int, typer.Option(help="Sequences to measure on.")] = 32,
    num_samples: options.NumSamples = 128,
    seqlen: options.Seqlen = None,
    tokens: _Tokens = None,
    device: options.Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the choice of text.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Compare ways to pack a model: size, memory at a context, expected KL, and the time that packing takes.

    By shapes alone, unless --measure reads some text. It says how sure it is, and the command that packs the model.
    """
    from quantkit.advice.advise import advise
    from quantkit.run.recipe import Calibration

    trained = _count(tokens)
    text = Calibration(calibration, measure_samples, seqlen, seed) if measure else None
    with block_progress() as progress:
        found = advise(
            model, memory=memory, context=context, batch=batch, kv_bits=kv_bits, device=device, tokens=trained,
            calibration=text, num_samples=num_samples, seqlen=seqlen, progress=progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    _say(found, f" --calibration {shlex.quote(calibration)}" if measure and calibration != "wikitext2" else "")


def _count(text: str | None) -> float | None:
    """Tokens, as people write them.

    Raises:
        QuantkitError: it is no positive number.
    """
    if text is None:
        return None
    try:
        count = float(text)
    except ValueError:
        count = 0.0
    if not 0 < count < 1e18:
        raise QuantkitError(f"--tokens {text}: give a number such as 15e12")
    return count


def _say(found: Advice, more: str) -> None:
    table = Table(title=escape(found.model), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("way")
    for heading in ("bits/w", "size", "memory", "expected KL", "bytes a token", "time to make"):
        table.add_column(heading, justify="right", no_wrap=True)
    for choice in found.choices:
        mark = " <" if choice == found.advised else ""
        table.add_row(
            f"{choice.method} {choice.bits:g}{mark}" if choice.method else f"as it is{mark}",
            f"{choice.bits_per_weight:.2f}",
            size(choice.nbytes),
            _memory(choice),
            f"{choice.kl_low:.3f} to {choice.kl_high:.3f}" if choice.method else "0",
            f"{choice.read:.2f} x",
            duration(choice.seconds) if choice.method else "",
        )
    aside.print(table)
    from quantkit.advice.advise import MEASURED

    sure = (
        "expected KL (nats a token) is predicted from a pass over text, and taken to hold within "
        f"{100 * MEASURED:.0f}%, below half a nat"
        if found.measured
        else "expected KL (nats a token) is a law's, from the model's size alone: a range of nine; --measure narrows it"
    )
    aside.print(f"{sure}; memory at {found.context:,} tokens on {found.device}; time on this machine as it is now")
    if found.advised is None:
        console.print("no way fits; give more memory, less context, or --kv-bits 4")
    elif not found.advised.method:
        console.print("advised: the model as it is")
    else:
        command = f"quantkit quantize {shlex.quote(found.model)} {found.advised.options}{more}"
        console.print(f"advised: {escape(command)}", soft_wrap=True, highlight=False)


def _memory(choice: Choice) -> str:
    if choice.memory is None:
        return ""
    return size(choice.memory) + ("" if choice.fits is None else " fits" if choice.fits else " no")
