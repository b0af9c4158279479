"""The command line: `quantkit VERB ...`; one file a verb."""

import io
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.core import TyperGroup

from quantkit import __version__
from quantkit.cli.advise import advise_command
from quantkit.cli.bench import bench_command
from quantkit.cli.chat import chat_command
from quantkit.cli.doctor import doctor_command
from quantkit.cli.evaluate import evaluate_command
from quantkit.cli.export import export_command
from quantkit.cli.generate import generate_command
from quantkit.cli.import_ import import_command
from quantkit.cli.inspect import inspect_command
from quantkit.cli.options import ENVIRONMENT, is_first_process
from quantkit.cli.quantize import quantize_command
from quantkit.cli.search import search_command
from quantkit.cli.serve import serve_command
from quantkit.cli.tune import tune_command
from quantkit.cli.voice import Voice, speak, verb
from quantkit.core.errors import Elsewhere, Interrupted, QuantkitError

_STOPPED = "stopped; nothing is kept"
_MOMENT = 3.0
"""Seconds in which torchrun ends the others once the first process has said what is wrong with a command."""


class _Verbs(TyperGroup):
    def make_context(self, *args: Any, **settings: Any) -> Any:
        with _told():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: Any) -> Any:
        with _told():
            return super().invoke(ctx)


@contextmanager
def _told() -> Iterator[None]:
    """What goes wrong with a command: a stop in our words, and what all processes find wrong with it, once."""
    try:
        yield
    except (typer.Exit, typer.Abort):  # it has said what was asked for
        raise
    except KeyboardInterrupt:  # a verb that keeps something says what
        raise Interrupted(_STOPPED) from None
    except Exception:
        if not is_first_process() and not _share_a_run():
            time.sleep(_MOMENT)  # one that is alone with its error says it then
        raise


def _share_a_run() -> bool:
    """Whether processes have found one another; errors then go to one of them."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


app = typer.Typer(
    cls=_Verbs,
    name="quantkit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_OPEN: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}  # methods bring options of their own
app.command("quantize", context_settings=_OPEN)(verb(quantize_command))
app.command("advise")(verb(advise_command))
app.command("search")(verb(search_command))
app.command("tune")(verb(tune_command))
app.command("eval")(verb(evaluate_command))
app.command("generate")(verb(generate_command))
app.command("chat")(verb(chat_command))
app.command("serve")(verb(serve_command))
app.command("export")(verb(export_command))
app.command("import")(verb(import_command))
app.command("inspect")(verb(inspect_command))
app.command("bench")(verb(bench_command))
app.command("doctor")(verb(doctor_command))


def _say_version(asked: bool) -> None:
    if asked:
        print(f"quantkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Post-training quantization of language models: advise, quantize, search, tune, evaluate, generate, chat,
    serve, export, import, inspect, bench, doctor."""


def main() -> None:
    """Runs the command line; a user's mistake ends in one line and exit code 2."""
    console = Console(stderr=True)
    logger = logging.getLogger("quantkit")
    logger.addHandler(_handler(console))
    logger.propagate = False
    speak(Voice.NORMAL)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # text that is not UTF-8 is no reason to end
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        app()
    except QuantkitError as error:
        if _is_said_elsewhere(error):
            sys.exit(error.exit_code)
        _end(console, error)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        _end(
            console,
            QuantkitError(
                "the GPU's memory is full; lower what is in it at a time (`seqlen`, `num_samples`, "
                "`micro_batch`), or use `device` cpu"
            ),
        )


def _handler(console: Console) -> logging.Handler:
    """Shows the log: in a terminal in colours, else a line each."""
    if console.is_terminal:
        return RichHandler(console=console, show_path=False, show_time=False)
    plain = logging.StreamHandler()
    plain.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    return plain


def _is_said_elsewhere(error: QuantkitError) -> bool:
    """Whether another of several processes says it; those that are stopped are stopped together."""
    return isinstance(error, Elsewhere) or (isinstance(error, Interrupted) and not is_first_process())


def _is_out_of_memory(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")  # without it there was no GPU's memory to fill
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _as_options(text: str, arguments: list[str]) -> str:
    """An error's `settings`, as the library names them, by the names of the options of the verb that was called."""
    commands = getattr(typer.main.get_command(app), "commands", {})
    verb = next((commands[word] for word in arguments if word in commands), None)
    known = {option for parameter in (verb.params if verb else ()) for option in parameter.opts}

    def option(match: re.Match[str]) -> str:
        name = "--" + match[1].replace("_", "-")
        return name if name in known else match[0]

    return re.sub(r"`([a-z_]+)`", option, text)


def _end(console: Console, error: QuantkitError) -> None:
    text = _as_options(str(error), sys.argv[1:]).replace("[", r"\[")
    console.print(f"[bold red]error:[/] {text}", soft_wrap=True, highlight=False)
    sys.exit(error.exit_code)
