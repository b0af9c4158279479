"""Runs that are killed, that run out of disk and that meet another one: what is left, and what going on gives.

    python -m quantkit.evals.benchmarks.faults [--quantize 50] [--search 20] [--tune 20] [--two 10] [--full 30]
        [--races 30] [--seed 0] [--json FILE]

Each trial is a command on a small untrained model, at a random moment of which SIGKILL comes, or on a disk that is
full before it ends, or with another command that writes to the same folder. Then it goes on with --resume, and must
end in the bytes of a run that nothing happened to; files of somebody else's lie beside its output and must be as they
were, nothing of ours may be left besides the output, and a command that fails must say so in one line. A race must end
in one whole result and a refusal in one line, but where one run had ended before the other began.

Commands are forks of one process that has imported everything. Disks are file systems in memory, in a mount namespace
of their own, which takes Linux and root, or user namespaces.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from quantkit.evals.benchmarks.forks import become
from quantkit.evals.benchmarks.packed_bytes import digest, small_models

IMPORTED = [
    "accelerate", "numba", "quantkit.kernels.int_group_numba", "quantkit.kernels.hadamard_numba",
    "torch._dynamo", "transformers.models.llama.modeling_llama", "quantkit.cli.main",
    "quantkit.evopress.session", "quantkit.run.pipeline", "quantkit.tuning.end_to_end", "quantkit.quantizers.sparse",
]  # fmt: skip
TEXT = "--calibration {home}/text.txt --seqlen 64 --device cpu"
SEARCH = (
    f"search {{model}} --avg-bits 3.8 --candidates gptq(2,64),gptq(3,64),gptq(4,64) --num-samples 4 --search-samples 8 "
    f"--held-out 4 --generations 3 --offspring 4 {TEXT} --database {{work}}/candidates --output {{work}}/out"
)
COMMANDS = {
    "quantize": f"quantize {{model}} --bits 3 --group-size 64 --num-samples 4 {TEXT} --output {{work}}/out",
    "search": SEARCH,
    "tune": "tune {home}/packed --teacher {model} --steps 6 --batch 2 --micro-batch 1 --num-samples 12 --held-out 4 "
    f"--evaluate-every 2 {TEXT} --output {{work}}/out",
    "two": SEARCH,
}
"""By name; "two" is shared out over two processes."""
DISKS = ("quantize", "quantize", "search", "tune")
"""Commands that run out of disk, in turn."""
FOREIGN = {
    "notes/model.safetensors": b"somebody else's weights", "out.txt": b"somebody else's text", "run.json": b"null",
}  # fmt: skip
"""Files of somebody else's beside an output, by name."""
OTHER = COMMANDS["quantize"].replace("--bits 3", "--bits 4")
MISSED = "ended before the signal", "there was room"
"""Outcomes of trials in which nothing happened, which do not count."""
HANGS = 120.0
"""Seconds after which a command that should end counts as one that hangs."""


@dataclass(frozen=True)
class End:
    """How a command ended.

    Attributes:
        code: exit code, minus a signal's number where that ended it; None where it hung.
        said: on standard error.
        began, ended: in seconds.
    """

    code: int | None
    said: str
    began: float
    ended: float

    @property
    def refusal(self) -> bool:
        """Whether it failed in one line."""
        errors = [line for line in self.said.splitlines() if line.startswith("error:")]
        return self.code == 2 and len(errors) == 1 and "Traceback" not in self.said


@dataclass
class Tally:
    """Outcomes of the trials of one kind, and what was wrong with those that were not as they must be."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, trial: str, outcome: str, wrong: Sequence[str]) -> None:
        """One trial more."""
        self.outcomes[outcome if not wrong else "fault"] += 1
        self.faults += [f"{trial}: {text}" for text in wrong]


class Process:
    """A command in a fork.

    Args:
        arguments: of `quantkit`.
        log: file for what it says.
        environment: variables beside those of this process.
    """

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] = {}) -> None:
        self._log, self._began = log, time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(arguments, log, environment)

    def kill(self) -> None:
        """SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def end(self, limit: float = HANGS) -> End:
        """Waits for it."""
        deadline = time.monotonic() + limit
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return self._ended(os.waitstatus_to_exitcode(status))
            if time.monotonic() > deadline:
                self.kill()
                os.waitpid(self.pid, 0)
                return self._ended(None)
            time.sleep(0.005)

    def _ended(self, code: int | None) -> End:
        return End(code, self._log.read_text(errors="replace"), self._began, time.monotonic())


