"""All that a GPU has to say about the kernels, in minutes that cannot be wasted.

    python -m quantkit.evals.gpu_suite --out FOLDER [--minutes 9] [--only PART ...]
    python -m quantkit.evals.gpu_suite --plan
    python -m quantkit.evals.gpu_suite --compile-only [--arch 90] [--jobs N]

First all kernels are compiled, many processes side by side. Then every family is checked, side by side, at the smallest
shape that is timed. Then parts are timed one after the other, the most telling first; each checks the very launches
that it times. A part is a process: one that fails, hangs or dies loses only its own figures (`suite_driver`). Results
are JSON lines in FOLDER/results.jsonl, flushed one by one; FOLDER/table.md is made anew after each part, and all that
parts print is in FOLDER/log.txt. The exit code is 1 where something was wrong or did not finish.

`--plan` prints what would run and how long it should take; `--compile-only` does the first step alone, on any machine.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.evals import kernel_peers, suite_builds, suite_driver
from quantkit.evals.absent_gpu import GPU, SHARED_MEMORY
from quantkit.evals.suite_driver import Part
from quantkit.evals.suite_parts import PARTS

STARTUP = 12.0
"""Seconds until a part's process begins: imports, CUDA's context, the copy bandwidth. A guess for a GPU machine."""
BUILD = 1.2
"""Seconds of a processor to compile a kernel: the mean of the 154 of the suite by Triton 3.6, on a busy machine."""
BUILDS_A_GROUP = 1.0
"""Kernels that a group adds, of those that no other has; `--compile-only` counts them: 0.7 in all."""
SUITE = [name for name, contents in PARTS.items() if not contents.deep]


def parts(names: Sequence[str], folder: Path, jobs: int | None = None) -> list[Part]:
    """The processes for some of PARTS: what is there, its kernels compiled, checks side by side, and the timings."""
    results = str((folder / suite_driver.RESULTS).absolute())

    def process(name: str, seconds: float, expected: float, **more: Any) -> Part:
        command = ["-m", "quantkit.evals.suite_parts", name, "--results", results, "--seconds", "{seconds}"]
        return Part(name, (sys.executable, *command), seconds, expected, **more)

    def compiling(names: Sequence[str], title: str) -> Part:
        """The part that compiles what these parts launch, in processes of its own."""
        jobs_now = jobs or os.cpu_count() or 1
        command = ["-m", "quantkit.evals.suite_builds", *names, "--results", results, "--jobs", str(jobs_now)]
        expected = STARTUP + BUILD * BUILDS_A_GROUP * sum(len(PARTS[name].groups()) for name in names) / jobs_now
        return Part(title, (sys.executable, *command), 3 * expected + 30, expected, least=expected)

    sweeps = [name for name in names if name.startswith("sweep")]
    first = [name for name in names if name not in sweeps and name != "peers"]
    found = [process("about", 60, STARTUP)]
    found += [compiling(first, "compile")] if first else []
    for name in names:
        if name == "peers" and not kernel_peers.present():
            continue
        if name in sweeps[:1]:
            found.append(compiling(sweeps, "compile sweeps"))
        contents = PARTS[name]
        expected = STARTUP + contents.seconds * len(contents.groups())
        together = "check" if not contents.timing and not contents.deep else ""
        found.append(process(name, 3 * expected + 30, expected, least=STARTUP + 3, together=together))
    return found


def plan(todo: Sequence[Part], minutes: float) -> str:
    """What would run, when each begins, and how long it should take."""
    lines = [f"{'begins':>7} {'takes':>6} {'limit':>6}  part", "-" * 60]
    begin, side, widest = 0.0, "", 0.0
    for part in todo:
        if part.together != side or not side:
            begin, side, widest = begin + widest, part.together, 0.0
        widest = max(widest, part.expected)
        more = f" ({len(PARTS[part.name].groups())} groups)" if part.name in PARTS else ""
        more += " side by side" if part.together else ""
        late = "" if begin + part.expected < 60 * minutes else "  NOT IN TIME"
        lines.append(f"{begin:5.0f} s {part.expected:4.0f} s {part.seconds:4.0f} s  {part.name}{more}{late}")
    begin += widest
    lines += ["-" * 60, f"{begin:.0f} s in all, of {60 * minutes:.0f} s"]
    lines.append(
        f"A model: {BUILD} s to compile a kernel on one core (measured); {STARTUP:.0f} s until a process begins"
    )
    lines.append("and the seconds of a group in suite_parts.PARTS are guesses, as no GPU was there to measure them.")
    missing = [name for name in ("humming", "gemlite", "torchao", "hqq") if name not in kernel_peers.present()]
    lines += [f"cannot be imported, so not measured beside: {', '.join(missing)}"] if missing else []
    return "\n".join(lines)


def missing_gpu() -> str:
    """Why nothing can run, or nothing. Asked of another process: a driver that hangs does not hang this one."""
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    try:
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=90).returncode
    except subprocess.TimeoutExpired:
        return "error: torch does not come back from looking for a GPU"
    advice = "`--compile-only` of quantkit.evals.gpu_suite needs none"
    return "" if found == 0 else f"error: this measures a GPU and there is none here; {advice}"


def measure(todo: Sequence[Part], folder: Path, minutes: float, echo: bool = False) -> int | str:
    """Runs processes and prints their table; the exit code, or why there is nothing to run on.

    Args:
        todo: see `parts`.
        folder: for the results; those of an earlier run are removed.
        minutes: nothing outlives them.
        echo: lets the processes print here instead of into the log.
    """
    if problem := missing_gpu():
        return problem
    for name in (suite_driver.RESULTS, suite_driver.TABLE, suite_driver.LOG):
        (folder / name).unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(f"ended by {signal.Signals(number).name}"))
    suite_driver.run(todo, folder, 60 * minutes, echo)
    records = suite_driver.read(folder / suite_driver.RESULTS)
    print(suite_driver.table(records))
    wrong = any(record["kind"] == "check" and not record["ok"] for record in records)
    return 1 if wrong or suite_driver.unfinished(records) else 0


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results; those of an earlier run there are removed")
    parser.add_argument("--minutes", type=float, default=9, help="nothing outlives them")
    parser.add_argument("--only", nargs="+", choices=SUITE, metavar="PART", default=SUITE, help=", ".join(SUITE))
    parser.add_argument("--plan", action="store_true", help="print what would run")
    parser.add_argument("--compile-only", action="store_true", help="compile everything; needs no GPU")
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED_MEMORY), help="for --compile-only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    arguments = parser.parse_args()
    names = [name for name in SUITE if name in arguments.only]
    if arguments.compile_only:
        sys.exit(suite_builds.run(names, GPU(arguments.arch), arguments.jobs))
    todo = parts(names, arguments.out or Path(), arguments.jobs)
    print(plan(todo, arguments.minutes), flush=True)
    if arguments.plan:
        return
    if arguments.out is None:
        sys.exit("error: give --out FOLDER for the results")
    sys.exit(measure(todo, arguments.out, arguments.minutes))


if __name__ == "__main__":
    main()
