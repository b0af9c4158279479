"""The kernel evals without a GPU: the build for real, checks and timings on a CPU."""

import dataclasses
import math
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from quantkit.evals import gpu_suite, kernel_build, kernel_check, kv_speed, suite_deep, suite_experts, suite_models
from quantkit.evals.absent_gpu import GPU, absent_gpu
from quantkit.evals.kernel_kinds import Kind, codebooks, integers, rotated, trellises
from quantkit.evals.suite_driver import RESULTS, read, table
from quantkit.evals.suite_groups import Report, Run, host, products, rotations, run_groups, searches
from quantkit.models import stacking

from ..conftest import ROOT

RECORDED = sorted((ROOT / "evals" / "results").glob("kernel-build-triton-*.json"))


def test_the_kernels_build_for_all_gpus_without_spills(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "quantkit.evals.kernel_build", "--quick", "--against", str(RECORDED[-1])]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "spills: 0"
    built = [line for line in result.stdout.splitlines() if " sm_" in line]
    counts = {"decode": 7, "pyramid": 7, "codebook": 7, "trellis": 8, "rotate": 5, "kv attention": 5, "viterbi": 5}
    for kernel, count in counts.items():
        own = [line for line in built if line.startswith(kernel)]
        assert len(own) == count
        assert {re.search(r" sm_(\d+)", line)[1] for line in own} == {"80", "90", "100", "120"}


def refused(monkeypatch, program, *arguments):
    """What a program that exits with code 1 says, in this process, which is quicker."""
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert isinstance(ended.value.code, str)
    return ended.value.code


def test_the_interpreter_cannot_build(monkeypatch):
    assert "TRITON_INTERPRET=1 is set" in refused(monkeypatch, kernel_build, "--quick")


def test_bars_and_regressions_are_told():
    build = next(kernel_build.builds([90], quick=True))
    good = kernel_build.Figures(build.name, 80, 0, 20000, 2.5)
    assert kernel_build.faults(build, good) == []
    for change, message in [({"spills": 8}, "8 bytes spilled"), ({"shared": 10**6}, "shared memory")]:
        (line,) = kernel_build.faults(build, kernel_build.Figures(**(vars(good) | change)))
        assert message in line
    slow = kernel_build.Figures(**(vars(good) | {"instructions_per_weight": 9.0}))
    assert "the bar is 3.3" in kernel_build.faults(build, slow)[0]
    recorded = {"triton": "1.2.3", "builds": [vars(good)]}
    assert kernel_build.regressions(recorded, [good], "1.2.3") == []
    assert "2.5 were recorded" in kernel_build.regressions(recorded, [slow], "1.2.3")[0]
    assert kernel_build.regressions(recorded, [slow], "1.2.4") == []


def test_the_inner_loop_is_the_one_that_multiplies():
    listing = """
        /*0000*/                   MOV R1, R2 ;
    .L_x_0:
        /*0010*/                   LDS R1, [R2] ;
        /*0020*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
    .L_x_1:
        /*0040*/                   FADD R1, R2, R3 ;
        /*0050*/                   FADD R1, R2, R3 ;
        /*0060*/                   FADD R1, R2, R3 ;
        /*0070*/              @!P1 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
    """
    assert [text.split()[0] for text in kernel_build.inner_loop(listing)] == ["LDS", "HMMA.16816.F32", "BRA"]


