"""`quantkit advise`, and presets, as a user meets them."""

import json

import pytest

from quantkit.advice.advise import advise
from quantkit.io.shards import Shards

from ..helpers.stored import store
from .conftest import run

pytestmark = pytest.mark.slow


def test_shapes_alone_give_a_table_and_a_command(model_folder):
    folder = model_folder("llama_even")
    told = run("advise", folder, "--context", 64)
    assert told.returncode == 0, told.stderr
    for word in ("trellis 2", "gptq 8", "as it is", "a law's", "quantkit quantize"):
        assert word in told.stdout
    found = json.loads(run("advise", folder, "--context", 64, "--memory", "1KB", "--json").stdout)
    assert found["advised"] is None and not found["measured"]
    assert all(choice["fits"] is False for choice in found["choices"])
    sizes = [choice["nbytes"] for choice in found["choices"]]
    assert sizes[0] == max(sizes) and sizes[-1] == min(sizes)
    kl = {(choice["method"], choice["bits"]): choice["kl"] for choice in found["choices"]}
    assert kl["trellis", 2] > kl["trellis", 3] > kl["trellis", 4] and kl["gptq", 3] > kl["trellis", 3]


def test_sizes_are_those_of_the_run_and_the_command_is_one(model_folder, text_file, tmp_path):
    folder = model_folder("llama_even")
    found = json.loads(run("advise", folder, "--context", 64, "--memory", "10GB", "--json").stdout)
    assert found["advised"] == found["choices"][0]  # all fit, and the model as it is loses nothing
    choice = next(choice for choice in found["choices"] if (choice["method"], choice["bits"]) == ("gptq", 3))
    words = ["--calibration", text_file, "--num-samples", 2, "--seqlen", 64, "--no-check", "--json"]
    made = json.loads(run("quantize", folder, *choice["options"].split(), *words, "--output", tmp_path / "made").stdout)
    assert made["bytes_after"] == choice["nbytes"]
    assert made["bits_per_weight"] == pytest.approx(choice["bits_per_weight"])


def test_a_stored_form_is_as_large_as_its_files(model_folder, tmp_path):
    store(model_folder("llama_even"), "gptq-4", tmp_path / "stored")
    assert advise(tmp_path / "stored", context=64).choices[0].nbytes == Shards(tmp_path / "stored").nbytes()


def test_measured_advice_is_narrower(model_folder, text_file):
    words = ["--context", 64, "--calibration", text_file, "--measure-samples", 3, "--seqlen", 64, "--num-samples", 3]
    found = json.loads(run("advise", model_folder("llama_even"), "--measure", *words, "--json").stdout)
    assert found["measured"]
    packed = found["choices"][1:]
    assert all(choice["kl_high"] < 4 * choice["kl_low"] for choice in packed)
    kl = {(choice["method"], choice["bits"]): choice["kl"] for choice in packed}
    assert kl["trellis", 2] > kl["trellis", 3] > kl["trellis", 4] > 0 and kl["gptq", 3] > 4 * kl["gptq", 8]


@pytest.mark.parametrize(("words", "said"), [(["--tokens", "many"], "15e12"), (["--memory", "much"], "no size")])
def test_bad_input_is_one_line(model_folder, words, said):
    told = run("advise", model_folder("llama_even"), *words)
    assert told.returncode == 2 and said in told.stderr and len(told.stderr.splitlines()) == 1


def test_a_preset_decides_what_nobody_gave(model_folder, text_file, tmp_path):
    folder = model_folder("llama_even")
    words = ["--preset", "fast", "--bits", 4, "--calibration", text_file, "--num-samples", 2, "--seqlen", 64]
    words += ["--no-check", "--json", "--group-size", 64, "--output"]
    made = json.loads(run("quantize", folder, *words, tmp_path / "fast").stdout)
    assert made["settings"]["true_sequential"] is False
    quantizers = {layer["name"]: layer["quantizer"] for layer in made["layers"]}
    assert "lm_head" in quantizers and not any("target_shift" in text for text in quantizers.values())
    own = ["--head-bits", 8, "--method", "rtn"]
    other = json.loads(run("quantize", folder, *words, tmp_path / "other", *own).stdout)
    assert {layer["quantizer"].split("(")[0] for layer in other["layers"]} == {"rtn"}
    spoken = run("quantize", folder, *[word for word in words if word != "--json"], tmp_path / "spoken")
    assert "--preset fast: gptq, integers" in spoken.stdout
    refused = run("quantize", folder, "--preset", "fast", "--bits", 2.5)
    assert refused.returncode == 2 and "whole bits" in refused.stderr
