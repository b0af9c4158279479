"""Several processes share a run and end where one alone ends."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import RTN

from ..helpers.processes import run


def test_two_processes_take_the_steps_of_one(short_reference, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(short_reference, dtype=torch.float32)
    quantkit.quantize(model, tokenizer, method=RTN(2))
    model.save_pretrained(tmp_path / "packed")
    script = Path(__file__).with_name("shared_run.py")
    (alone,) = run(script, 1, tmp_path / "one", tmp_path / "packed", short_reference)
    shared = run(script, 2, tmp_path / "two", tmp_path / "packed", short_reference, launched=True)
    assert [record["processes"] for record in shared] == [2, 2]
    assert shared[0] == shared[1], "both hold the same model"
    assert [entry["step"] for entry in alone["history"]] == [0, 2, 4]
    for ours, theirs in zip(shared[0]["history"], alone["history"], strict=True):
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-3)
        if ours["step"]:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert shared[0]["history"][-1]["kl"] < shared[0]["history"][0]["kl"]
