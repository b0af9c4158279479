"""Fused projections: the same outputs in fewer launches, and nothing lost when the model is saved or moved."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import RTN, Hadamard, Trellis
from quantkit.formats.int_group import IntGroupWeight
from quantkit.io.shards import Shards
from quantkit.models.linear import QuantizedLinear
from quantkit.models.unpacking import choose_unpacked

from ..conftest import CONFIGS, VOCABULARY


def packed(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    quantkit.quantize(model, method=RTN(4, 32, **options))
    choose_unpacked(model, False)  # as on a GPU
    return model


@pytest.fixture
def launches(monkeypatch):
    seen = []
    original = IntGroupWeight.matmul
    monkeypatch.setattr(IntGroupWeight, "matmul", lambda self, *args: seen.append(self.shape) or original(self, *args))
    return seen


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fused_layers_give_the_same_in_fewer_launches(architecture, symmetric, model_folder, launches):
    model = packed(model_folder(architecture), symmetric=symmetric)
    tokens = torch.randint(0, VOCABULARY, (2, 20))
    with torch.no_grad():
        before = model(tokens).logits
        separate = len(launches)
        blocks = len(model.model.layers)
        assert quantkit.fuse(model) == 2 * blocks
        assert quantkit.fuse(model) == 0
        launches.clear()
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)
    assert separate == 7 * blocks
    assert len(launches) == 4 * blocks
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)


def test_unlike_siblings_stay_apart(model_folder):
    folder = model_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    quantkit.quantize(model, method=RTN(4, 32), rules={"*.k_proj": RTN(3, 32), "*.layers.0.mlp.up_proj": None})
    choose_unpacked(model, False)
    assert quantkit.fuse(model) == len(model.model.layers) - 1


def test_trellis_codes_side_by_side(tokenizer, tmp_path):
    """Where outputs are multiples of the kernel's tiles: gate and up here, and not queries, keys and values."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.intermediate_size = 256
    model = AutoModelForCausalLM.from_config(config).eval()
    method = Hadamard(Trellis(2, 8))
    quantkit.quantize(model, tokenizer, method=method, calibration="stdlib", num_samples=2, seqlen=64)
    choose_unpacked(model, False)
    tokens = torch.randint(0, VOCABULARY, (2, 20))
    with torch.no_grad():
        before, state = model(tokens).logits, {name: t.clone() for name, t in model.state_dict().items()}
        assert quantkit.fuse(model) == len(model.model.layers)
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        model.save_pretrained(tmp_path)
        saved = Shards(tmp_path)
        assert saved.specs.keys() == state.keys()
        assert all(torch.equal(t, state[name]) for name, t in saved.read(saved.specs))


def test_fused_models_with_biases_are_copied(model_folder):
    model = packed(model_folder("qwen2"))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    quantkit.fuse(model)
    tokens = torch.randint(0, VOCABULARY, (1, 20))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(tokens).logits, model(tokens).logits)


def test_a_changed_input_is_computed_anew(model_folder):
    model = packed(model_folder("llama"))
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 3, model.config.hidden_size)
    expected = attention.k_proj(2 * x)
    quantkit.fuse(model)
    attention.q_proj(x)
    x *= 2
    torch.testing.assert_close(attention.k_proj(x), expected)
    torch.testing.assert_close(attention.k_proj(x), expected)  # asked twice


def test_moving_takes_the_fusion_apart_and_saving_does_not(model_folder, tmp_path):
    model = packed(model_folder("llama"))
    tokens = torch.randint(0, VOCABULARY, (1, 20))
    with torch.no_grad():
        before = model(tokens).logits
        quantkit.fuse(model)
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(quantkit.load(tmp_path / "saved", dtype=torch.float32).eval()(tokens).logits, before)
        assert quantkit.fuse(model) == 0, "still fused"
        model.to("cpu")
        layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        assert all(layer.shared is None for layer in layers)
        assert torch.equal(model(tokens).logits, before)


def test_a_fused_model_compiles_into_one_graph(model_folder):
    model = packed(model_folder("llama"))
    tokens = torch.randint(0, VOCABULARY, (1, 16))
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        quantkit.fuse(model)
        compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(tokens + 0), before, rtol=1e-4, atol=1e-5)


def test_a_fused_model_can_be_cast_loaded_into_and_copied(model_folder):
    model = packed(model_folder("llama"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.randint(0, VOCABULARY, (1, 20))
    with torch.no_grad():
        before = model(tokens).logits
        quantkit.fuse(model)
        model.model.layers[0].self_attn.q_proj(torch.randn(1, 3, model.config.hidden_size))  # its siblings not
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(tokens).logits, before, rtol=1e-4, atol=1e-5)
        for name, buffer in model.named_buffers():
            if name.endswith("scales"):
                buffer.zero_()
        model.load_state_dict(state)
        assert torch.equal(model(tokens).logits, before)
        quantkit.fuse(model)
        model.to(torch.bfloat16)
        assert all(buffer.is_contiguous() for _, buffer in model.named_buffers())
        assert model(tokens).logits.dtype == torch.bfloat16
