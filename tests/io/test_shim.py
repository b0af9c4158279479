"""Packed folders in programs that did not import quantkit: loaded right where their code is trusted, else refused."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import quantkit
from quantkit.core.constants import GUARD
from quantkit.io import shim
from quantkit.models.linear import QuantizedLinear

from ..helpers.vision import SEEING

PROGRAM = """
import sys, torch, transformers
model = transformers.{auto}.from_pretrained(sys.argv[1], dtype=torch.float32{trusting})
assert ("quantkit" in sys.modules) == {loaded}
torch.save(model(torch.arange(10, 40).view(2, 15)).logits, sys.argv[2])
model.save_pretrained(sys.argv[2] + ".saved")
"""


def run(folder, target, tmp_path, auto="AutoModelForCausalLM", trusting=""):
    """What a program of its own says that loads the folder and saves the model's logits."""
    code = PROGRAM.format(auto=auto, trusting=trusting, loaded=bool(trusting))
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    environment |= {"PYTHONPATH": str(shim.__file__).removesuffix("/quantkit/io/shim.py")}
    asked = [sys.executable, "-c", code, str(folder), str(target)]
    return subprocess.run(asked, capture_output=True, text=True, env=environment, cwd=tmp_path)


@torch.no_grad()
def logits(model):
    return model(torch.arange(10, 40).view(2, 15)).logits


@pytest.mark.parametrize("family", ["llama_small", "qwen3_moe", "gpt2_small"])
def test_without_an_import(family, model_folder, tmp_path):
    packed = tmp_path / "packed"
    quantkit.quantize(model_folder(family), output=packed, method="rtn", bits=4, group_size=32)
    assert quantkit.io.checkpoint.verify(packed) > 10
    if family == "llama_small":
        refused = run(packed, tmp_path / "no", tmp_path)
        assert refused.returncode and f"{packed.name}/{GUARD}" in refused.stderr.splitlines()[-1], refused.stderr

    done = run(packed, tmp_path / "logits", tmp_path, trusting=", trust_remote_code=True")
    assert done.returncode == 0, done.stderr
    expected = logits(quantkit.load(packed, dtype=torch.float32).eval())
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=1e-4, atol=1e-5)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "logits.saved", dtype=torch.float32)
    assert any(isinstance(module, QuantizedLinear) for module in again.modules())
    assert (tmp_path / "logits.saved" / f"{shim.SHIM}.py").exists(), "transformers writes the code along"


def test_the_plain_path_is_as_it_was(model_folder, tmp_path):
    packed = tmp_path / "packed"
    quantkit.quantize(model_folder("llama_small"), output=packed, method="rtn", bits=4, group_size=32)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    assert type(model).__module__.startswith("transformers.models.")
    assert torch.equal(logits(model), logits(quantkit.load(packed, dtype=torch.float32)))
    with quantkit.trust_remote_code():
        assert type(quantkit.load(packed)) is type(model)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["transformers_weights"] == GUARD and (tmp_path / "saved" / f"{shim.SHIM}.py").exists()
    assert torch.equal(logits(quantkit.load(tmp_path / "saved", dtype=torch.float32)), logits(model))


def test_what_is_saved_from_memory(model_folder, tmp_path):
    """`save_pretrained` of a model that was packed in memory, once and again, and of the dense one made of it."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama_small"), dtype=torch.float32)
    quantkit.quantize(model, method="rtn", bits=4, group_size=32)
    kind, expected = type(model.config), logits(model)
    for folder in (tmp_path / "once", tmp_path / "again"):
        model.save_pretrained(folder)
        assert type(model.config) is kind and not hasattr(model.config, "auto_map")
        assert json.loads((folder / "config.json").read_text())["transformers_weights"] == GUARD
    done = run(folder, tmp_path / "logits", tmp_path, trusting=", trust_remote_code=True")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=1e-4, atol=1e-5)
    saved = json.loads((tmp_path / "logits.saved" / "config.json").read_text())
    assert saved["transformers_weights"] == GUARD and saved["auto_map"], "by a program that trusted the code, too"
    model.dequantize()  # whose config has the type as a name by now
    model.save_pretrained(tmp_path / "dense")
    assert (
        not {"transformers_weights", "auto_map"} & json.loads((tmp_path / "dense" / "config.json").read_text()).keys()
    )
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-5)


def test_models_that_see(tmp_path, tokenizer):
    folder, packed = tmp_path / "model", tmp_path / "packed"
    family = SEEING["llava"]
    AutoModelForImageTextToText.from_config(family.config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    quantkit.quantize(folder, output=packed, method="rtn", bits=4, group_size=32)
    config = json.loads((packed / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"] == f"{shim.SHIM}.Model"
    trusting = ", trust_remote_code=True"
    done = run(packed, tmp_path / "logits", tmp_path, auto="AutoModelForImageTextToText", trusting=trusting)
    assert done.returncode == 0, done.stderr
    expected = logits(quantkit.load(packed, dtype=torch.float32).eval())
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=1e-4, atol=1e-5)
