"""Runs the parts of a suite, each as a process of its own, so that none can lose more than its own figures.

A part appends one JSON object a line to the results as it finds them; what it has written stays when it fails, hangs or
is killed. `run` ends a part at its limit and everything at the limit of all, goes on with the next, gives a part that
died another chance behind the launch that it died of, and makes a Markdown table anew after each. Objects:

    {"kind": "begin", part, section, place, what}                 a group of launches is about to be made
    {"kind": "check", part, section, place, what, column, ok, detail}
    {"kind": "time",  part, section, place, what, column, microseconds, ...}     "baseline" where there is no check
    {"kind": "about", ...}, {"kind": "note", part, text}, {"kind": "part", part, status, seconds}

A time is shown only beside a check of the same launch, by the same part, that was passed.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

RESULTS, TABLE, LOG = "results.jsonl", "table.md", "log.txt"
GRACE = 2.0
"""Seconds from the request to end until the end."""
_ABANDONED = 3.0
"""Seconds after which a process that cannot be killed, because it hangs in a driver, is left behind."""
_CHANCES = 4


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: unique.
        command: to run; "{seconds}" in it becomes the seconds that it has.
        seconds: after which it is ended.
        expected: seconds that it should take.
        least: it is not begun with fewer seconds left.
        together: parts in a row with the same word here run side by side; "" for one that runs alone.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    expected: float = 0.0
    least: float = 0.0
    together: str = ""


class _Running:
    """A part's process."""

    def __init__(self, part: Part, seconds: float, log: IO[bytes] | None) -> None:
        self.part, self.begun, self.status = part, time.monotonic(), ""
        self.end, self.killed = self.begun + seconds, False
        command = [word.replace("{seconds}", f"{seconds:.0f}") for word in part.command]
        self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def look(self) -> bool:
        """Whether it is over; asks it to end when it is late, and kills it when it does not."""
        code = self.process.poll()
        now = time.monotonic()
        if code is not None:
            self._signal(signal.SIGKILL)  # what it started and left
            late = self.status == "timed out"
            self.status = self.status if late else "done" if code == 0 else _died(code)
            return True
        if now > self.end and not self.status:
            self.status = "timed out"
            self._signal(signal.SIGTERM)
        if now > self.end + GRACE and not self.killed:
            self.killed = True
            self._signal(signal.SIGKILL)
        return now > self.end + GRACE + _ABANDONED

    def kill(self) -> None:
        """At once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it is gone
            os.killpg(self.process.pid, number)


def _died(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"failed (exit {code})"


def run(parts: Sequence[Part], folder: Path, seconds: float, echo: bool = False) -> None:
    """Runs parts in their order, and prints a line for each.

    Args:
        parts: see `Part`.
        folder: for the results, the table and all that the parts print.
        seconds: for all; no process outlives them, except one that cannot be killed.
        echo: lets the parts print here instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds - GRACE - 0.5
    with (folder / LOG).open("ab") as file:
        log = None if echo else file
        for _, group in groupby(enumerate(parts), lambda pair: pair[1].together or pair[0]):
            _side_by_side([part for _, part in group], folder, end, log)
            write_table(folder)


def _side_by_side(parts: Sequence[Part], folder: Path, end: float, log: IO[bytes] | None) -> None:
    waiting = [(part, 1) for part in parts]
    running: dict[_Running, tuple[int, int]] = {}  # its attempt, and the launches begun before it
    try:
        while waiting or running:
            while waiting:
                part, attempt = waiting.pop(0)
                left = end - time.monotonic()
                if left < max(part.least, 0.1):
                    _record(folder, {"kind": "part", "part": part.name, "status": "no time left", "seconds": 0.0})
                    continue
                begun = _begun(folder, part.name)
                running[_Running(part, min(part.seconds, left), log)] = attempt, begun
            for process in [process for process in running if process.look()]:
                attempt, begun = running.pop(process)
                took = time.monotonic() - process.begun
                name, status = process.part.name, process.status
                _record(folder, {"kind": "part", "part": name, "status": status, "seconds": round(took, 1)})
                died = status not in ("done", "timed out")
                if died and attempt < _CHANCES and _begun(folder, name) > begun:
                    waiting.append((process.part, attempt + 1))
            time.sleep(0.02)
    finally:
        for process in running:
            process.kill()


