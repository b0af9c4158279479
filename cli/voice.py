"""The options that all verbs have, and what they set: how much the program says, and whether models' own code runs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from enum import IntEnum
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

from quantkit.core.remote import REMOTE


class Voice(IntEnum):
    """Levels of how much a command says."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


_now = Voice.NORMAL


def voice() -> Voice:
    """The level at which this process speaks."""
    return _now


def speak(how: Voice) -> None:
    """From now on so much is said: of quantkit's own log, and by the libraries below."""
    global _now
    _now = how
    logging.getLogger("quantkit").setLevel((logging.ERROR, logging.INFO, logging.DEBUG)[how])
    if how == Voice.QUIET or not sys.stderr.isatty():  # bars are for eyes
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    for noisy in ("huggingface_hub", "datasets", "httpx", "transformers", "lm_eval"):
        logging.getLogger(noisy).setLevel(logging.INFO if how == Voice.VERBOSE else logging.ERROR)


def _option(how: Voice, short: str, text: str) -> Any:
    def chosen(value: bool) -> None:
        if value:
            speak(how)

    names = f"--{how.name.lower()}", short
    return Annotated[bool, typer.Option(*names, callback=chosen, is_eager=True, help=text)]


_COMMON = {
    "quiet": _option(Voice.QUIET, "-q", "Say results and errors alone: no progress, no log, no tables."),
    "verbose": _option(Voice.VERBOSE, "-v", "Say more: each layer as it is packed, and what libraries log."),
}


def _trusted(value: bool) -> None:
    REMOTE.set(value)


_OF_MODELS = {
    "trust_remote_code": Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            callback=_trusted,
            is_eager=True,
            help="Run the code that comes with a model that needs its own; it may do anything.",
        ),
    ]
}


def verb(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options that all verbs have; they have taken effect when it is called."""

    common = _COMMON | (_OF_MODELS if "model" in signature(command).parameters else {})

    @wraps(command)
    def called(**settings: Any) -> None:
        command(**{name: value for name, value in settings.items() if name not in common})

    hints = get_type_hints(command, include_extras=True)
    known = [entry.replace(annotation=hints[name]) for name, entry in signature(command).parameters.items()]
    more = [Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=hint) for name, hint in common.items()]
    called.__signature__ = Signature([*known, *more])  # type: ignore[attr-defined]
    called.__annotations__ = hints | common
    return called
