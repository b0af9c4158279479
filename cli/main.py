"""The command line: `quantkit VERB ...`; one file a verb."""

import logging
import sys

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler

from quantkit.cli.bench import bench_command
from quantkit.cli.evaluate import evaluate_command
from quantkit.cli.generate import generate_command
from quantkit.cli.inspect import inspect_command
from quantkit.cli.quantize import quantize_command
from quantkit.cli.search import search_command
from quantkit.cli.tune import tune_command
from quantkit.errors import QuantkitError

app = typer.Typer(
    name="quantkit",
    help="Post-training quantization of language models: quantize, search, tune, evaluate, generate, inspect, bench.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("quantize")(quantize_command)
app.command("search")(search_command)
app.command("tune")(tune_command)
app.command("eval")(evaluate_command)
app.command("generate")(generate_command)
app.command("inspect")(inspect_command)
app.command("bench")(bench_command)


def main() -> None:
    """Runs the command line; a user's mistake ends in one line and exit code 2."""
    console = Console(stderr=True)
    logger = logging.getLogger("quantkit")
    logger.addHandler(RichHandler(console=console, show_path=False, show_time=False))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for noisy in ("huggingface_hub", "datasets", "httpx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        app()
    except (QuantkitError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = QuantkitError(
                "the GPU's memory is full; lower what is in it at a time (--seqlen, --num-samples, "
                "--micro-batch), or use --device cpu"
            )
        console.print(f"[bold red]error:[/] {_plain(error)}", soft_wrap=True, highlight=False)
        sys.exit(error.exit_code)


def _plain(error: Exception) -> str:
    return " ".join(str(error).split()).replace("[", r"\[")
