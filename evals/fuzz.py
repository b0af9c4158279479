"""Damaged files at every door: what comes of each is counted.

    python -m quantkit.evals.fuzz --variants 10000 --json evals/results/DATE-fuzz.json
    python -m quantkit.evals.fuzz --only 4711

A variant is a number: it decides upon a door (`quantkit.evals.fuzz_doors`: load, inspect, quantize, resume, calibrate,
search, tune ...), a copy of what that door reads, and one to three pieces of damage (`quantkit.evals.fuzz_damage`).
What may come of it, and the rest is a fault:

    refused      a QuantkitError of one printable line
    equal        the same result as of undamaged files, bit for bit
    taken        let in where files have no record of what they were: text, plans, full-precision models
    different    another result, where bits of a payload flipped and nobody asked for checksums
    unrecorded   another result of a folder that transformers wrote, which has no checksums

Faults are other exceptions (traceback), other results (wrong), errors of several lines or beyond print (garbled), 10 s
of the processor without an answer (hang), a process that dies (crash), and memory that a file of some kilobytes asks
for (memory). Processes are forks of one that has imported everything; one that hangs or dies is replaced, and what hung
is tried once more before it counts. Ctrl-C ends a run with the counts by then. The exit code is 1 where there is a
fault; `--only NUMBER` repeats one.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
import torch

from quantkit.core.errors import QuantkitError, first_line
from quantkit.evals.fuzz_damage import damage
from quantkit.evals.fuzz_doors import DOORS, OTHER, Door, copied, make_bases, quiet

LIMIT, CLOCK, SLOW = 10.0, 120.0, 1.0
"""Seconds of the processor until an answer counts as none, seconds of the clock, and those of a slow refusal."""
MEMORY, LARGE = 3 * 2**30, 2**28
"""Bytes that a variant may reserve beyond what its process has, and that it may use without a fault."""
KINDS = ("refused", "equal", "taken", "different", "unrecorded")
FAULTS = ("traceback", "wrong", "garbled", "hang", "crash", "memory")
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Outcome:
    """What came of a variant.

    Attributes:
        number: of the variant.
        door: through which it went.
        damage: what was done.
        kind: of KINDS or FAULTS.
        said: the error, or where it was raised.
        seconds: of the processor until then: others may be busy on the same machine.
        nbytes: by which the process' peak of memory grew.
    """

    number: int
    door: str
    damage: str
    kind: str
    said: str = ""
    seconds: float = 0.0
    nbytes: int = 0


def planned(number: int) -> tuple[str, random.Random]:
    """(a variant's door, what decides upon the rest)."""
    draw = random.Random(number)
    names = list(DOORS)
    return draw.choices(names, [DOORS[name].weight for name in names])[0], draw


def tried(number: int, root: Path, place: Path) -> Outcome:
    """What comes of a variant.

    Args:
        number: of the variant.
        root: of the bases.
        place: an empty folder.
    """
    name, draw = planned(number)
    door = DOORS[name]
    folder, files = copied(root, door, place)
    done = [damage(folder, files, draw) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
    words, payload = "; ".join(one.words for one in done), any(one.payload for one in done)
    _forget_peak()
    before, begun = _peak(), time.process_time()
    kind, said = _entered(door, folder, root, payload)
    seconds, grown = time.process_time() - begun, _peak() - before
    if kind not in FAULTS and (grown > LARGE or "alloc" in said or "MemoryError" in said):
        kind = "memory"
    return Outcome(number, name, words, kind, said, seconds, grown)


def _entered(door: Door, folder: Path, root: Path, payload: bool) -> tuple[str, str]:
    """(kind of what came of it, what was said)."""
    try:
        answer = door.enter(folder, root)
    except QuantkitError as error:
        text = str(error)
        whole = text.isprintable() and 10 < len(text) < 1500
        return ("refused" if whole else "garbled"), text[:3000].encode("ascii", "backslashreplace").decode()
    except Exception as error:
        where = [f"{Path(frame.filename).name}:{frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
        return "traceback", f"{type(error).__name__} at {' < '.join(where[:-6:-1])}: {first_line(error)}"
    if answer != OTHER:
        return answer, ""
    if door.verified or not (payload or not door.sealed):
        return "wrong", ""
    return ("different" if payload else "unrecorded"), ""


def _peak() -> int:
    """Bytes that this process has had in memory at most, since `_forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _forget_peak() -> None:
    """From now on the most counts that is in memory now."""
    with suppress(OSError):  # where that is forbidden it counts from the process' beginning
        Path("/proc/self/clear_refs").write_text("5")


def _work(pipe: Connection, root: Path) -> None:
    """A worker: numbers come in, outcomes go out."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    quiet()
    for name, door in DOORS.items():  # loads and compiles what all variants share
        with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
            kind, said = _entered(door, copied(root, door, Path(scratch))[0], root, False)
        if kind not in ("equal", "taken"):
            pipe.send(f"{name}, of undamaged files: {kind} {said}")
            return
    for stream in (1, 2):  # what other libraries print on the way
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    limit = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send(None)
    while (number := pipe.recv()) is not None:
        place = Path(tempfile.mkdtemp(dir=root.parent))
        outcome = tried(number, root, place)
        shutil.rmtree(place, ignore_errors=True)
        pipe.send(outcome)


class _Worker:
    """A process that tries one variant after another."""

    def __init__(self, root: Path) -> None:
        self._root, self.number, self._since, self._spent = root, -1, 0.0, 0.0
        self._start()

    def _start(self) -> None:
        self.pipe, inner = _FORK.Pipe()
        self._process = _FORK.Process(target=_work, args=(inner, self._root), daemon=True)
        self._process.start()
        inner.close()
        self.ready = False

    def give(self, number: int) -> None:
        """Begins a variant."""
        self.number, self._since, self._spent = number, time.monotonic(), self._seconds()
        self.pipe.send(number)

    def hangs(self) -> bool:
        """Whether its variant takes longer than any may."""
        if not self.ready or self.number < 0:
            return False
        return self._seconds() - self._spent > LIMIT or time.monotonic() - self._since > CLOCK

    def _seconds(self) -> float:
        """That the processor has worked for it."""
        with suppress(psutil.Error):
            times = psutil.Process(self._process.pid).cpu_times()
            return float(times.user + times.system)
        return 0.0

    def replaced(self) -> int | None:
        """Ends the process and starts another; the exit code that the former had by itself, or None."""
        self._process.join(1)
        code = self._process.exitcode
        self.end()
        self._start()
        return code

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


def outcomes(numbers: list[int], root: Path, processes: int, minutes: float = math.inf) -> Iterator[Outcome]:
    """Tries variants, in several processes.

    Args:
        numbers: of the variants.
        root: of the bases.
        processes: how many.
        minutes: after so many, no more are begun.

    Yields:
        Outcomes as they come.
    """
    todo, again, end = list(reversed(numbers)), set(), time.monotonic() + 60 * minutes
    workers = [_Worker(root) for _ in range(max(1, min(processes, len(numbers))))]
    busy = len(workers)
    try:
        while busy:
            for worker in workers:
                found = _heard(worker)
                if found is None:
                    continue
                if isinstance(found, Outcome) and found.kind == "hang" and found.number not in again:
                    again.add(found.number)  # the machine may have been busy
                    todo.append(found.number)
                elif isinstance(found, Outcome):
                    yield found
                if worker.ready:
                    left = time.monotonic() < end and bool(todo)
                    busy -= not left
                    worker.number = -1
                    if left:
                        worker.give(todo.pop())
            wait([worker.pipe for worker in workers], 0.05)
    finally:
        for worker in workers:
            worker.end()


def _heard(worker: _Worker) -> Outcome | bool | None:
    """An outcome; True of a worker that has just become ready; None where there is nothing new.

    Raises:
        SystemExit: a door does not take undamaged files.
    """
    try:
        if worker.pipe.poll():
            found = worker.pipe.recv()
            if isinstance(found, str):
                raise SystemExit(found)
            worker.ready = True
            return found or True
    except (EOFError, OSError):
        if not worker.ready:
            raise SystemExit("a process died while it went through the doors with undamaged files") from None
        number, code = worker.number, worker.replaced()
        return _lost(number, "crash", f"exit code {code}")
    if worker.hangs():
        number = worker.number
        worker.replaced()
        return _lost(number, "hang", f"nothing for {LIMIT:.0f} s")
    return None


def _lost(number: int, kind: str, said: str) -> Outcome:
    return Outcome(number, planned(number)[0], "see --only", kind, said)


def summary(found: list[Outcome], seconds: float) -> dict[str, Any]:
    """What is recorded of a run: counts by door and kind, and every fault with its number."""
    doors = Counter((one.door, one.kind) for one in found)
    refused = sorted(one.seconds for one in found if one.kind == "refused")
    rows: list[dict[str, Any]] = [
        {"door": door, "variants": sum(doors[door, kind] for kind in KINDS + FAULTS)}
        | {kind: doors[door, kind] for kind in KINDS}
        | {"faults": sum(doors[door, kind] for kind in FAULTS)}
        for door in DOORS
    ]
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key != "door"}
    return {
        "variants": len(found),
        "first": min((one.number for one in found), default=0),
        "seconds": round(seconds, 1),
        "doors": [*rows, {"door": "all", **total}],
        "kinds": {kind: sum(doors[door, kind] for door in DOORS) for kind in KINDS + FAULTS},
        "refused_median_seconds": refused[len(refused) // 2] if refused else None,
        "refused_longest_seconds": refused[-1] if refused else None,
        "refused_slowly": sum(one > SLOW for one in refused),
        "faults": [asdict(one) for one in found if one.kind in FAULTS],
    }


def table(record: dict[str, Any]) -> str:
    """Counts by door and kind."""
    columns = ["variants", *KINDS, "faults"]
    lines = [f"{'door':30s}" + "".join(f"{column:>12s}" for column in columns)]
    lines += [f"{row['door']:30s}" + "".join(f"{row[column]:12,}" for column in columns) for row in record["doors"]]
    return "\n".join(lines)


def run(numbers: list[int], processes: int, minutes: float = math.inf) -> tuple[list[Outcome], float]:
    """(outcomes of variants by their numbers, seconds that they took).

    Raises:
        SystemExit: the undamaged files could not be made.
    """
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="quantkit-fuzz-") as folder:
        root, begun = Path(folder) / "bases", time.monotonic()
        maker = _FORK.Process(target=_make, args=(root,))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("the undamaged files could not be made")
        print(f"undamaged files made in {time.monotonic() - begun:.0f} s", file=sys.stderr)
        begun, faults = time.monotonic(), 0
        with suppress(KeyboardInterrupt):  # what was tried by then counts
            for one in outcomes(numbers, root, processes, minutes):
                found.append(one)
                faults += one.kind in FAULTS
                if sys.stderr.isatty() or len(found) % 100 == 0:
                    pace = (time.monotonic() - begun) / len(found)
                    left = pace * (len(numbers) - len(found)) / 60
                    print(f"{len(found):,} of {len(numbers):,}, {faults} faults, {left:.0f} min left", file=sys.stderr)
        return sorted(found, key=lambda one: one.number), time.monotonic() - begun


def _make(root: Path) -> None:
    """In a process of its own: forks of one that has compiled loops or started threads would inherit their locks."""
    torch.set_num_threads(1)
    quiet()
    root.mkdir()
    make_bases(root)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first variant")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the variants to try")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write counts and faults there")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no more variants after so many")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    numbers = arguments.only or list(range(arguments.seed, arguments.seed + arguments.variants))
    found, seconds = run(numbers, arguments.processes, arguments.minutes)
    record = summary(found, seconds)
    print(table(record))
    shown = found if arguments.only else [one for one in found if one.kind in FAULTS]
    for one in shown:
        print(f"\n{one.number}: {one.kind} at {one.door}, {one.seconds:.1f} s\n  {one.damage}\n  {one.said}")
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(1 if record["faults"] else 0)


if __name__ == "__main__":
    main()
