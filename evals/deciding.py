"""The table that decides: every method and its peers on one model, at measured bits.

    python -m quantkit.evals.deciding smollm2 --data WIKITEXT --output evals/results/DATE-cpu-smollm2.json \
        --peer-llmcompressor PEER/bin/python --peer-auto-round OTHER/bin/python --png real-model.png
    python -m quantkit.evals.deciding smollm2 --data WIKITEXT --output FILE --list
    python -m quantkit.evals.deciding smollm2 --data WIKITEXT --set settings --output OTHER
    python -m quantkit.evals.deciding reference --calibration stdlib --test stdlib --output FILE --rows "rtn-*"

MODEL is a folder, a hub id, `reference`, or `smollm2`, which `quantkit.evals.real` fetches. `--data` is a folder with
valid.txt, from which calibration sequences are drawn, and test.txt, whose first sequences are measured on; wikitext-2's
is meant. Every row runs in a process of its own and is written to `--output` when it is done; the command, repeated,
does those that are missing, so that it may be stopped at any time. A row that fails is recorded with its error, and
tried again with `--retry`. `quantkit.evals.deciding_rows` has the rows, of methods and of settings,
`quantkit.evals.peers` how to install the peers; without a peer's Python its rows are left out.
"""

import argparse
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from quantkit.core import errors
from quantkit.core.errors import QuantkitError, UnknownName, one_line
from quantkit.evals.deciding_records import Records, setting_of
from quantkit.evals.deciding_row import Task
from quantkit.evals.deciding_rows import SETS, Protocol, Row, protocol_of
from quantkit.evals.deciding_table import DONE, FAILED, MISSING, draw, markdown
from quantkit.evals.machine import cpu_name
from quantkit.evals.peers import PeerGrid
from quantkit.evals.rate_distortion import figure_class
from quantkit.evals.real import model_folder
from quantkit.io.files import parse_json

_SOURCES = ("core", "formats", "quantizers", "models", "io", "run", "tuning", "evopress", "kernels")
"""Folders of the library whose code results depend on."""


