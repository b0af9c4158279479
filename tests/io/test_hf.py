"""The bridge to transformers, including what happens without quantkit."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit.core.errors import QuantkitError
from quantkit.io import hf
from quantkit.io.hf import resolve_folder
from quantkit.models.linear import QuantizedLinear

from ..conftest import VOCABULARY


@pytest.fixture(scope="module")
def saved(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "packed"
    model = AutoModelForCausalLM.from_pretrained(model_folder("qwen2"), dtype=torch.bfloat16)
    quantkit.quantize(model, method="rtn", bits=4, group_size=64)
    model.save_pretrained(folder, max_shard_size="1MB")
    AutoTokenizer.from_pretrained(model_folder("qwen2")).save_pretrained(folder)
    return model.eval(), folder


@pytest.mark.parametrize("load", [quantkit.load, AutoModelForCausalLM.from_pretrained])
def test_saved_and_loaded_logits_are_bit_identical(saved, load):
    model, folder = saved
    loaded = load(folder).eval()
    assert loaded.dtype == torch.bfloat16
    tokens = torch.randint(0, VOCABULARY, (2, 60))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.model.layers[0].mlp.up_proj.packed.scales.dtype == torch.float16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight, "the tied head stays tied"


def test_saves_again_after_loading(saved, tmp_path):
    _, folder = saved
    quantkit.load(folder).save_pretrained(tmp_path / "again")
    first, second = quantkit.load(folder).state_dict(), quantkit.load(tmp_path / "again").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_device_map_and_generation(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[1], device_map="cpu")
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 6)


def test_missing_tensors_are_an_error_not_random_weights(saved, tmp_path):
    import json
    import shutil

    from quantkit.core.errors import CheckpointError

    folder = tmp_path / "broken"
    shutil.copytree(saved[1], folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if "norm" not in k}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    from safetensors.torch import load_file, save_file

    for shard in folder.glob("*.safetensors"):
        kept = {k: v for k, v in load_file(shard).items() if "norm" not in k}
        save_file(kept, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks"):
        quantkit.load(folder)


def test_a_model_without_its_head_is_said_to_be_one(model_folder, text_file, tmp_path):
    headless = tmp_path / "headless"
    AutoModel.from_pretrained(model_folder("llama_even")).save_pretrained(headless)
    AutoTokenizer.from_pretrained(model_folder("llama_even")).save_pretrained(headless)
    with pytest.raises(QuantkitError, match=r"holds a model without its head .lm_head.weight."):
        quantkit.quantize(headless, output=tmp_path / "packed", method="rtn", group_size=32)


def test_importing_touches_no_gpu_and_no_network():
    code = "import quantkit, torch; assert not torch.cuda.is_initialized(); print(quantkit.__version__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == quantkit.__version__


def test_reference_is_the_reference_model(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("reference").samefile(reference)


def test_a_folder_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference").mkdir()
    assert resolve_folder("reference").samefile(tmp_path / "reference")


def test_an_installation_without_it_says_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf, "REFERENCE", tmp_path / "nowhere")
    with pytest.raises(QuantkitError, match="nowhere; it is in quantkit's wheel and source tree"):
        resolve_folder("reference")


def test_a_packed_head_that_gets_rows_is_saved_as_the_dense_one_that_it_became(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama_small"), dtype=torch.float32).eval()
    quantkit.quantize(model, method=quantkit.RTN(4, 32), rules={"lm_head": quantkit.RTN(4, 32)})
    tokens = torch.randint(0, VOCABULARY, (1, 20))
    with torch.no_grad():
        before = model(tokens).logits
        model.resize_token_embeddings(VOCABULARY + 10)
        model.save_pretrained(tmp_path)
        loaded = quantkit.load(tmp_path, dtype=torch.float32, unpack=False)
        found = loaded(tokens).logits
    assert found.shape[-1] == VOCABULARY + 10
    torch.testing.assert_close(found[..., :VOCABULARY], before, rtol=1e-4, atol=1e-4)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, QuantizedLinear)
