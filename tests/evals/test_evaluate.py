"""`quantkit.evaluate`: folders and models in memory give the same figures, and bad input is one error."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit.core.errors import CheckpointError, QuantkitError

SHORT = {"data": "stdlib", "seqlen": 64, "num_samples": 2, "device": "cpu"}


def test_a_folder_and_its_model_in_memory_are_measured_alike(reference):
    folder = quantkit.evaluate(reference, baseline=reference, **SHORT)
    assert folder.quality.kl == pytest.approx(0, abs=1e-6) and folder.quality.windows == 2
    model = AutoModelForCausalLM.from_pretrained(reference, dtype="float32")
    memory = quantkit.evaluate(model, tokenizer=AutoTokenizer.from_pretrained(reference), **SHORT)
    assert memory.quality.nll == pytest.approx(folder.quality.nll, rel=1e-6)
    assert json.loads(json.dumps(folder.to_json()))["bos"] is False


def test_bad_input_is_one_error(reference, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(reference)
    with pytest.raises(QuantkitError, match="give `tokenizer`"):
        quantkit.evaluate(model, **SHORT)
    shutil.copytree(reference, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        quantkit.evaluate(tmp_path / "broken", **SHORT)
