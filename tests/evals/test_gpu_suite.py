"""The driver of the GPU suite with parts that fail in all ways that a GPU knows, and its builds, without a GPU."""

import contextlib
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest

from quantkit.evals import gpu_suite, suite_builds, suite_driver
from quantkit.evals.absent_gpu import GPU, Compiled
from quantkit.evals.suite_builds import Built
from quantkit.evals.suite_driver import Part, append, read, run
from quantkit.evals.suite_groups import Group
from quantkit.evals.suite_parts import PARTS, Contents

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
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
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


BARE = """
import importlib.metadata, runpy, sys

ABSENT = {
    "auto_round", "compressed_tensors", "datasets", "gemlite", "hqq", "humming", "hypothesis", "llmcompressor",
    "matplotlib", "peft", "pytest", "rich", "torchao", "typer",
}

class Bare:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

def distribution(name, found=importlib.metadata.Distribution.from_name):
    if name.startswith("quantkit"):
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

sys.meta_path[:] = [Bare(finder) for finder in sys.meta_path]
importlib.metadata.Distribution.from_name = staticmethod(distribution)
sys.argv = ["gpu_suite", "--plan", "--jobs", "16", "--minutes", "9"]
runpy.run_module("quantkit.evals.gpu_suite", run_name="__main__")
import quantkit.evals.kernel_check
assert not ABSENT & set(sys.modules)
"""


@pytest.fixture
def bare():
    """As on a machine that has the source folder and nothing of ours installed."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}


def test_the_plan_needs_only_what_a_bare_gpu_machine_has(bare):
    found = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, env=bare, cwd=ROOT)
    assert found.returncode == 0, found.stderr[-3000:]
    lines = found.stdout.splitlines()
    order = [line.split("  ")[-1] for line in lines if re.match(r" +\d+ s ", line)]
    assert order[:2] == ["about", "compile"] and order[2].startswith("check int") and "side by side" in order[2]
    assert [line for line in order if line.startswith("int4")] and "sweep int4 (80 groups)" in order[-1]
    seconds = int(re.search(r"(\d+) s in all, of 540 s", found.stdout)[1])
    assert 200 < seconds < 540, "all should fit, and a plan is not nothing"
    assert "cannot be imported, so not measured beside: humming, gemlite, torchao, hqq" in lines


def test_the_command_line_is_checked(bare):
    command = [sys.executable, "-m", "quantkit.evals.gpu_suite"]
    refused = subprocess.run([*command, "--only", "int5"], capture_output=True, text=True, env=bare)
    assert refused.returncode == 2 and "invalid choice: 'int5'" in refused.stderr
    short = subprocess.run([*command, "--plan", "--only", "int4", "host", "--minutes", "0.5"],
                           capture_output=True, text=True, env=bare)  # fmt: skip
    assert short.returncode == 0 and "check" not in short.stdout and "host (5 groups)  NOT IN TIME" in short.stdout


def test_parts_are_processes_with_limits(tmp_path):
    todo = {part.name: part for part in gpu_suite.parts(gpu_suite.SUITE, tmp_path, jobs=16)}
    assert list(todo)[:2] == ["about", "compile"] and "peers" not in todo
    assert list(todo).index("compile sweeps") == list(todo).index("sweep trellis") - 1
    for part in todo.values():
        assert part.expected < part.seconds < 600 and part.command[:2] == (sys.executable, "-m")
    assert {part.together for name, part in todo.items() if name.startswith("check")} == {"check"}
    assert {part.together for name, part in todo.items() if not name.startswith("check")} == {""}
    deep = gpu_suite.parts(["deep int"], tmp_path)
    assert [part.name for part in deep] == ["about", "compile", "deep int"]


def test_builds_of_a_part_compile_without_a_gpu(bare, tmp_path):
    """`host`: a layer of each of four kinds, one row of x."""
    environment = bare | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "XDG_CACHE_HOME": str(tmp_path / "verdicts")}
    results = tmp_path / "results.jsonl"
    append(results, {"kind": "about", "gpu": "some", "arch": 90, "multiprocessors": 114})
    command = [sys.executable, "-m", "quantkit.evals.suite_builds", "host", "--jobs", "1", "--results", str(results)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr[-3000:]
    assert Counter(line[43:].split()[0] for line in found.stdout.splitlines()[2:-1]) == {
        "decode_kernel": 2, "multiply_kernel": 1, "rotate_kernel": 1,
    }  # fmt: skip
    (note,) = [record["text"] for record in read(results) if record["kind"] == "note"]
    assert re.match(r"4 kernels in \d+ s by 1 processes; 4 were new, \d+ s of a processor; 0 bytes spilled", note)
    assert not (tmp_path / "verdicts").exists(), "what a GPU that is not there computes says nothing of one that is"


BUILDS = """
from triton import knobs

from quantkit.evals import kv_speed
from quantkit.evals.absent_gpu import GPU, absent_gpu

def hook(*, key, fn, **more):
    keys.add((fn.name, str(key)))
    return True  # not compiled

knobs.runtime.jit_cache_hook = hook
for form in (kv_speed.Form(4), kv_speed.Form(2, 4)):
    keys = set()
    for group in kv_speed.groups([(8192, 1), (16384, 1)], [form]):
        with absent_gpu(GPU()) as device:
            group.launch(device)
    print(len(keys))
"""


def test_a_cache_that_grows_takes_the_same_kernels(bare):
    found = subprocess.run([sys.executable, "-c", BUILDS], capture_output=True, text=True, env=bare)
    assert found.stdout.split() == ["2", "2"], found.stderr[-2000:]


def test_faults_of_builds_are_named():
    compiled = Compiled("decode_kernel", "key", 200000, 1.0, False, "")
    assert Built("int4", compiled, 100, 0, 200000, 1.0).faults(90) == []
    assert Built("int4", compiled, 100, 0, 200000, 1.0).faults(80) == [
        "int4: decode_kernel: 200000 bytes of shared memory; sm_80 has 166912"
    ]
    assert Built("int4", compiled, 255, 16, 0, 1.0).faults(90) == ["int4: decode_kernel: 16 bytes spilled"]


def test_a_kernel_that_does_not_compile_is_named(monkeypatch):
    def launch(device):
        raise ValueError("PassManager::run failed\nmore")

    broken = Group("product", "here", "broken", launch, lambda run: None)
    monkeypatch.setitem(PARTS, "int4", Contents(lambda: [broken]))
    monkeypatch.setattr(suite_builds, "absent_gpu", lambda gpu, told: contextlib.nullcontext("cuda"))
    (job,) = suite_builds.jobs_of(["int4"], GPU())
    assert suite_builds.compile_job(job) == ([], ["broken, here: ValueError: PassManager::run failed"])
