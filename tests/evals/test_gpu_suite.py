"""The driver of the GPU suite with parts that fail in all ways that a GPU knows, and its builds, without a GPU."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from quantkit.evals import suite_driver
from quantkit.evals.suite_driver import Part, append, read, run

from ..conftest import ROOT

STUB = """
    import json, os, signal, sys, time
    path, name = sys.argv[1:3]

    def say(**record):
        with open(path, "a") as file:
            file.write("\\n" + json.dumps({"part": name, **record}) + "\\n")

    def launch(what, ok=True, checked=True, timed=True, **more):
        place = {"section": "product", "place": "4096 x 4096", "what": what}
        say(kind="begin", **place)
        for M in (1, 16):
            if checked:
                say(kind="check", column=f"M={M}", ok=ok, detail=f"error {0.001 if ok else 0.5}", **place)
            if timed:
                say(kind="time", column=f"M={M}", microseconds=2.0 * M, speed_up=3.0, **more, **place)
"""


def part(folder, name, body, seconds=20.0, **more):
    script = folder / f"{name}.py"
    script.write_text(textwrap.dedent(STUB) + textwrap.dedent(body))
    return Part(name, (sys.executable, str(script), str(folder / "out" / "results.jsonl"), name), seconds, **more)


def states(folder):
    return [(r["part"], r["status"]) for r in read(folder / "out" / "results.jsonl") if r["kind"] == "part"]


def row(folder, what):
    return [line for line in (folder / "out" / "table.md").read_text().splitlines() if f"| {what} |" in line]


def test_each_part_loses_only_its_own_figures(tmp_path):
    parts = [
        part(tmp_path, "good", 'launch("int4")'),
        part(tmp_path, "failing", 'launch("int3"); raise RuntimeError("CUDA error: an illegal memory access")'),
        part(tmp_path, "hanging", 'launch("int2"); time.sleep(60)', seconds=1.0),
        part(tmp_path, "deaf", 'signal.signal(15, signal.SIG_IGN); launch("int8"); time.sleep(60)', seconds=1.0),
        part(tmp_path, "killed", 'launch("trellis"); os.kill(os.getpid(), signal.SIGKILL)'),
        part(tmp_path, "faulting", "os.kill(os.getpid(), signal.SIGSEGV)"),
        part(tmp_path, "late", 'launch("codebook")'),
    ]
    begun = time.monotonic()
    run(parts, tmp_path / "out", 60)
    assert time.monotonic() - begun < 1 + 1 + suite_driver.GRACE + 8
    assert dict(states(tmp_path)) == {
        "good": "done", "failing": "failed (exit 1)", "hanging": "timed out", "deaf": "timed out",
        "killed": "killed by SIGKILL", "faulting": "killed by SIGSEGV", "late": "done",
    }  # fmt: skip
    for what in ("int4", "int3", "int2", "int8", "trellis", "codebook"):
        assert row(tmp_path, what) == [f"| 4096 x 4096 | {what} | 3.00x, 2.0 us | 3.00x, 32.0 us |"]
    assert "an illegal memory access" in (tmp_path / "out" / "log.txt").read_text()


def test_what_lies_is_withheld(tmp_path):
    parts = [
        part(tmp_path, "lying", 'launch("int4", ok=False)'),
        part(tmp_path, "unchecked", 'launch("int3", checked=False)'),
        part(tmp_path, "baseline", 'launch("torch", checked=False, baseline=True)'),
        part(tmp_path, "not timed", 'launch("int2", timed=False)'),
    ]
    run(parts, tmp_path / "out", 60)
    assert row(tmp_path, "int4") == ["| 4096 x 4096 | int4 | WRONG | WRONG |"]
    assert row(tmp_path, "int3") == ["| 4096 x 4096 | int3 | unchecked | unchecked |"]
    assert row(tmp_path, "torch") == ["| 4096 x 4096 | torch | 3.00x, 2.0 us | 3.00x, 32.0 us |"]
    assert row(tmp_path, "int2") == ["| 4096 x 4096 | int2 | right | right |"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "4 launches checked, 2 wrong" in text and "lying: 4096 x 4096, int4, M=16: error 0.5" in text


def test_another_parts_check_does_not_vouch(tmp_path):
    parts = [
        part(tmp_path, "check", 'launch("int4", timed=False)'),
        part(tmp_path, "time", 'launch("int4", checked=False)'),
    ]
    run(parts, tmp_path / "out", 60)
    assert row(tmp_path, "int4") == ["| 4096 x 4096 | int4 | unchecked | unchecked |"]


def test_a_part_goes_on_behind_the_launch_that_killed_it(tmp_path):
    body = """
        seen = open(path).read()
        for what in ("int4", "int3", "int2"):
            if f'"what": "{what}"' in seen:
                continue
            if what == "int3":
                say(kind="begin", section="product", place="4096 x 4096", what=what)
                os.kill(os.getpid(), signal.SIGSEGV)
            launch(what)
    """
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_text("")
    run([part(tmp_path, "family", body)], tmp_path / "out", 60)
    assert states(tmp_path) == [("family", "killed by SIGSEGV"), ("family", "done")]
    assert row(tmp_path, "int2") == ["| 4096 x 4096 | int2 | 3.00x, 2.0 us | 3.00x, 32.0 us |"]
    assert row(tmp_path, "int3") == ["| 4096 x 4096 | int3 | died |  |"]


def test_one_that_always_dies_is_given_up(tmp_path):
    run([part(tmp_path, "doomed", 'launch("int4"); os.abort()')], tmp_path / "out", 60)
    assert states(tmp_path) == [("doomed", "killed by SIGABRT")] * 4


def test_the_table_is_made_anew_after_each_part(tmp_path):
    body = """
        import pathlib
        launch("int3")
        assert "| int4 |" in (pathlib.Path(path).parent / "table.md").read_text()
    """
    run([part(tmp_path, "first", 'launch("int4")'), part(tmp_path, "second", body)], tmp_path / "out", 60)
    assert states(tmp_path) == [("first", "done"), ("second", "done")]


def test_the_bound_on_all_holds_for_what_ignores_it(tmp_path):
    deaf = "signal.signal(15, signal.SIG_IGN); launch('x'); time.sleep(60)"
    parts = [part(tmp_path, f"deaf {index}", deaf, together="deaf") for index in range(3)]
    parts.append(part(tmp_path, "next", 'launch("int4")', least=0.5))
    begun = time.monotonic()
    run(parts, tmp_path / "out", 5)
    assert time.monotonic() - begun < 5.3
    assert dict(states(tmp_path)) == {f"deaf {index}": "timed out" for index in range(3)} | {"next": "no time left"}


def test_parts_run_side_by_side_where_told(tmp_path):
    parts = [part(tmp_path, name, "time.sleep(1.5)", together="both") for name in ("one", "other")]
    begun = time.monotonic()
    run(parts, tmp_path / "out", 60)
    assert time.monotonic() - begun < 2.8


def test_what_a_part_leaves_behind_is_ended(tmp_path):
    body = """
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        say(kind="note", text=str(child.pid))
    """
    run([part(tmp_path, "parent", body)], tmp_path / "out", 60)
    (pid,) = [int(r["text"]) for r in read(tmp_path / "out" / "results.jsonl") if r["kind"] == "note"]
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if open(f"/proc/{pid}/stat").read().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it goes on")


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, {"kind": "note", "part": "a", "text": "first"})
    with path.open("a") as file:
        file.write('{"kind": "time", "part": "a", "microsec')
    append(path, {"kind": "note", "part": "b", "text": "second"})
    assert [record["text"] for record in read(path)] == ["first", "second"]
    assert json.loads(path.read_text().splitlines()[-1])["part"] == "b"


def test_the_driver_needs_nothing_but_python(tmp_path):
    """It runs where torch cannot be imported: a broken CUDA must not take the table along."""
    code = (
        f"import runpy, sys; runpy.run_path({str(ROOT / 'evals' / 'suite_driver.py')!r}); print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout == "False\n", found.stderr
