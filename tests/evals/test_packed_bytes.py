"""The guard of packed bytes: its quick part, and that it sees what it is there for."""

import json

import torch
from safetensors.torch import load_file, save_file

from quantkit.evals.benchmarks.packed_bytes import differences, digest, machine

from ..helpers.forks import server


def test_the_quick_part_writes_the_same_bytes_twice(tmp_path):
    """Methods, a killed run and a model in memory; another process finds the methods unchanged."""
    runs = ("rtn|gptq|interrupted|loaded", "--json", "4 cases, 0"), ("rtn|gptq", "--against", "2 cases, 2")
    for cases, option, found in runs:
        arguments = ["--quick", "--only", cases, option, tmp_path / "hashes.json"]
        done = server().run("quantkit.evals.benchmarks.packed_bytes", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{found} compared, 0 wrong" in done.stdout
    assert json.loads((tmp_path / "hashes.json").read_text())["machine"] == machine()


def test_any_change_is_seen(tmp_path):
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization_config": {"layers": {"a": {}}}}')
    tensors = {"a.codes": torch.arange(8, dtype=torch.int32), "norm.weight": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors")
    whole, packed = digest(folder), digest(folder, packed=True)
    for changed in (
        tensors | {"a.codes": torch.arange(8, dtype=torch.int32) + torch.eye(8, dtype=torch.int32)[3]},
        tensors | {"a.codes": torch.arange(8, dtype=torch.int32).view(2, 4)},
        tensors | {"a.codes": torch.arange(8, dtype=torch.int16)},
    ):
        save_file(changed, folder / "model.safetensors")
        assert digest(folder) != whole and digest(folder, packed=True) != packed
    save_file(tensors | {"norm.weight": torch.zeros(3)}, folder / "model.safetensors")
    assert digest(folder) != whole and digest(folder, packed=True) == packed
    assert len(load_file(folder / "model.safetensors")) == 2


def test_differences_are_named():
    found = {"m: gptq": ["1", "2"], "m: interrupted": ["1", "3"], "m: rtn": ["5", "5"]}
    assert differences(found, {"m: rtn": ["5", "6"]}) == [
        "m: rtn: other bytes than recorded", "m: interrupted: other bytes than 'gptq'"
    ]  # fmt: skip
