"""`quantkit serve`: an OpenAI-compatible endpoint, by vLLM or by transformers' own server."""

import os
import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from quantkit.cli.voice import Voice, voice
from quantkit.core.errors import QuantkitError
from quantkit.core.remote import REMOTE

FOREIGN = ("gptq", "awq", "auto-round", "compressed-tensors")
"""Forms that `quantkit import` takes, and that transformers reads by packages of their own."""


def serve_command(
    model: Annotated[str, typer.Argument(help="Folder or hub id: a packed checkpoint or any causal language model.")],
    more: Annotated[list[str] | None, typer.Argument(help="After --: further options of the engine.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    engine: Annotated[str, typer.Option(help="vllm, transformers, or auto: the first of them installed.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of the computation.")] = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's endpoints do: /v1/chat/completions, /v1/completions, /v1/models.

    Requests name the model as it is named here; the first line says how where that is another way.
    """
    from quantkit.core.device import compute_dtype, parse_dtype, pick_device
    from quantkit.io.hf import check_files, resolve_folder
    from quantkit.io.source import load_tokenizer
    from quantkit.serve.endpoint import address, check_address, command, engine_of

    chosen, kept = engine_of(engine), parse_dtype(dtype)
    if model.lower().endswith(".gguf"):
        raise QuantkitError(f"{model} is a GGUF file; pack it first: `quantkit quantize {model}`")
    folder = resolve_folder(model)
    form = check_files(folder)
    if form in FOREIGN and chosen == "transformers":
        raise QuantkitError(
            f"{model} is quantized by {form}, which transformers' server does not run by itself; "
            f"`quantkit import {model}` makes a packed checkpoint of the same numbers"
        )
    check_address(host, port)
    named_here = model != "reference" and not model.startswith("~")  # else the engine would look for it on the hub
    name = model if named_here or Path(model).is_dir() else str(folder)
    if kept is None and chosen == "transformers":
        kept = compute_dtype(pick_device("auto"))
    said: dict[Voice, Literal["errors", "usual", "all"]] = {Voice.QUIET: "errors", Voice.VERBOSE: "all"}
    asked = command(
        name, chosen, host, port, kept, more or (), trusted=REMOTE.get(), said=said.get(voice(), "usual")
    )  # fmt: skip
    if voice() != Voice.QUIET:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"{chosen} serves {name} on {address(host, port)}", markup=False)
        if not load_tokenizer(folder).chat_template:
            console.print("its tokenizer has no chat template, so that only /v1/completions answers")
        console.print(shlex.join(asked), style="dim", markup=False)
    os.execv(asked[0], asked)
