"""Which class a model is loaded by, and which models there is none for."""

import json

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Llama4Config,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

import quantkit
from quantkit import Calibration
from quantkit.cli.main import app
from quantkit.core.errors import QuantkitError
from quantkit.io.classes import class_of
from quantkit.run.estimate import estimate
from quantkit.run.recipe import Recipe

from ..helpers.methods import METHODS

_SMALL = {"vocab_size": 2048, "hidden_size": 64, "num_hidden_layers": 2}
REFUSED = {
    "BertForMaskedLM is an encoder; ": BertForMaskedLM(
        BertConfig(**_SMALL, intermediate_size=96, num_attention_heads=4)
    ),
    "T5ForConditionalGeneration is an encoder-decoder; ": T5ForConditionalGeneration(
        T5Config(vocab_size=2048, d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16)
    ),
    "BartForConditionalGeneration is an encoder-decoder; ": BartForConditionalGeneration(
        BartConfig(
            vocab_size=2048, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
        )
    ),
    "RwkvForCausalLM halves the weights of its deeper blocks in place when it runs ": RwkvForCausalLM(
        RwkvConfig(**_SMALL, attention_hidden_size=64, intermediate_size=96)
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused_by_name(words, tmp_path):
    REFUSED[words].save_pretrained(tmp_path / "model")
    with pytest.raises(QuantkitError, match=words):
        quantkit.quantize(tmp_path / "model", output=tmp_path / "packed", method="rtn", group_size=32)


def test_rwkv_is_packed_where_it_leaves_its_weights_alone(tmp_path):
    config = RwkvConfig(**_SMALL, attention_hidden_size=64, intermediate_size=96, rescale_every=0)
    RwkvForCausalLM(config).save_pretrained(tmp_path / "model")
    quantkit.quantize(tmp_path / "model", output=tmp_path / "packed", method="rtn", group_size=32)
    packed = quantkit.load(tmp_path / "packed", dtype=torch.float32).eval()
    assert packed(torch.arange(40).view(2, 20)).logits.isfinite().all()


def test_the_class_is_the_one_that_is_named():
    assert class_of(LlamaConfig(architectures=["LlamaModel"])).__name__ == "LlamaForCausalLM"
    assert class_of(LlamaConfig(architectures=["NoSuchClass"])).__name__ == "LlamaForCausalLM"
    assert class_of(Llama4Config()).__name__ == "Llama4ForConditionalGeneration", "text alone would lose its eyes"
    assert class_of(Llama4Config(architectures=["Llama4ForCausalLM"])).__name__ == "Llama4ForCausalLM"
    assert class_of(Gemma3Config().text_config).__name__ == "Gemma3ForCausalLM"


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_layers_whose_weights_are_multiplied_by_elsewhere_stay_dense(method, tokenizer, text_file, tmp_path):
    """Mamba's dt_proj is never called: its block multiplies by its weight."""
    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(**_SMALL, state_size=8)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = Recipe(METHODS[method], calibration=Calibration(str(text_file), 2, 64))
    report = quantkit.quantize(
        tmp_path / "model", output=tmp_path / "packed", method=METHODS[method], calibration=recipe.calibration
    )
    words = "dt_proj stay dense: the model's own code multiplies by their weights"
    assert any(words in note for note in report.notes) and len(report.layers) == 6
    assert any(words in note for note in estimate(tmp_path / "model", recipe).notes)
    packed, tokens = quantkit.load(tmp_path / "packed", dtype=torch.float32).eval(), torch.arange(40).view(2, 20)
    assert packed(tokens).logits.isfinite().all() and packed.generate(tokens, max_new_tokens=2).shape == (2, 22)


_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_of_these_tests"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    own = True
"""


def test_a_model_s_own_code_is_run_where_it_is_trusted(model_folder, text_file, tmp_path, monkeypatch):
    """And nowhere else: not by default, not because it was trusted before."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder("llama_small").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "modeling_own.py").write_text(_CODE)
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "own_of_these_tests", "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"method": "gptq", "group_size": 32, "calibration": Calibration(str(text_file), 2, 64)}
    words = r"needs code of its own \(modeling_own.py\); read it, and give `trust_remote_code`"
    for try_it in (
        lambda: quantkit.quantize(folder, output=tmp_path / "no", **settings),
        lambda: quantkit.load(folder),
    ):
        with pytest.raises(QuantkitError, match=words):
            try_it()
    with quantkit.trust_remote_code():
        quantkit.quantize(folder, output=tmp_path / "packed", **settings)
        packed = quantkit.load(tmp_path / "packed")
    assert packed.own and (tmp_path / "packed" / "modeling_own.py").read_text() == _CODE
    with pytest.raises(QuantkitError, match=words):
        quantkit.load(tmp_path / "packed")
    asked = ["quantize", str(folder), "--method", "rtn", "--group-size", "32", "--no-check", "--output"]
    refused = CliRunner().invoke(app, [*asked, str(tmp_path / "a")])
    assert refused.exit_code and "needs code of its own" in str(refused.exception)
    assert CliRunner().invoke(app, [*asked, str(tmp_path / "a"), "--trust-remote-code"]).exit_code == 0
    assert CliRunner().invoke(app, [*asked, str(tmp_path / "b")]).exit_code, "trusted for one command"
