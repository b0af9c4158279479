"""The rotation of a whole model: the same function, whatever the model; and better weights to quantize."""

import copy
import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GemmaConfig,
    GraniteConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
    SmolLM3Config,
)

import quantkit
from quantkit import GPTQ, RTN, Calibration, Hadamard, Recipe, Rotation, rotate_model
from quantkit.core.errors import QuantkitError
from quantkit.core.metrics import token_kl
from quantkit.run.estimate import estimate
from quantkit.run.pipeline import quantize_checkpoint

from ..conftest import VOCABULARY
from ..helpers.checkpoints import digest, interrupted

SMALL = {
    "vocab_size": 256, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FITTING = {
    "llama with biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral with a sliding window": MistralConfig(**SMALL, sliding_window=4),
    "qwen3 with norms of queries and keys": Qwen3Config(**SMALL, head_dim=32),
    "hunyuan with the same by other names": HunYuanDenseV1Config(**SMALL, head_dim=24),
    "smollm3 with layers without positions": SmolLM3Config(**SMALL, no_rope_layers=[1, 0]),
    "granite with multipliers": GraniteConfig(
        **SMALL, residual_multiplier=0.3, embedding_multiplier=5.0, logits_scaling=3.0
    ),
    "gemma with gains of 1 + weight and a scaled embedding": GemmaConfig(**SMALL, head_dim=32),
}
REFUSED = {
    "gemma2": Gemma2Config(**SMALL, head_dim=32),
    "olmo2": Olmo2Config(**SMALL),
    "phi3": Phi3Config(**SMALL, original_max_position_embeddings=64),
}


def scrambled(model):
    """Norms, biases and all else at random, so that nothing passes because it is one or nought."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[1] ** -0.5 if noise.dim() == 2 else 1 + 0.3 * noise)
    return model.eval()


def build(config, dtype=torch.float32):
    return scrambled(AutoModelForCausalLM.from_config(config, dtype=dtype))


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def assert_close(found, wanted, tolerance=1e-5):
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.fixture(scope="module")
def stored(model_folder, tmp_path_factory):
    """A function: architecture, dtype -> folder with scrambled weights."""
    root = tmp_path_factory.mktemp("scrambled")

    def make(name, dtype):
        folder = root / f"{name}-{dtype}"
        if not folder.exists():
            scrambled(load(model_folder(name))).to(dtype).save_pretrained(folder)
            AutoTokenizer.from_pretrained(model_folder(name)).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "qwen2"])
def test_the_function_stays_and_the_weights_change(architecture, stored):
    model, tokens = load(stored(architecture, torch.float32)), torch.randint(0, VOCABULARY, (2, 60))
    before, old = logits(model, tokens), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert rotate_model(model, seed=3) is model
    assert_close(logits(model, tokens), before)
    new = model.state_dict()
    norms = {name for name in new if "norm" in name}
    assert len(norms) == 5
    assert all(bool((new[name] == 1).all()) for name in norms)
    same = {name for name in new if torch.equal(new[name], old[name])}
    assert {name.rpartition("proj.")[2] for name in same} <= {"bias"}
    assert any(name.endswith("q_proj.bias") for name in same) == (architecture == "qwen2")
    assert not any("v_proj.bias" in name for name in same)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    assert not model.training


@pytest.mark.parametrize("architecture", FITTING)
def test_whatever_has_llamas_shape(architecture):
    model, tokens = build(FITTING[architecture]), torch.randint(3, 256, (2, 30))
    before = logits(model, tokens)
    rotate_model(model.train(), seed=1)
    assert model.training
    assert_close(logits(model.eval(), tokens), before)


def test_the_reference_model_in_its_own_dtype(reference):
    """Rounding to bf16 once more costs next to nothing."""
    plain, tokens = load(reference), torch.randint(0, 2048, (4, 128))
    before = logits(plain, tokens)
    assert_close(logits(rotate_model(load(reference)), tokens), before, 1e-5)
    rounded = rotate_model(load(reference, torch.bfloat16)).float()
    assert float(token_kl(before, logits(rounded, tokens)).mean()) < 1e-3


def assert_refused(model, why):
    before, tied = copy.deepcopy(model.state_dict()), model.config.tie_word_embeddings
    with pytest.raises(QuantkitError, match=rf"rotated as a whole: .*{why}.*use `hadamard`"):
        rotate_model(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.tie_word_embeddings == tied


@pytest.mark.parametrize("architecture", ["gpt2", "neox", "mixtral", *REFUSED])
def test_other_shapes_are_refused_with_the_reason_and_left_alone(architecture, model_folder):
    model = build(REFUSED[architecture]) if architecture in REFUSED else load(model_folder(architecture))
    assert_refused(model, f"its type is '{model.config.model_type}', and models of Llama's shape alone can be: llama, ")


def test_a_llama_with_packed_or_more_weights_is_refused():
    packed, more, away = (build(LlamaConfig(**SMALL)) for _ in range(3))
    quantkit.quantize(packed, method="rtn", bits=4, group_size=32, rules={"*.v_proj": None})
    assert_refused(packed, r"layers\.0\.mlp\.down_proj\.weight is missing, or packed already")
    more.model.layers[1].mlp.register_parameter("extra", nn.Parameter(torch.zeros(96, 8)))
    assert_refused(more, r"layers\.1\.mlp\.extra is of no known use")
    away.model.norm.to("meta")
    with pytest.raises(QuantkitError, match="some of its weights are not in memory"):
        rotate_model(away)


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", torch.float32), ("llama_tied", torch.bfloat16), ("qwen2", torch.float32)]
)
def test_disk_and_memory_paths_agree_to_the_bit(architecture, dtype, stored, text_file, tmp_path):
    folder = stored(architecture, dtype)
    calibration = Calibration(str(text_file), num_samples=4, seqlen=128)
    recipe = Recipe(GPTQ(3, 64), calibration=calibration, rotation=Rotation())
    report = quantize_checkpoint(folder, recipe, tmp_path / "packed")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {"bits": 3, "group_size": 64, "calibration": calibration}
    if dtype == torch.float32:
        model = quantkit.quantize(load(folder), tokenizer, **settings, rotate_model=True)
        assert model.quantkit_report.settings == report.settings
        assert model.quantkit_report.notes == report.notes
        assert model.quantkit_report.bytes_after == report.bytes_after
    else:
        model = quantkit.quantize(rotate_model(load(folder, dtype)).float(), tokenizer, **settings)
    loaded, tokens = quantkit.load(tmp_path / "packed", dtype=torch.float32).eval(), torch.randint(0, 2048, (2, 100))
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert any("tied" in note for note in report.notes) == (architecture != "llama")
    assert any("rotated" in note for note in report.notes)
    expected = estimate(folder, recipe)
    assert (expected.bytes_before, expected.bytes_after) == (report.bytes_before, report.bytes_after)
    assert expected.all_weights == report.all_weights
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved"), tokens), logits(model, tokens))


def test_what_is_written_is_the_rotated_model(stored, tmp_path):
    """With all layers but one dense, the checkpoint is the rotated model, tensor by tensor."""
    folder = stored("llama_tied", torch.bfloat16)
    recipe = Recipe(None, {"model.layers.1.mlp.down_proj": RTN(8, 64)}, rotation=Rotation(seed=5))
    quantize_checkpoint(folder, recipe, tmp_path / "packed")
    written = {}
    for shard in sorted((tmp_path / "packed").glob("*.safetensors")):
        written |= load_file(shard)
    expected = rotate_model(load(folder, torch.bfloat16), seed=5).state_dict()
    for name in [name for name in written if "layers.1.mlp.down_proj" in name]:
        written.pop(name)
    expected.pop("model.layers.1.mlp.down_proj.weight")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in written)
    tokens = torch.randint(0, VOCABULARY, (2, 50))
    found = logits(quantkit.load(tmp_path / "packed", dtype=torch.float32).eval(), tokens)
    assert_close(found, logits(load(folder), tokens), 0.05)


def test_a_packed_head_and_a_model_loaded_whole(stored, text_file, tmp_path, monkeypatch, caplog):
    folder = stored("qwen2", torch.float32)
    calibration = Calibration(str(text_file), num_samples=4, seqlen=128)
    recipe = Recipe(Hadamard(GPTQ(3, 64)), {"lm_head": GPTQ(8, 64)}, calibration=calibration, rotation=Rotation())
    report = quantize_checkpoint(folder, recipe, tmp_path / "read")
    expected = estimate(folder, recipe)
    assert (expected.bytes_before, expected.bytes_after) == (report.bytes_before, report.bytes_after)
    monkeypatch.setattr("quantkit.io.source.origins", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        quantize_checkpoint(folder, recipe, tmp_path / "whole")
    assert "loading all of it at once" in caplog.text
    assert digest(tmp_path / "whole") == digest(tmp_path / "read")


def test_resuming_gives_the_same_bytes(stored, text_file, tmp_path):
    folder = stored("llama_tied", torch.bfloat16)
    calibration = Calibration(str(text_file), 4, 128)
    recipe = Recipe(GPTQ(3, 64), calibration=calibration, rotation=Rotation())
    quantize_checkpoint(folder, recipe, tmp_path / "whole")
    interrupted(folder, recipe, tmp_path / "resumed", after=1)
    for other in (None, Rotation(seed=1)):
        with pytest.raises(QuantkitError, match=r"other settings: rotation"):
            changed = Recipe(GPTQ(3, 64), calibration=calibration, rotation=other)
            quantize_checkpoint(folder, changed, tmp_path / "resumed", resume=True)
    quantize_checkpoint(folder, recipe, tmp_path / "resumed", resume=True)
    assert digest(tmp_path / "resumed") == digest(tmp_path / "whole")


def test_refused_on_the_disk_path_before_anything_is_made(model_folder, tmp_path):
    for refuse in (lambda recipe: quantize_checkpoint(model_folder("gpt2"), recipe, tmp_path / "out"),
                   lambda recipe: estimate(model_folder("gpt2"), recipe)):  # fmt: skip
        with pytest.raises(QuantkitError, match="GPT2LMHeadModel cannot be rotated as a whole"):
            refuse(Recipe(RTN(3, 64), rotation=Rotation()))
    assert not list(tmp_path.iterdir())


def with_outliers(model):
    """Some channels stand out by far, as in large models, and the function is the same.

    The stream is turned the other way, towards the few directions that the readers weigh most, and some channels are
    small behind the norms and have large weights.
    """
    model = rotate_model(model)
    turn, size = None, torch.ones(256)
    size[torch.randperm(256)[:8]] = 16
    readers = {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    reading = [layer.weight for name, layer in linears.items() if not name.endswith(("o_proj", "down_proj", "lm_head"))]
    turn = torch.linalg.svd(torch.cat(reading).detach().double(), full_matrices=False).Vh[torch.randperm(256)]
    with torch.no_grad():
        for name, module in (*linears.items(), ("", model.model.embed_tokens)):
            wide = module.weight.double()
            module.weight.copy_(turn @ wide if name.endswith(("o_proj", "down_proj")) else wide @ turn.T)
        for name, module in model.named_modules():
            for norm, following in readers.items():
                if name.endswith(norm):
                    module.weight.div_(size)
                    for other, linear in linears.items():
                        if other.startswith(name.removesuffix(norm)) and other.endswith(following):
                            linear.weight.mul_(size)
    return model


def test_outliers_of_the_stream_cost_nothing_once_it_is_rotated(reference):
    tokens = torch.randint(0, 2048, (8, 128))
    wanted = logits(load(reference), tokens)
    model = with_outliers(load(reference))
    assert_close(logits(model, tokens), wanted, 1e-4)
    losses = {}
    for rotated in (False, True):
        packed = quantkit.quantize(copy.deepcopy(model), method="rtn", bits=3, rotate_model=rotated)
        losses[rotated] = float(token_kl(wanted, logits(packed, tokens)).mean())
    assert losses[True] < 0.3 * losses[False], losses
