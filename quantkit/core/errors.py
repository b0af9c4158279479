"""Errors that a user can act on: each says what was asked, what was found and what would work."""

import difflib
from collections.abc import Iterable

LONGEST = 1200
"""Characters of an error; of longer ones the middle is left out."""


class QuantkitError(Exception):
    """Base of every error that quantkit raises for a user's input; the command line prints it as one line.

    Attributes:
        exit_code: of the command line.
    """

    exit_code = 2

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    """A text on one line that every terminal can print: it may quote what a damaged or hostile file holds."""
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in " ".join(text.split())
    )
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST // 2]} ... {shown[-LONGEST // 3 :]}"


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


class UnknownName(QuantkitError):
    """A name that no table holds; suggests the nearest one."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        super().__init__(f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}")


class Interrupted(QuantkitError):
    """The user stopped a run that can be resumed."""

    exit_code = 130


class Elsewhere(QuantkitError):
    """What another process of this run has raised, and tells of by itself."""


class CheckpointError(QuantkitError):
    """A checkpoint that is missing, damaged, or of a format that is not installed."""


class CalibrationError(QuantkitError):
    """Calibration that cannot give usable statistics."""
