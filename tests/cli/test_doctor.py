"""`quantkit doctor`: what it says of a machine, with a GPU and without, and its exit code."""

import json

import pytest
import torch
from typer.testing import CliRunner

from quantkit.cli.main import app
from quantkit.evals import doctor
from quantkit.formats.int_group import IntGroupWeight
from quantkit.kernels import launching, self_check, viterbi

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(doctor, "_SECONDS", 0)
    monkeypatch.setattr(doctor, "_SHAPE", {"cpu": (72, 136)})


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", "--device", "cpu", *arguments])


def test_a_sound_machine_without_a_gpu():
    result = run("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["faults"] == [] and found["families"] == []
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["optional"]) == {"numba", "datasets", "matplotlib", "peft", "gguf"}
    assert found["memory"]["ram"]["total"] > found["memory"]["ram"]["free"] > 0
    assert {product["name"] for product in found["products"]} == {*doctor._WEIGHTS, "search for trellis codes"}
    for product in found["products"]:
        assert product["error"] < 1e-4
        assert product["seconds"] > 0


def test_what_is_printed(monkeypatch):
    versions = {name: doctor._installed(name) for name in doctor.REQUIRED} | {"numba": None}
    monkeypatch.setattr(doctor, "_installed", versions.get)
    monkeypatch.setattr(doctor, "_WEIGHTS", {"integers, 4 bits": doctor._int_group(4)})
    result = run()
    assert result.exit_code == 0, result.output
    for text in ("versions   quantkit", "none that torch sees", "integers, 4 bits", "x dense", "all is sound"):
        assert text in result.stdout
    assert "pip install 'quantkit-llm[cpu]'" in result.stdout


def lies(weight, x, *others):
    return x @ weight.dequantize().T + 0.5


def fails(weight, x, *others):
    raise RuntimeError("out of resource: [shared] memory\nRequired: 300000")


def no_number(weight, x, *others):
    return (x @ weight.dequantize().T).fill_(float("nan"))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [(lies, "off by 0."), (fails, "RuntimeError: out of resource: [shared] memory"), (no_number, "off by nan")],
)
def test_a_wrong_product_is_named_and_exits_with_1(wrong, told, monkeypatch):
    monkeypatch.setattr(IntGroupWeight, "matmul", wrong)
    result = run("--json")
    assert result.exit_code == 1
    faults = json.loads(result.stdout)["faults"]
    assert len(faults) == 5, "four widths, and the rotated one"
    assert all(fault.startswith("integers, ") and told in fault for fault in faults)
    printed = run()
    assert printed.exit_code == 1
    assert told in printed.stdout and "5 faults" in printed.stdout


def test_a_search_that_errs(monkeypatch):
    monkeypatch.setattr(viterbi, "search", lambda x, values, bits: torch.zeros(x.shape, dtype=torch.int32))
    assert "off by" in doctor.check_search(CPU).fault


@pytest.mark.parametrize(
    ("verdict", "code"), [("right", 0), ("RuntimeError: no kernel image", 1), (None, 1)], ids=["right", "wrong", "full"]
)
def test_kernels_are_checked_anew_where_there_are_any(verdict, code, monkeypatch):
    kept = {}
    monkeypatch.setattr(doctor, "kernels_on", lambda device: (True, "Triton kernels"))
    monkeypatch.setattr(self_check, "check", lambda family, device: verdict if family == "rotate" else "right")
    monkeypatch.setattr(self_check, "keep", lambda family, device, found: kept.update({family: found}))
    result = run()
    assert result.exit_code == code
    assert "int_group_matmul" in result.stdout and "kv_attention" in result.stdout
    assert kept.get("rotate") == verdict and kept["viterbi_search"] == "right"
    if code:
        assert (verdict or "memory is full") in result.stdout


@pytest.mark.parametrize(
    ("device", "capability", "triton", "runs", "why"),
    [
        (CPU, 0, "3.7", False, "no GPU"),
        (GPU, 90, "3.7", True, "all 11 families"),
        (GPU, 80, "3.7", True, "8.0"),
        (GPU, 75, "3.7", False, "here is 7.5"),
        (GPU, 90, None, False, "Triton is not installed"),
    ],
)
def test_which_kernels_there_are(device, capability, triton, runs, why, monkeypatch):
    monkeypatch.setattr(launching, "properties", lambda device: (capability, 132, "A GPU"))
    monkeypatch.setattr(doctor, "_installed", lambda package: triton)
    found, told = doctor.kernels_on(device)
    assert found == runs
    assert why in told


def test_disks_that_are_not_there_yet(tmp_path):
    assert doctor._free_disk(tmp_path / "none" / "yet") == doctor._free_disk(tmp_path) > 0