@dataclass(frozen=True)
class Runner:
    """Measures rows, each in a process of its own.

    Attributes:
        folder: of the full-precision model.
        protocol: of all rows.
        peers: Python of each peer's environment, by the peer's name.
        threads: of a row's process.
        work: folder for temporary folders; None for the system's.
    """

    folder: Path
    protocol: Protocol
    peers: Mapping[str, str]
    threads: int
    work: Path | None = None

    def can(self, row: Row) -> bool:
        """Whether the peer that a row needs is there."""
        return not isinstance(row.way, PeerGrid) or row.way.peer in self.peers

    def measure(self, row: Row) -> dict[str, Any]:
        """What was measured of a row, or {"error": one line}; the end of a failed row's log goes to standard error.

        Raises:
            KeyboardInterrupt, SystemExit: the command is stopped; so is the row, with all that it has started.
        """
        if self.work is not None:
            self.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="quantkit-row-", dir=self.work) as name:
            folder = Path(name)
            task, result, log = folder / "task", folder / "result", folder / "log"
            (folder / "work").mkdir()
            python = self.peers.get(row.way.peer, "") if isinstance(row.way, PeerGrid) else ""
            task.write_bytes(pickle.dumps(Task(row.way, self.folder, self.protocol, folder / "work", python)))
            code = self._run([sys.executable, "-m", "quantkit.evals.deciding_row", str(task), str(result)], log)
            said = log.read_text(errors="replace").strip().splitlines()
            try:
                found: dict[str, Any] = parse_json(result)
            except ValueError:
                ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                found = {"error": one_line(f"ended by {ended}{f': {said[-1][:200]}' if said and code > 0 else ''}")}
            if "error" in found:
                sys.stderr.write("".join(f"    {line}\n" for line in said[-20:]))
        return found

    def _run(self, command: Sequence[str], log: Path) -> int:
        """The exit code of a command, which ends with this one."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
            try:
                return process.wait()
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise


def picked(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """The rows whose names one of the patterns (as a shell's) fits; "all" fits every one.

    Raises:
        UnknownName: a pattern fits none.
    """
    names = [row.name for row in rows]
    for pattern in patterns:
        if pattern != "all" and not any(fnmatchcase(name, pattern) for name in names):
            raise UnknownName("row", pattern, names)
    return [row for row in rows if any(pattern == "all" or fnmatchcase(row.name, pattern) for pattern in patterns)]


def source_hash() -> str:
    """A hash of the library's source, by which rows of another state of the methods can be told."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def sources() -> list[Path]:
    """The library's files that results depend on."""
    root = Path(errors.__file__).parents[1]
    return [root / "api.py", *(path for folder in _SOURCES for path in sorted((root / folder).rglob("*.py")))]


def run(rows: Sequence[Row], runner: Runner, records: Records, retry: bool = False, again: bool = False) -> None:
    """Measures what is missing, and writes each row when it is done.

    Args:
        rows: wanted.
        runner: measures them.
        records: get them.
        retry: measure those that have failed too; again: all.
    """
    wanted = {MISSING} | ({FAILED} if retry else set()) | ({FAILED, DONE} if again else set())
    todo = [row for row in rows if records.get(row)["state"] in wanted]
    left_out = [row.name for row in todo if not runner.can(row)]
    if left_out:
        print(f"{len(left_out)} rows of peers are left out; give their `--peer-...`", flush=True)
    todo = [row for row in todo if runner.can(row)]
    facts = {"date": date.today().isoformat(), "cpu": cpu_name(), "source": source_hash()}
    for index, row in enumerate(todo):
        records.refresh()
        if records.get(row)["state"] not in wanted:  # another command has measured it meanwhile
            continue
        start = time.monotonic()
        print(f"[{index + 1}/{len(todo)}] {row.name}", end=" ", flush=True)
        made = records.put(row, runner.measure(row) | facts)
        print(f"{_said(made)}; {time.monotonic() - start:.0f} s in all", flush=True)


def _said(record: Mapping[str, Any]) -> str:
    """A row's record in few words."""
    if record["state"] == FAILED:
        return f"failed: {record['error']}"
    if record["state"] == MISSING:
        return MISSING
    return (
        f"KL x 1000 {1000 * record['kl']:.2f} +- {1000 * record['kl_se']:.2f} at {record['bits_per_weight']:.3f} bits, "
        f"{record['seconds']:.0f} s"
    )


def listed(rows: Sequence[Row], records: Records) -> str:
    """All rows with what is known of each, a line each."""
    width, now = max(len(row.name) for row in rows), source_hash()
    lines = []
    for row in rows:
        record = records.get(row)
        other = "" if record.get("source", now) == now else " (by another state of the source)"
        lines.append(
            f"{record['state']:7s} {row.name:{width}s} {'' if record['state'] == MISSING else _said(record)}{other}"
        )
    return "\n".join(line.rstrip() for line in lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model")
    made.add_argument("--data", type=Path, metavar="FOLDER", help="with valid.txt and test.txt")
    made.add_argument("--calibration", help="text to calibrate on, instead of valid.txt; `stdlib` needs no file")
    made.add_argument("--test", help="text to measure on, instead of test.txt")
    made.add_argument("--num-samples", type=int, default=Protocol.num_samples, help="calibration sequences")
    made.add_argument("--seqlen", type=int, default=Protocol.seqlen, help="tokens of each")
    made.add_argument("--seed", type=int, default=Protocol.seed, help="of their choice")
    made.add_argument("--test-sequences", type=int, default=Protocol.test_sequences, help="that are measured")
    made.add_argument("--test-seqlen", type=int, default=Protocol.test_seqlen, help="tokens of each")
    made.add_argument("--set", choices=sorted(SETS), default="methods", help="methods, or settings of GPTQ and trellis")
    made.add_argument("--rows", nargs="+", default=["all"], metavar="PATTERN", help="names, or patterns as a shell's")
    made.add_argument("--list", action="store_true", help="say what is done and what is missing, and end")
    made.add_argument("--retry", action="store_true", help="rows that have failed, too")
    made.add_argument("--again", action="store_true", help="rows that are done, too")
    made.add_argument("--peer-llmcompressor", metavar="PYTHON", help="of the environment with llm-compressor")
    made.add_argument("--peer-auto-round", metavar="PYTHON", help="of the environment with auto-round")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each row's process")
    made.add_argument("--work", type=Path, metavar="FOLDER", help="for temporary folders, of a few dense models")
    made.add_argument("--output", type=Path, required=True, metavar="JSON", help="the rows")
    made.add_argument("--png", type=Path, help="draw KL over bits there; needs matplotlib")
    return made


def main() -> None:
    """Parses the command line, measures what is missing, prints the table and draws the picture."""
    arguments = parser().parse_args()
    if arguments.png:
        figure_class()  # so that a run of hours does not end in an error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as on Ctrl-C, the running row ends with this process
    try:
        protocol = protocol_of(arguments)
        name, folder = model_folder(arguments.model)
        known = SETS[arguments.set]
        records = Records(arguments.output, setting_of(name, folder, protocol), known)
        rows = picked(known, arguments.rows)
        if arguments.list:
            print(listed(rows, records))
            return
        asked = {"llm-compressor": arguments.peer_llmcompressor, "auto-round": arguments.peer_auto_round}
        peers = {peer: python for peer, python in asked.items() if python}
        run(
            rows,
            Runner(folder, protocol, peers, arguments.threads, arguments.work),
            records,
            arguments.retry,
            arguments.again,
        )
    except QuantkitError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; what is done is kept, the same command goes on", file=sys.stderr)
        sys.exit(130)
    print("\n" + markdown(records.current()))
    if arguments.png:
        draw(records.current(), arguments.png)


if __name__ == "__main__":
    main()
