"""How long work is told of on standard error: by a bar in a terminal, else by lines; not at all with --quiet."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from quantkit.cli.voice import Voice, voice

if TYPE_CHECKING:
    from quantkit.tuning.end_to_end import Progress as TuningProgress

OFTEN = 10.0
"""Seconds between two lines about steps that take less."""


class Clock:
    """Time that is left, by the pace of the latest steps.

    Steps that took less than a fifth of the slowest of these do not count: they were finished by an earlier run.

    Args:
        now: the time in seconds.
        begun: when the first step began; by default now.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, begun: float | None = None) -> None:
        self._now, self._paces = now, deque[float](maxlen=5)
        self._at, self._done = now() if begun is None else begun, 0
        self.begun = self._at

    def reached(self, done: int) -> None:
        """So many steps are done."""
        if done > self._done:
            now = self._now()
            self._paces.append((now - self._at) / (done - self._done))
            self._at, self._done = now, done
        elif done < self._done:  # a second pass over the same steps
            self._at, self._done = self._now(), done

    def left(self, total: int | None) -> float | None:
        """Seconds until `total` steps are done; None where nobody can know."""
        if total is None or not self._paces:
            return None
        slow = [pace for pace in self._paces if pace >= max(self._paces) / 5]
        return max(0.0, (total - self._done) * sum(slow) / len(slow) - (self._now() - self._at))


class Clocks:
    """A clock for each kind of steps, which begins where anything was last told of."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._last = now, now()
        self._of: dict[str, Clock] = {}

    def reached(self, kind: str, done: int) -> Clock:
        """The kind's clock; so many of its steps are done."""
        clock = self._of.setdefault(kind, Clock(self._now, self._last))
        clock.reached(done)
        self._last = self._now()
        return clock


def duration(seconds: float) -> str:
    """Seconds as 0:01:05."""
    return str(timedelta(seconds=round(seconds)))


class Teller(Protocol):
    """Takes what is known of several kinds of steps."""

    def __call__(self, kind: str, done: int, total: int | None, text: str = "") -> None:
        """Tells that so many steps of this kind are done, of `total`; `text` says what is at hand."""


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        clock: Clock = task.fields["clock"]
        left = None if task.finished else clock.left(None if task.total is None else int(task.total))
        return Text("" if left is None else f"ETA {duration(left)}", style="progress.remaining")


@contextmanager
def _bars() -> Iterator[Teller]:
    """Bars, each of which appears with its kind's first step: what was asked for may be refused before."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, _Left(), console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}
        clocks = Clocks()

        def tell(kind: str, done: int, total: int | None, text: str = "") -> None:
            """Moves the bar of a kind of work; the first call makes it."""
            clock = clocks.reached(kind, done)
            if kind not in tasks:
                tasks[kind] = bar.add_task(kind, total=total, clock=clock)
            bar.update(tasks[kind], completed=done, total=total, description=text or kind)

        yield tell


def lines(write: Callable[[str], Any], every: float, now: Callable[[], float] = time.monotonic) -> Teller:
    """Lines: one a step, but not more often than once in `every` seconds, and one for the last."""
    clocks = Clocks(now)
    told: dict[str, tuple[int, float]] = {}

    def tell(kind: str, done: int, total: int | None, text: str = "") -> None:
        """Writes a line where the last of this kind is `every` seconds old, or the work is done."""
        clock = clocks.reached(kind, done)
        before, at = told.get(kind, (0, clock.begun))
        if done == before or (now() - at < every and done != total):
            return
        told[kind] = done, now()
        left = None if done == total else clock.left(total)
        parts = [kind, f"{done}/{'?' if total is None else total}", duration(now() - clock.begun)]
        parts += ([] if left is None else [f"ETA {duration(left)}"]) + ([text] if text else [])
        write("  ".join(parts))

    return tell


@contextmanager
def telling(every: float = OFTEN) -> Iterator[Teller]:
    """How this process tells of its work.

    Args:
        every: seconds between lines, where standard error is no terminal.
    """
    if voice() == Voice.QUIET:
        yield lambda *_, **__: None
    elif sys.stderr.isatty():
        with _bars() as tell:
            yield tell
    else:
        yield lines(lambda text: print(text, file=sys.stderr, flush=True), every)


@contextmanager
def block_progress(shown: bool = True) -> Iterator[Callable[[int, int, str], None]]:
    """Over blocks: yields a callback (blocks done, blocks in all, name of the block begun)."""
    with telling(every=0) if shown else nullcontext(lambda *_: None) as tell:
        yield lambda done, total, name: tell("blocks", done, total, name)


@contextmanager
def window_progress() -> Iterator[Callable[[int, int], None]]:
    """Over sequences: yields a callback (sequences done, sequences in all)."""
    with telling() as tell:
        yield lambda done, total: tell("sequences", done, total)


@contextmanager
def launch_progress() -> Iterator[Callable[[int, int, str], None]]:
    """Over kernel launches: yields a callback (done, in all, what is being measured)."""
    with telling() as tell:
        yield lambda done, total, name: tell("kernels", done, total, name)


@contextmanager
def check_progress() -> Iterator[Callable[[int, int, str], None]]:
    """Over checks: yields a callback (done, in all, what is being checked)."""
    with telling() as tell:
        yield lambda done, total, name: tell("checks", done, total, name)


@contextmanager
def tuning_progress() -> Iterator[dict[str, Callable]]:
    """Over the sequences that are cached, then over tuning steps: yields `tune`'s callbacks by name."""
    with telling() as tell:

        def progress(now: TuningProgress) -> None:
            tell("steps", now.step, now.steps, f"loss {now.loss:.3f}, {now.changed} codes, KL {now.kl:.4f}")

        yield {"progress": progress, "caching": lambda done, total: tell("teacher's predictions", done, total)}


@contextmanager
def search_progress(shown: bool, generations: int) -> Iterator[tuple[Callable, Callable]]:
    """Over what comes before a search, and over its generations.

    Yields:
        callbacks (done, in all, of what) and (generations done, fitness, fraction of the budget); silent unless
        `shown`.
    """
    if not shown:
        yield lambda *_: None, lambda *_: None
        return
    with telling() as tell:
        yield (
            lambda done, total, name: tell("candidates", done, total, name),
            lambda done, fitness, fraction: tell(
                "generations", done, generations, f"fitness {fitness:.4f}, {100 * fraction:.2f}% of the budget"
            ),
        )
