"""The kernel evals without a GPU: the build for real, the speed run on a CPU's clock."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from quantkit.evals import kernel_build, kernel_speed, kv_speed

from ..conftest import ROOT

RECORDED = sorted((ROOT / "evals" / "results").glob("kernel-build-triton-*.json"))


def test_the_kernels_build_for_all_gpus_without_spills(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "quantkit.evals.kernel_build", "--quick", "--against", str(RECORDED[-1])]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "spills: 0"
    counts = {"decode": 16, "pyramid": 10, "codebook": 31, "trellis": 14, "rotate": 5, "viterbi": 8}
    for kernel, count in counts.items():
        assert sum(line.startswith(kernel) for line in result.stdout.splitlines()) == count


def test_the_interpreter_cannot_build():
    result = subprocess.run(
        [sys.executable, "-m", "quantkit.evals.kernel_build", "--quick"],
        capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert result.returncode == 1
    assert "TRITON_INTERPRET=1 is set" in result.stderr


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


@pytest.mark.parametrize("name", ["kernel_speed", "kv_speed"])
def test_speed_is_refused_without_a_gpu(tmp_path, name):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", f"quantkit.evals.{name}", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "there is none here" in result.stderr
    assert not (tmp_path / "out").exists()


def clock(calls):
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)


def test_launches_are_timed_beside_torch():
    kinds = [kernel_speed.integers(3), kernel_speed.codebooks(4, 8)]
    timings = list(kernel_speed.measure(torch.device("cpu"), [(128, 256)], [1, 8], kinds, clock, 1e10))
    assert [(t.what, t.M) for t in timings] == [
        (what, M) for what in ("torch bf16", "int3 g128", "codebook v4 8 bits") for M in (1, 8)
    ]
    base = {t.M: t.microseconds for t in timings if t.what == "torch bf16"}
    for timing in timings:
        assert timing.speed_up == pytest.approx(base[timing.M] / timing.microseconds)
        assert timing.bandwidth_share == pytest.approx(timing.gigabytes_per_second / 10)
    lines = kernel_speed.table(timings).splitlines()
    assert len(lines) == 5
    assert lines[0] == "| N x K | kernel | M=1 | M=8 |"
    json.dumps([vars(timing) for timing in timings])


def test_wrong_results_are_found(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(kernel_speed, "TOLERANCE", {torch.float16: 2e-3})
    original = kernel_speed.product

    def wrong(x, weight, *extra):
        y = original(x, weight, *extra)
        if len(x) == 16:
            y[3, 5] += 100
        return y

    monkeypatch.setattr(kernel_speed, "product", wrong)
    first = next(kernel_speed.faults(device))
    assert "M=16: relative error" in first


def test_what_is_checked_is_right_by_the_specification(monkeypatch):
    """All kinds, on the CPU's reference: a fault that is found on a GPU is then the kernel's."""
    monkeypatch.setattr(kernel_speed, "_CHECKED", [(kind, 77, 256) for kind, _, _ in kernel_speed._CHECKED[::2]])
    assert list(kernel_speed.faults(torch.device("cpu"))) == []


def test_the_deadline_ends_a_run():
    timings = kernel_speed.measure(
        torch.device("cpu"), [(128, 256)], [1], [kernel_speed.integers(3)], clock, 1e10, time.monotonic() - 1
    )
    assert [t.what for t in timings] == ["torch bf16"]


FORMS = [kv_speed.Form(3), kv_speed.Form(3, 4), kv_speed.Form(3, 4, 2)]


def test_attention_on_packed_keys_is_checked(monkeypatch):
    device, cases = torch.device("cpu"), [(64, 4, 1, 192), (128, 1, 5, 128)]
    assert list(kv_speed.faults(device, [*FORMS, kv_speed.Form(8)], cases)) == []
    original = kv_speed.packed_attention
    monkeypatch.setattr(kv_speed, "packed_attention", lambda *given: 1.01 * original(*given))
    assert "3 bits, heads of 64, 4 x 1 queries: relative error" in next(kv_speed.faults(device, FORMS, cases))


def test_attention_is_timed_beside_torch():
    small = {"heads": 2, "size": 64, "siblings": 2}
    timings = list(kv_speed.measure(torch.device("cpu"), [128], [1], FORMS, lambda calls: clock(calls[:1]), **small))
    names = ["torch bf16", "split-KV bf16", "3 bits", "3 bits, rank 4", "3 bits, rank 4, 2 outliers"]
    assert [timing.what for timing in timings] == names
    best = min(timing.microseconds for timing in timings[:2])
    assert all(timing.speed_up == pytest.approx(best / timing.microseconds) for timing in timings)
    bits = [timing.true_bits for timing in timings[2:]]
    assert bits[0] == 3.5 and bits == sorted(bits)
    assert timings[3].over_codes == pytest.approx(timings[3].microseconds / timings[2].microseconds)
    lines = kv_speed.table(timings).splitlines()
    assert len(lines) == 7 and lines[0] == "| cache | true bits | 0.125k, batch 1 |"


def test_the_attention_to_compare_with_is_right():
    q, k, v = torch.randn(1, 2, 4, 64), torch.randn(1, 2, 600, 64), torch.randn(1, 2, 600, 64)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert (kv_speed.plain_attention(q, k, v, 32, 1) - wanted).norm() < 2e-3 * wanted.norm()
