"""Several processes share a run and end where one alone ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit import RTN


def run(processes, packed, teacher, output):
    output.mkdir()
    script = Path(__file__).with_name("shared_run.py")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, str(script), str(packed), str(teacher), str(output)]
    root = str(Path(quantkit.__file__).parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((output / f"{number}.json").read_text()) for number in range(processes)]


def test_two_processes_take_the_steps_of_one(reference, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(reference)
    quantkit.quantize(model, tokenizer, method=RTN(2))
    model.save_pretrained(tmp_path / "packed")
    (alone,) = run(1, tmp_path / "packed", reference, tmp_path / "one")
    shared = run(2, tmp_path / "packed", reference, tmp_path / "two")
    assert [record["processes"] for record in shared] == [2, 2]
    assert shared[0] == shared[1], "both hold the same model"
    assert [entry["step"] for entry in alone["history"]] == [0, 2, 4]
    for ours, theirs in zip(shared[0]["history"], alone["history"], strict=True):
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-3)
        if ours["step"]:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert shared[0]["history"][-1]["kl"] < shared[0]["history"][0]["kl"]
