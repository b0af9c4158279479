"""`quantkit serve`: an OpenAI-compatible endpoint, by vLLM or by transformers' own server."""

import os
import shlex
from typing import Annotated

import typer
from rich.console import Console

from quantkit.cli.voice import Voice, voice
from quantkit.core.errors import QuantkitError


def serve_command(
    model: Annotated[str, typer.Argument(help="Folder or hub id: a packed checkpoint or any causal language model.")],
    more: Annotated[list[str] | None, typer.Argument(help="After --: further options of the engine.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    engine: Annotated[str, typer.Option(help="vllm, transformers, or auto: the first of them installed.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of the computation.")] = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's endpoints do: /v1/chat/completions, /v1/completions, /v1/models.

    Requests name the model as it is named here.
    """
    from quantkit.core.device import compute_dtype, parse_dtype, pick_device
    from quantkit.io.hf import resolve_folder
    from quantkit.serve.endpoint import command, engine_of

    chosen = engine_of(engine)
    if model.lower().endswith(".gguf"):
        raise QuantkitError(f"{model} is a GGUF file; pack it first: `quantkit quantize {model}`")
    if not (resolve_folder(model) / "config.json").exists():
        raise QuantkitError(f"{model} has no config.json, so it holds no model")
    kept = parse_dtype(dtype)
    if kept is None and chosen == "transformers":
        kept = compute_dtype(pick_device("auto"))
    asked = command(model, chosen, host, port, kept, more or ())
    if voice() != Voice.QUIET:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"{chosen} serves {model} on http://{host}:{port}/v1", markup=False)
        console.print(shlex.join(asked), style="dim", markup=False)
    os.execv(asked[0], asked)