def _become(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> NoReturn:
    """In a fork: the command, of a session of its own."""
    os.setsid()
    os.environ.update(environment)
    become("quantkit.cli", arguments, log, log)


@dataclass(frozen=True)
class Bench:
    """Where trials take place.

    Attributes:
        home: folder with the model, the text, a packed checkpoint, results of runs that nothing happened to.
        seconds: what these took, by command.
        chance: of moments.
    """

    home: Path
    seconds: dict[str, float]
    chance: random.Random

    def arguments(self, command: str, work: Path) -> list[str]:
        """Arguments of a command that writes into a folder `out` of `work`."""
        return command.format(model=self.home / "llama", home=self.home, work=work).split()

    def start(self, name: str, work: Path, *flags: str) -> list[Process]:
        """Begins a command of `COMMANDS`: its processes."""
        arguments = [*self.arguments(COMMANDS[name], work), *flags]
        log = work.parent / f"{work.name}.log"
        log.unlink(missing_ok=True)
        if name != "two":
            return [Process(arguments, log)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [Process(arguments, log, environment) for environment in ranks]

    def work(self, name: str) -> Path:
        """A new folder with files of somebody else's."""
        work = self.home / "trials" / name
        (work / "notes").mkdir(parents=True)
        for place, held in FOREIGN.items():
            (work / place).write_bytes(held)
        return work

    def wrong(self, name: str, work: Path) -> list[str]:
        """What is not as it would be after a run that nothing happened to."""
        whole = self.home / "whole" / name
        found = []
        if not (work / "out").is_dir():
            return ["no output"]
        if digest(work / "out") != digest(whole / "out"):
            found.append("other bytes")
        for place in ("out", "."):
            names, expected = ({entry.name for entry in (top / place).iterdir()} for top in (work, whole))
            if names != expected:
                found.append(f"files in {place}: {sorted(names ^ expected)}")
        return found + foreign(work)


def foreign(work: Path) -> list[str]:
    """What happened to the files of somebody else's."""
    changed = [
        name for name, held in FOREIGN.items() if not (work / name).exists() or (work / name).read_bytes() != held
    ]
    return [f"somebody else's {name} is changed" for name in changed]


def prepare(home: Path, names: Sequence[str], chance: random.Random) -> Bench:
    """The model and whole runs, made by forks: threads that torch starts here would not be in later forks."""
    source = "\n\n".join(file.read_text(errors="replace") for file in sorted(Path(os.__file__).parent.glob("a*.py")))
    (home / "text.txt").write_text(source)
    pid = os.fork()
    if pid == 0:
        small_models(home)
        os._exit(0)
    os.waitpid(pid, 0)
    bench = Bench(home, {}, chance)
    arguments = [*bench.arguments(COMMANDS["quantize"], home / "first")]
    (home / "first").mkdir()
    assert Process(arguments, home / "first.log").end(600).code == 0, (home / "first.log").read_text()
    (home / "first" / "out").rename(home / "packed")
    for name in names:
        work = bench.work(name)
        ends = [process.end(600) for process in bench.start(name, work)]
        if any(end.code != 0 for end in ends):
            sys.exit(f"error: a {name} that nothing happened to fails:\n{ends[0].said}")
        bench.seconds[name] = max(end.ended - end.began for end in ends)
        (home / "whole").mkdir(exist_ok=True)
        work.rename(home / "whole" / name)
    return bench


def kill(bench: Bench, name: str, number: int) -> tuple[str, list[str]]:
    """A run that is killed, once or twice, and goes on: (what came of it, what was wrong)."""
    work = bench.work(f"{name}-{number}")
    killed, wrong = 0, []
    for again in range(1 + bench.chance.randrange(2)):
        flags = ["--resume"] if again else []
        processes = bench.start(name, work, *flags)
        time.sleep(bench.chance.uniform(0, bench.seconds[name]))
        for process in processes if bench.chance.random() < 0.5 else processes[:1]:
            process.kill()
        ends = [process.end() for process in processes]
        killed += any(end.code == -signal.SIGKILL for end in ends)
        wrong += [f"a process hangs after the other's death: {end.said[-300:]}" for end in ends if end.code is None]
        wrong += foreign(work)
        if (work / "out").exists():
            break
    if not (work / "out").exists():
        ends = [process.end() for process in bench.start(name, work, "--resume")]
        wrong += [f"--resume ends with {end.code}: {end.said[-500:]}" for end in ends if end.code != 0]
    wrong += bench.wrong(name, work)
    shutil.rmtree(work)
    if not killed:
        bench.seconds[name] = min(bench.seconds[name], max(end.ended - end.began for end in ends))
    return ("killed, same bytes" if killed else MISSED[0]), wrong


def full(bench: Bench, name: str, number: int) -> tuple[str, list[str]]:
    """A run on a disk that becomes full, and goes on when there is room: in a fork, whose disk nobody else sees."""
    report = bench.home / f"full-{number}.json"
    pid = os.fork()
    if pid == 0:
        try:
            own_disk(bench.home / "trials", megabytes=64)
            found = _fill(bench, name, number)
        except BaseException:
            found = "fault", [traceback.format_exc()]
        report.write_text(json.dumps(found))
        os._exit(0)
    os.waitpid(pid, 0)
    outcome, wrong = json.loads(report.read_text())
    return outcome, wrong


def _fill(bench: Bench, name: str, number: int) -> tuple[str, list[str]]:
    work = bench.work(f"{name}-{number}")
    needed = sum(file.stat().st_size for file in (bench.home / "whole" / name).rglob("*") if file.is_file())
    disk = os.statvfs(work)
    ballast = work.parent / "ballast"
    room = int(bench.chance.uniform(0, 1.5) * needed)
    ballast.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - room - 65536)))
    end = bench.start(name, work)[0].end()
    wrong = foreign(work)
    ballast.unlink()
    if end.code == 0:
        return MISSED[1], wrong + bench.wrong(name, work)
    if not end.refusal:
        wrong.append(f"ends with {end.code}: {end.said[-500:]}")
    again = bench.start(name, work, "--resume")[0].end()
    if again.code != 0:
        wrong.append(f"--resume ends with {again.code}: {again.said[-500:]}")
    return "one line, then same bytes", wrong + bench.wrong(name, work)