@pytest.mark.parametrize("program", [gpu_suite, kernel_check], ids=["gpu_suite", "kernel_check"])
def test_speed_is_refused_without_a_gpu(tmp_path, program, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "there is none here" in refused(monkeypatch, program, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_absent_gpu_needs_the_compiler():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set"), absent_gpu(GPU()):
        pass


class Eager:
    """Calls in the place of a graph's replays."""

    def __init__(self, calls):
        self.calls, self.results = calls, [call() for call in calls]

    def replay(self):
        for call, result in zip(self.calls, self.results, strict=True):
            result.copy_(call())

    def seconds(self, repeats=20):
        start = time.perf_counter()
        for call in self.calls:
            call()
        return (time.perf_counter() - start) / len(self.calls)


@pytest.fixture
def cpu_run(tmp_path):
    report = Report(tmp_path / RESULTS, "part")
    run = Run(torch.device("cpu"), report, replays=Eager, bandwidth=1e10)
    run.distinct = lambda nbytes, least=8: 3
    run.records = lambda kind: [record for record in read(tmp_path / RESULTS) if record["kind"] == kind]
    return run


def test_launches_are_timed_beside_torch(cpu_run):
    run_groups(products([integers(3), codebooks(4, 8)], [(128, 256)], (1, 8)), cpu_run)
    times = cpu_run.records("time")
    assert [(t["what"], t["column"]) for t in times] == [
        (what, column) for what in ("torch bf16", "int3 g128", "codebook v4 8 bits") for column in ("M=1", "M=8")
    ]
    base = {t["column"]: t["microseconds"] for t in times if t["what"] == "torch bf16"}
    for time_ in times:
        assert time_["speed_up"] == pytest.approx(base[time_["column"]] / time_["microseconds"], rel=1e-3)
        assert 0 < time_["bandwidth_share"] < 10
    checks = cpu_run.records("check")
    assert len(checks) == 4 and all(check["ok"] for check in checks)
    text = table([*cpu_run.records("begin"), *checks, *times])
    assert "4 launches checked, 0 wrong" in text
    assert [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| 128 x 256")] == [
        "torch bf16", "int3 g128", "codebook v4 8 bits",
    ]  # fmt: skip


def broken(change):
    """int4 with a fault."""

    def make(N, K, device):
        layer = integers(4).make(N, K, device)
        return dataclasses.replace(layer, linear=lambda x: change(layer.linear(x)))

    return Kind("broken", make, "int")


def raised(y):
    raise ValueError("no such launch")


FAULTS = {
    "wrong": (lambda y: y.index_fill(0, torch.tensor([0]), 7.0), "relative error"),
    "not a number": (lambda y: y * math.nan, "relative error nan"),
    "never the same": (lambda y: y * (1 + 0.05 * torch.rand(())), "two runs differ"),
    "late": (lambda y: y + (len(COUNTED.append(0) or COUNTED) > 7), "replay gives another result"),
    "raising": (raised, "ValueError: no such launch"),
}
COUNTED = []


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_not_timed(name, cpu_run):
    COUNTED.clear()
    change, message = FAULTS[name]
    run_groups(products([broken(change), integers(4)], [(128, 256)], (1,)), cpu_run)
    wrong, right = cpu_run.records("check")
    assert not wrong["ok"] and message in wrong["detail"] and right["ok"]
    assert [t["what"] for t in cpu_run.records("time")] == ["torch bf16", "int4 g128"]


def test_groups_that_an_earlier_attempt_began_are_left_out(cpu_run, tmp_path):
    todo = products([integers(3), integers(4)], [(128, 256)], (1,))
    cpu_run.report.begin("product", "128 x 256", "int3 g128")
    cpu_run.report = Report(tmp_path / RESULTS, "part")
    run_groups(todo, cpu_run)
    assert [check["what"] for check in cpu_run.records("check")] == ["int4 g128"]


def test_the_deadline_ends_a_part(cpu_run):
    run_groups(products([integers(3)], [(128, 256)], (1,)), cpu_run, seconds=-1)
    assert not cpu_run.records("check") and "were not enough" in cpu_run.records("note")[0]["text"]


def test_a_group_that_hangs_ends_its_process(tmp_path):
    code = f"""
import time, torch
from pathlib import Path
from quantkit.evals import suite_groups
from quantkit.evals.suite_groups import Group, Report, Run
suite_groups.GROUP_SECONDS = 1
run = Run(torch.device("cpu"), Report(Path({str(tmp_path)!r}) / "results.jsonl", "part"), timing=False)
Group("product", "here", "hanging", None, lambda run: time.sleep(60)).run(run)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -14
    assert [record["kind"] for record in read(tmp_path / RESULTS)] == ["begin"]


def test_other_groups_run(cpu_run, monkeypatch):
    monkeypatch.setattr(suite_models, "PROMPT", 4)
    monkeypatch.setattr(suite_models, "NEW", 4)
    todo = [
        *rotations([96], (1, 5)), *products([rotated(trellises(2))], [(128, 256)], (1,)),
        *host([integers(4)], size=128, linears=3), *searches([(8, 2)], size=64), *suite_models.decoding(),
    ]  # fmt: skip
    run_groups(todo, cpu_run)
    assert [check["detail"] for check in cpu_run.records("check") if not check["ok"]] == []
    timed = {t["what"] for t in cpu_run.records("time")}
    assert timed >= {"rotation", "rotated trellis K=2", "int4 g128", "trellis K=2 L=8", "dense bf16", "trellis K=2"}


def test_experts_are_checked_and_timed_beside_torch(cpu_run, monkeypatch):
    monkeypatch.setattr(suite_experts, "TOKENS", (1, 3))
    run_groups(suite_experts.groups([integers(3), trellises(2)], (64, 256), 8), cpu_run)
    checks = cpu_run.records("check")
    assert len(checks) == 4 and all(check["ok"] for check in checks)
    assert all(record["speed_up"] > 0 for record in cpu_run.records("time") if not record.get("baseline"))
    original = stacking.Stack.chosen
    monkeypatch.setattr(stacking.Stack, "chosen", lambda *given: 1.1 * original(*given))
    run_groups(suite_experts.groups([integers(4)], (64, 256), 8), cpu_run)
    assert not cpu_run.records("check")[-1]["ok"]


def test_launch_sizes_are_searched():
    int4 = suite_models.sweep_integers(4, [(4096, 4096)])
    trellis = suite_models.sweep_trellis(2, [(4096, 4096)])
    assert len({group.what for group in int4}) == len(int4) == 40
    assert "int4 g128: block_n 128, split 8, stages 4" in {group.what for group in int4}
    assert "trellis K=2: block_n 128, split 8, stages 1" in {group.what for group in trellis}


def test_what_is_checked_is_right_by_the_specification(monkeypatch, cpu_run):
    """All kinds, on the CPU's reference: a fault that is found on a GPU is then the kernel's."""
    monkeypatch.setattr(suite_deep, "CHECKED", [(kind, 77, 512) for kind, _, _ in suite_deep.CHECKED[::2]])
    monkeypatch.setattr(suite_deep, "ROWS", (1, 31))
    monkeypatch.setattr(suite_deep, "WIDTHS", (64, 96))
    cpu_run.timing = False
    for family, groups in suite_deep.FAMILIES.items():
        if family != "attention":
            run_groups(groups(), cpu_run)
    checks = cpu_run.records("check")
    assert len(checks) > 100
    assert [(check["what"], check["place"], check["detail"]) for check in checks if not check["ok"]] == []


FORMS = [kv_speed.Form(3), kv_speed.Form(3, 4), kv_speed.Form(3, 4, 2)]


def test_attention_on_packed_keys_is_checked(monkeypatch, cpu_run):
    cases = [(64, 4, 1, 192), (128, 1, 5, 128)]
    cpu_run.timing = False
    run_groups(kv_speed.deep_groups(FORMS[::2], cases[:1]), cpu_run)
    run_groups(kv_speed.deep_groups([FORMS[1], kv_speed.Form(8)], cases[1:]), cpu_run)
    checks = cpu_run.records("check")
    assert len(checks) == 4 and all(check["ok"] for check in checks)
    original = kv_speed.packed_attention
    monkeypatch.setattr(kv_speed, "packed_attention", lambda *given: 1.01 * original(*given))
    run_groups(kv_speed.deep_groups([kv_speed.Form(2)], cases[:1]), cpu_run)
    assert not cpu_run.records("check")[-1]["ok"]


def test_outliers_lie_in_all_channels():
    for size in (64, 128, 256):
        packed = kv_speed.random_packed(kv_speed.Form(4, 0, 2), 1, 1, 4096, size, torch.device("cpu"))
        assert packed.places.dtype == torch.uint8 and int(packed.places.max()) == size - 1


def test_attention_is_timed_beside_torch(cpu_run, monkeypatch):
    monkeypatch.setattr(kv_speed, "LIMIT", 2e-2)  # the interpreter's bf16
    small = {"heads": 2, "size": 64, "siblings": 2}
    cpu_run.distinct = lambda nbytes, least=8: 1
    run_groups(kv_speed.groups([(128, 1)], FORMS, **small), cpu_run)
    times = cpu_run.records("time")
    names = ["torch bf16", "split-KV bf16", "3 bits", "3 bits, rank 4", "3 bits, rank 4, 2 outliers"]
    assert [t["what"] for t in times] == names
    best = min(t["microseconds"] for t in times[:2])
    assert all(t["speed_up"] == pytest.approx(best / t["microseconds"], rel=1e-3) for t in times)
    assert [note["text"].split(":")[0] for note in cpu_run.records("note")] == [f"{n}, 128 tokens" for n in names[3:]]


def test_the_attention_to_compare_with_is_right():
    q, k, v = torch.randn(1, 2, 4, 64), torch.randn(1, 2, 600, 64), torch.randn(1, 2, 600, 64)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert (kv_speed.plain_attention(q, k, v, 32, 1) - wanted).norm() < 2e-3 * wanted.norm()


TUNED = """
import torch
from quantkit.evals import autotune
from quantkit.evals.absent_gpu import GPU, absent_gpu
from quantkit.evals.kernel_kinds import integers
from quantkit.kernels import int_group_matmul

autotune.seconds_per_call = lambda calls, repeats: calls[0]() is None
autotune.copies = lambda nbytes, most: 1
autotune.tune = lambda file, key, candidates, seconds: (
    print("tuned", key), seconds(candidates[0]) if key.split()[2] == "m8" else None
)
with absent_gpu(GPU(), lambda compiled: print("compiled", compiled.kernel)) as device:
    kinds = integers(4), integers(8, 32)
    model = torch.nn.Sequential(*(kind.layer(128, 256, device).linear for kind in kinds))
    model.dtype = torch.bfloat16
    assert autotune.autotune(model) == 6
    int_group_matmul.chosen = lambda device, key, default: print("asked", key) or default
    for layer in model:
        layer.used.matmul(torch.empty(1, 256, device=device, dtype=torch.bfloat16))
"""


def test_launches_are_tuned_in_the_form_that_a_gpu_holds():
    """Under the very names that products then ask for."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", TUNED], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    tuned, asked = ({name for word, name in lines if word == wanted} for wanted in ("tuned", "asked"))
    form = "int_group_matmul decode {} n128 k256 {} torch.bfloat16"
    assert tuned == {form.format(m, f) for m in ("m8", "m16", "m32") for f in ("b4 g128 arranged", "b8 g32")}
    assert asked == {form.format("m8", f) for f in ("b4 g128 arranged", "b8 g32")}
    assert ["compiled", "decode_kernel"] in lines
