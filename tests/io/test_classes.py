"""Which class a model is loaded by, and which models there is none for."""

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
    T5Config,
    T5ForConditionalGeneration,
)

import quantkit
from quantkit import Calibration
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
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_encoders_are_refused_by_name(words, tmp_path):
    REFUSED[words].save_pretrained(tmp_path / "model")
    with pytest.raises(QuantkitError, match=words):
        quantkit.quantize(tmp_path / "model", output=tmp_path / "packed", method="rtn", group_size=32)


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