def own_disk(folder: Path, megabytes: int) -> None:
    """Lays an empty file system in memory over a folder, for this process and its forks alone.

    Raises:
        OSError: the system does not let it.
    """
    new_namespace, new_user, recursive_private = 0x00020000, 0x10000000, 0x4000 | 0x40000
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()

    def call(code: int) -> None:
        if code:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    call(libc.unshare(new_namespace | (new_user if user else 0)))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    call(libc.mount(b"none", b"/", None, recursive_private, None))
    call(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={megabytes}m".encode()))


def race(bench: Bench, number: int) -> tuple[str, list[str]]:
    """Two commands that write to one folder: (what came of it, what was wrong)."""
    work = bench.work(f"race-{number}")
    ways: list[list[str]] = [[], ["--resume"], ["--overwrite"]]
    commands = [COMMANDS["quantize"], OTHER if number % 2 else COMMANDS["quantize"]]
    if number % 3 == 0:  # on top of a run that was killed
        process = bench.start("quantize", work)[0]
        time.sleep(bench.chance.uniform(0.3, 0.8) * bench.seconds["quantize"])
        process.kill()
        process.end()
    order = bench.chance.sample(range(2), 2)
    processes: list[Process] = []
    for one in order:
        arguments = [*bench.arguments(commands[one], work), *bench.chance.choice(ways)]
        processes.append(Process(arguments, bench.home / f"race-{number}-{one}.log"))
        time.sleep(bench.chance.uniform(0, 0.5) * bench.seconds["quantize"])
    ends = [process.end() for process in processes]
    won = [one for one, end in zip(order, ends, strict=True) if end.code == 0]
    wrong = [f"ends with {end.code}: {end.said[-500:]}" for end in ends if end.code != 0 and not end.refusal] + foreign(
        work
    )
    overlap = ends[1].began < ends[0].ended
    if len(won) == 2 and overlap and not _one_after_the_other(ends):
        wrong.append("both say that they made it")
    outcome = ("both refused", "one result, one refusal", "one after the other")[len(won)]
    if won:
        made = digest(work / "out")
        wholes = {"other" if commands[one] == OTHER else "quantize" for one in won}
        if made not in {digest(bench.home / "whole" / whole / "out") for whole in wholes}:
            wrong.append("the result is neither run's")
    else:
        end = Process([*bench.arguments(commands[0], work), "--overwrite"], bench.home / "after.log").end()
        wrong += [] if end.code == 0 else [f"and then nothing works: {end.said[-300:]}"]
    left = sorted(entry.name for entry in work.iterdir() if entry.name.startswith("out.") and entry.name != "out.txt")
    wrong += [f"left behind: {left}"] if left else []
    shutil.rmtree(work)
    return outcome, wrong


def _one_after_the_other(ends: Sequence[End]) -> bool:
    """Whether the second may have waited for nothing: it imports nothing, but looks at its input before the folder."""
    return ends[1].ended - ends[0].ended > 0.2 * (ends[1].ended - ends[1].began)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    counts = {"quantize": 50, "search": 20, "tune": 20, "two": 10, "full": 30, "races": 30}
    for name, count in counts.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=f"trials; {count} by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts")
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    for module in IMPORTED:
        import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        rows = trials(Path(folder), {name: getattr(asked, name) for name in counts}, random.Random(asked.seed))
    if asked.json:
        asked.json.write_text(json.dumps({"seed": asked.seed, "rows": table(rows)}, indent=1) + "\n")
    for row in rows.values():
        for fault in row.faults:
            print(fault)
    sys.exit(1 if any(row.faults for row in rows.values()) else 0)


