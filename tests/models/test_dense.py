"""`model.dequantize()`: the dense model that a packed one stands for, which needs quantkit no more."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3ForCausalLM, Gemma3TextConfig

import quantkit
from quantkit.core.errors import QuantkitError
from quantkit.models.linear import Packed

from ..conftest import CONFIGS
from ..helpers.vision import SEEING

TOKENS = torch.arange(10, 40).view(2, 15)
SCALED = Gemma3TextConfig(
    vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
)  # fmt: skip


def packed_folder(model, tokenizer, folder, **settings):
    source, packed = folder / "model", folder / "packed"
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    quantkit.quantize(source, output=packed, **settings)
    return packed


@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS).logits


def check(packed, tmp_path, auto=AutoModelForCausalLM, **loading):
    expected = logits(quantkit.load(packed, dtype=torch.float32))
    model = auto.from_pretrained(packed, dtype=torch.float32, **loading)
    model.dequantize()
    assert not any(isinstance(module, Packed) for module in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "dense")
    written = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"quantization_config", "auto_map", "transformers_weights"} & {*written}
    assert not list((tmp_path / "dense").glob("*.py"))
    plain, told = auto.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert type(plain).__module__.startswith("transformers.models.") and type(model) is type(plain)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    return model


@pytest.mark.parametrize("trusting", [False, True], ids=["plain", "by the code beside it"])
@pytest.mark.parametrize("family", ["llama_tied_small", "gpt2_small", "qwen3_moe", "gpt_oss"])
def test_dense_again(family, trusting, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.bfloat16)
    ends = {} if family == "gpt_oss" else {"head_bits": 6}
    packed = packed_folder(model, tokenizer, tmp_path, method="rtn", bits=4, group_size=16, **ends)
    dense = check(packed, tmp_path, **{"trust_remote_code": True} if trusting else {})
    if family == "llama_tied_small":
        assert dense.lm_head.weight is dense.model.embed_tokens.weight


def test_an_embedding_with_a_factor(tokenizer, tmp_path):
    model = Gemma3ForCausalLM._from_config(SCALED, dtype=torch.bfloat16)
    packed = packed_folder(model, tokenizer, tmp_path, method="rtn", bits=4, group_size=16, head_bits=6)
    check(packed, tmp_path)


def test_models_that_see(tokenizer, tmp_path):
    model = AutoModelForImageTextToText.from_config(SEEING["llava"].config, dtype=torch.bfloat16)
    packed = packed_folder(model, tokenizer, tmp_path, method="rtn", bits=4, group_size=16)
    check(packed, tmp_path, AutoModelForImageTextToText)


def test_another_type(tokenizer, tmp_path):
    """As loading in that type gives it: angles and what a model keeps in fp32 stay as they are."""
    model = AutoModelForCausalLM.from_config(CONFIGS["deepseek_v3"], dtype=torch.float32)
    packed = packed_folder(model, tokenizer, tmp_path, method="rtn", bits=4, group_size=16)
    model = quantkit.load(packed, dtype=torch.float32)
    model.dequantize(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    assert torch.equal(logits(plain), logits(model))
    found, expected = (
        {name: tensor.dtype for name, tensor in (*one.named_parameters(), *one.named_buffers())}
        for one in (model, plain)
    )
    assert found == expected and {*found.values()} == {torch.bfloat16, torch.float32}


def test_layers_that_share_a_launch(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama_even"), dtype=torch.float32)
    quantkit.quantize(model, method="rtn", bits=3, group_size=32)
    for module in model.modules():
        module.unpacked = False
    expected = logits(model)
    assert quantkit.fuse(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_corrections_that_are_being_trained(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama_small"), dtype=torch.float32)
    quantkit.quantize(model, method="rtn", bits=3, group_size=16)
    quantkit.finetune(model, rank=4)
    for parameter in filter(lambda one: one.requires_grad, model.parameters()):
        parameter.data += 0.01
    expected = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)  # corrections are stored in fp16


def test_a_dtype_that_is_asked_for(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama_small"), dtype=torch.float32)
    quantkit.quantize(model, method="rtn", bits=3, group_size=16)
    model.dequantize(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_adapters_are_merged_first(model_folder):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama_small"), dtype=torch.float32)
    quantkit.quantize(model, method="rtn", bits=3, group_size=16)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(QuantkitError, match="merge_and_unload"):
        model.dequantize()