def _begun(folder: Path, name: str) -> int:
    """Groups of launches that a part has begun."""
    return sum(record["kind"] == "begin" and record.get("part") == name for record in read(folder / RESULTS))


def _record(folder: Path, record: dict[str, Any]) -> None:
    print(f"{record['part']:20} {record['status']:20} {record['seconds']:6.1f} s", flush=True)
    append(folder / RESULTS, record)


def unfinished(records: Sequence[dict[str, Any]]) -> list[str]:
    """Parts that did not come to their end, in no attempt."""
    last = {record["part"]: record["status"] for record in records if record["kind"] == "part"}
    return [f"{part}: {status}" for part, status in last.items() if status != "done"]


def append(path: Path, record: dict[str, Any]) -> None:
    """Adds a line and sees to it that it is on disk. Starts with a new line, lest one that was cut off spoils it."""
    line = "\n" + json.dumps(record) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())  # at once: several processes may write
        os.fsync(file)
    finally:
        os.close(file)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    return list(_objects(lines))


def _objects(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # cut off
            continue
        if isinstance(record, dict) and "kind" in record:
            yield record


def write_table(folder: Path) -> str:
    """Makes the table of what there is, and returns it."""
    text = table(read(folder / RESULTS))
    temporary = folder / (TABLE + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, folder / TABLE)
    return text


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: what was measured on, the parts, what is wrong, and a table a section."""
    lines = [f"- {key}: {value}" for record in records if record["kind"] == "about" for key, value in record.items()
             if key != "kind"]  # fmt: skip
    lines = [*dict.fromkeys(lines), "", "| part | state | seconds |", "|---|---|---|"]
    lines += [f"| {r['part']} | {r['status']} | {r['seconds']:.0f} |" for r in records if r["kind"] == "part"]
    wrong = [r for r in records if r["kind"] == "check" and not r["ok"]]
    lines += ["", f"{sum(r['kind'] == 'check' for r in records)} launches checked, {len(wrong)} wrong"]
    lines += [f"- {r['part']}: {r['place']}, {r['what']}, {r['column']}: {r['detail']}" for r in wrong]
    lines += [f"- {r['part']}: {r['text']}" for r in records if r["kind"] == "note"]
    shown = [r for r in records if r["kind"] in ("begin", "check", "time")]
    for section in dict.fromkeys(record["section"] for record in shown):
        lines += ["", f"### {section}", "", *_section([r for r in shown if r["section"] == section])]
    return "\n".join(lines) + "\n"


def _section(records: Sequence[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(r["column"] for r in records if r["kind"] != "begin"))
    lines = [f"| | | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    places = list(dict.fromkeys(r["place"] for r in records))
    ours = {(r["place"], r["what"]): not r.get("baseline") for r in records}
    for key in sorted(ours, key=lambda key: (places.index(key[0]), ours[key])):  # what is compared with comes first
        own = [r for r in records if (r["place"], r["what"]) == key]
        parts = dict.fromkeys(r["part"] for r in own)
        timed = [part for part in parts if any(r["kind"] == "time" and r["part"] == part for r in own)]
        for part in timed or list(parts)[-1:]:  # a check of its own part shows only where nothing was timed
            of_part = [r for r in own if r["part"] == part]
            cells = [cell([r for r in of_part if r.get("column") == column]) for column in columns]
            if not any(cells):
                cells = ["died" if any(r["kind"] == "begin" for r in of_part) else "", *cells[1:]]
            name = f"{key[1]} ({part})" if len(timed) > 1 else key[1]
            lines.append(f"| {key[0]} | {name} | {' | '.join(cells)} |")
    return lines


def cell(records: Sequence[dict[str, Any]]) -> str:
    """What a table says of one launch, of one part's records."""
    checks = [r for r in records if r["kind"] == "check"]
    if any(not r["ok"] for r in checks):
        return "WRONG"
    times = [r for r in records if r["kind"] == "time"]
    if not times:
        return "right" if checks else ""
    last = times[-1]
    if not checks and not last.get("baseline"):
        return "unchecked"
    parts = [f"{last['speed_up']:.2f}x"] if last.get("speed_up") is not None else []
    parts.append(f"{last['microseconds']:.1f} us")
    if last.get("bandwidth_share") is not None:
        parts.append(f"{100 * last['bandwidth_share']:.0f}%")
    return ", ".join(parts)