def table(rows: Mapping[str, Tally]) -> list[dict[str, Any]]:
    """The counts as JSON, a record a kind."""
    found = []
    for kind, row in rows.items():
        count, wrong = sum(row.outcomes.values()), row.outcomes["fault"]
        outcomes = {"outcomes": dict(row.outcomes), "faults": row.faults}
        found.append({"kind": kind, "trials": count, "sound": count - wrong} | outcomes)
    return found


def trials(home: Path, counts: Mapping[str, int], chance: random.Random) -> dict[str, Tally]:
    """All trials: kind -> outcomes."""
    needed = {*(DISKS if counts["full"] else ()), *(("quantize",) if counts["races"] else ())}
    bench = prepare(home, [name for name in COMMANDS if counts[name] or name in needed], chance)
    if counts["races"]:
        work = bench.work("other")
        assert Process(bench.arguments(OTHER, work), home / "other.log").end(600).code == 0
        work.rename(home / "whole" / "other")
    kinds: dict[str, Callable[[int], tuple[str, list[str]]]] = {name: partial(kill, bench, name) for name in COMMANDS}
    kinds["full"] = lambda number: full(bench, DISKS[number % len(DISKS)], number)
    kinds["races"] = partial(race, bench)
    rows: dict[str, Tally] = {}
    for kind, trial in kinds.items():
        number = 0
        while sum(rows.get(kind, Tally()).outcomes.values()) < counts[kind] and number < 5 * counts[kind]:
            outcome, wrong = trial(number)
            if outcome not in MISSED or wrong:
                rows.setdefault(kind, Tally()).add(f"{kind} {number}", outcome, wrong)
            number += 1
        if kind in rows:
            told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(rows[kind].outcomes.items()))
            print(f"{kind:10} {told}", flush=True)
    return rows


if __name__ == "__main__":
    main()
