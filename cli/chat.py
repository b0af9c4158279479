"""`quantkit chat`: a conversation in the terminal."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from quantkit.cli import options
from quantkit.cli.loading import subject
from quantkit.cli.voice import Voice, voice
from quantkit.core.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.serve.chat import Conversation

HELP = "/new forgets what was said, /quit or the end of input leaves; Ctrl-C ends an answer, twice the program"


def chat_command(
    model: options.Subject,
    system: Annotated[str | None, typer.Option(help="A message in front of all turns.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 1024,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token, more draws; by default as the model says.")
    ] = None,
    kv_bits: options.KvBits = None,
    device: options.Device = "auto",
    unpack: options.Unpack = None,
    dtype: Annotated[str | None, typer.Option(help="Of the computation; by default float32 on a CPU.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draws.")] = 0,
) -> None:
    """Talk with a model in the terminal, turn by turn; lines from a pipe are turns too."""
    options.check_generation(max_new_tokens, temperature)
    import torch

    from quantkit.kvcache.attention import compressed_kv
    from quantkit.serve.chat import Conversation, check_template

    loaded, tokenizer = subject(model, device, dtype, unpack, partial(check_template, system=system))
    generation: dict[str, Any] = {}
    if temperature is not None:
        generation = {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature else {})
    torch.manual_seed(seed)
    with nullcontext() if kv_bits is None else compressed_kv(loaded, bits=kv_bits) as make_cache:
        talk = Conversation(
            loaded, tokenizer, system, max_new_tokens=max_new_tokens, make_cache=make_cache, generation=generation
        )
        _talk(talk, Console(stderr=True, highlight=False, quiet=voice() == Voice.QUIET))


def _talk(talk: "Conversation", notes: Console) -> None:
    if sys.stdin.isatty():
        notes.print(HELP)
    fine = True
    for said in _lines(notes):
        if said in ("/quit", "/exit"):
            break
        if said == "/new":
            talk.begin()
            notes.print("forgotten")
        elif said in ("/help", "/?"):
            notes.print(HELP)
        elif said:
            fine &= _turn(talk, said, notes)
    if not (fine or sys.stdin.isatty()):
        raise typer.Exit(QuantkitError.exit_code)


def _turn(talk: "Conversation", said: str, notes: Console) -> bool:
    """Answers; False where that cannot be done, which is said."""
    begun = time.monotonic()
    try:
        with _stops(talk):
            talk.answer(said, partial(print, end="", flush=True))
    except QuantkitError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
        return False
    print(flush=True)
    read, made = talk.tokens
    seconds = time.monotonic() - begun
    forgotten = f"; {talk.forgotten} former turns did not fit and are forgotten" if talk.forgotten else ""
    notes.print(f"[dim]{read} + {made} tokens, {made / seconds:.1f} a second{forgotten}[/]")
    return True


def _lines(notes: Console) -> Iterator[str]:
    """What the user says: lines of the terminal, with their history, or of a pipe."""
    with suppress(ImportError):
        import readline  # noqa: F401  gives `input` its keys and its history
    seen, asks, pressed = sys.stdout.isatty(), sys.stdin.isatty(), False
    with suppress(EOFError):
        while True:
            if asks and not seen:  # the answers go to a file
                print("> ", end="", file=sys.stderr, flush=True)
            try:
                said = input("> " if asks and seen else "").strip()
            except KeyboardInterrupt:
                if pressed or not asks:
                    raise
                pressed = True
                notes.print("\nCtrl-C once more leaves")
                continue
            pressed = False
            yield said


@contextmanager
def _stops(talk: "Conversation") -> Iterator[None]:
    """While it lasts, Ctrl-C ends the answer instead of the program; twice, the program."""

    def stop(_number: int, _frame: Any) -> None:
        if talk.stopped:
            raise KeyboardInterrupt
        talk.stopped = True

    former = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
