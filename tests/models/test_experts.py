"""Experts taken apart: the same model, whatever form they came in, packed like all other layers."""

import copy
import json
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Ernie4_5_VLMoeConfig

import quantkit
from quantkit import Calibration, Recipe
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.evals.architecture_sizes import small
from quantkit.io.classes import class_of, meta_model
from quantkit.io.conversion import origins, read
from quantkit.io.shards import Shards
from quantkit.io.source import open_folder
from quantkit.models.experts import Apart, is_stacked, parts, place, put_together, routed, take_apart
from quantkit.run.estimate import estimate
from quantkit.run.pipeline import quantize_checkpoint

from ..conftest import CONFIGS, VOCABULARY
from ..helpers.checkpoints import digest, interrupted, unseal
from ..helpers.experts import EXPERTS
from ..helpers.methods import METHODS

each = pytest.mark.parametrize("family", EXPERTS)


def build(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


@each
def test_a_model_taken_apart_is_the_same(family):
    model, tokens = build(family), torch.randint(0, VOCABULARY, (2, 9))
    before, names = logits(model, tokens), {*model.state_dict()}
    stacked = [name for name, module in model.named_modules() if is_stacked(module)]
    take_apart(model)
    assert stacked and not any(map(is_stacked, model.modules()))
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model, tokens[:1, :1]), before[:1, :1], rtol=1e-5, atol=1e-5)
    with routed(model, everywhere=True):
        torch.testing.assert_close(logits(model, tokens), before, rtol=1e-5, atol=1e-5)
    assert {part.stack.rpartition(".")[0] for part in parts(model).values()} == {*stacked}
    assert all(place(name.removesuffix(".weight").removesuffix(".bias")) for name in parts(model))
    assert put_together(model, ()) and {*model.state_dict()} == names
    assert torch.equal(logits(model, tokens), before)


@each
def test_stored_tensors_are_those_that_transformers_loads(family, model_folder):
    folder = model_folder(family)
    model, shards = meta_model(folder, None), Shards(folder)
    mapping = origins(model, shards)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    take_apart(loaded)
    state = loaded.state_dict()
    assert set(mapping) == set(state) == set(model.state_dict())
    found = dict(read(shards, mapping, mapping))
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert sum(origin.nbytes for origin in mapping.values()) == shards.nbytes()


def test_transformers_draws_nothing_anew_from_above():
    """Of Qwen3-Omni it draws the stacks where it comes to the block that the experts are in."""
    block = nn.Sequential(next(filter(is_stacked, build("mixtral").modules())))
    take_apart(block)
    assert isinstance(block[0], Apart) and block._is_hf_initialized


def test_an_expert_of_its_own_is_read_alone(model_folder, monkeypatch):
    folder, asked = model_folder("mixtral"), []
    shards, reads = Shards(folder), Shards.read
    mapping = origins(meta_model(folder, None), shards)
    monkeypatch.setattr(Shards, "read", lambda self, names: asked.extend(names) or reads(self, names))
    name = "model.layers.1.mlp.experts.2.gate_up_proj.weight"
    assert [own for own, _ in read(shards, mapping, [name])] == [name]
    assert len(asked) == 2 and all(".1." in stored and "experts.2." in stored for stored in asked)


@pytest.mark.slow
@each
def test_quantized_resumed_loaded_and_run(family, model_folder, text_file, tmp_path):
    """Next to nothing in blocks stays dense, and the packed model is the one with dequantized weights."""
    folder = model_folder(family)
    recipe = Recipe(METHODS["gptq"], calibration=Calibration(str(text_file), 3, 128))
    report = quantize_checkpoint(folder, recipe, tmp_path / "whole")
    interrupted(folder, recipe, tmp_path / "resumed", after=1)
    quantize_checkpoint(folder, recipe, tmp_path / "resumed", resume=True)
    assert digest(tmp_path / "resumed") == digest(tmp_path / "whole")
    assert not any("stacked experts" in note for note in report.notes)
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inside = sum(p.numel() for p in full.model.layers.parameters())
    assert report.packed_weights >= 0.95 * inside

    packed = quantkit.load(tmp_path / "whole", dtype=torch.float32).eval()
    tokens = torch.randint(0, VOCABULARY, (2, 40))
    found = logits(packed, tokens)
    generated = packed.generate(tokens[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
    memory = quantkit.quantize(
        full, AutoTokenizer.from_pretrained(folder), method=recipe.quantizer, calibration=recipe.calibration
    )
    assert torch.equal(logits(memory, tokens), found) and generated.shape == (2, 12)
    memory.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(quantkit.load(tmp_path / "saved", dtype=torch.float32).eval(), tokens), found)
    packed.dequantize(torch.float32)
    torch.testing.assert_close(logits(packed, tokens), found, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_packs_experts(method, model_folder, text_file, tmp_path):
    """Some of them; the others stay dense, each by itself."""
    rules = dict.fromkeys(["*self_attn*", "*.experts.[23].*"])
    folder, calibration = model_folder("mixtral"), Calibration(str(text_file), 2, 64)
    report = quantize_checkpoint(folder, Recipe(method, rules, calibration=calibration), tmp_path / "packed")
    assert len(report.layers) == 8
    packed = quantkit.load(tmp_path / "packed", dtype=torch.float32).eval()
    full, tokens = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        torch.arange(60).view(2, 30),
    )
    before, after = logits(full, tokens), logits(packed, tokens)
    assert 0 < (before - after).norm() < 0.5 * before.norm()


def test_experts_without_a_planned_layer_stay_stacked(model_folder, text_file, tmp_path):
    folder = model_folder("gpt_oss")
    calibration = Calibration(str(text_file), 2, 64)
    recipe = Recipe(METHODS["rtn"], {"*experts*": None}, calibration=calibration)
    report = quantize_checkpoint(folder, recipe, tmp_path / "packed")
    expected = estimate(folder, recipe)
    for notes in (report.notes, expected.notes):
        assert any(
            "stacked experts" in note and "experts.gate_up_proj among them, stay dense" in note for note in notes
        )
    assert (expected.bytes_after, expected.packed_weights) == (report.bytes_after, report.packed_weights)
    packed = quantkit.load(tmp_path / "packed")
    assert any(map(is_stacked, packed.modules())) and not any(isinstance(m, Apart) for m in packed.modules())
    assert "model.layers.0.mlp.experts.gate_up_proj" in packed.state_dict()


def test_a_layer_left_dense_does_not_keep_the_experts_beside_it():
    model = build("mixtral")
    kept = model.model.layers[0].mlp.experts.down_proj[1].clone()
    quantkit.quantize(model, method="rtn", group_size=32, rules={"*layers.0*experts.1.down_proj": None})
    left = model.get_submodule("model.layers.0.mlp.experts.1.down_proj").weight
    assert torch.equal(left, kept) and left.untyped_storage().nbytes() == 4 * left.numel()


def test_tensors_that_cannot_be_had_are_loaded_by_transformers(model_folder, monkeypatch):
    folder = model_folder("mixtral")

    def fails(*_args, **_kwargs):
        raise RuntimeError("looks at numbers")

    monkeypatch.setattr("quantkit.io.conversion._Group.convert", fails)
    assert origins(meta_model(folder, None), Shards(folder)) is None
    source = open_folder(folder)
    assert source.model.device.type == "cpu" and any(isinstance(m, Apart) for m in source.model.modules())


def test_a_checkpoint_with_experts_of_another_number_is_refused(model_folder, text_file, tmp_path):
    folder = model_folder("mixtral")
    quantize_checkpoint(folder, Recipe(METHODS["rtn"]), tmp_path / "packed")
    unseal(tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    path.write_text(path.read_text().replace('"num_local_experts": 4', '"num_local_experts": 3'))
    with pytest.raises(CheckpointError, match=r"no layer .*experts\.3"):
        quantkit.load(tmp_path / "packed")


def test_a_refused_run_leaves_the_model_as_it_was(tmp_path):
    model, tokens = build("mixtral"), torch.arange(9).view(1, 9)
    before, names = logits(model, tokens), {*model.state_dict()}
    with pytest.raises(QuantkitError, match="tokenizer"):
        quantkit.quantize(model, group_size=32)
    assert {*model.state_dict()} == names and not any(isinstance(m, Apart) for m in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(again, tokens), before)


def test_copies_and_files_of_a_model_that_was_taken_apart(tmp_path):
    model, tokens = build("gpt_oss"), torch.arange(9).view(1, 9)
    take_apart(model)
    before = logits(model, tokens)
    torch.save(model, tmp_path / "model.pt")
    for again in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert any(isinstance(m, Apart) for m in again.modules())
        assert torch.equal(logits(again, tokens), before)
    module = next(m for m in model.modules() if isinstance(m, Apart))
    none = module(torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert none.shape == (0, 64)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4"])
def test_files_with_another_number_of_experts_are_refused(family, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder(family), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    key = "num_experts" if "num_experts" in config else "num_local_experts"
    for count in (config[key] - 1, config[key] + 1):
        path.write_text(json.dumps(config | {key: count}))
        with pytest.raises(QuantkitError, match=f"experts, and config.json says {count}"):
            open_folder(folder)


def test_experts_that_text_does_not_reach_stay_dense(tmp_path, tokenizer, text_file):
    """ERNIE 4.5 VL has experts for images alone: methods that read text leave them, and say so; RTN packs them."""
    torch.manual_seed(0)
    config = small(Ernie4_5_VLMoeConfig())
    model = class_of(config)._from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.05)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe = Recipe(METHODS["gptq"], calibration=Calibration(str(text_file), 3, 64))
    told = estimate(folder, recipe, "cpu")
    report = quantize_checkpoint(folder, recipe, tmp_path / "whole")
    interrupted(folder, recipe, tmp_path / "resumed", after=1)
    quantize_checkpoint(folder, recipe, tmp_path / "resumed", resume=True)
    assert digest(tmp_path / "whole") == digest(tmp_path / "resumed")
    names = {layer.name for layer in report.layers}
    assert any(".text_moe." in name for name in names) and not any(".vision_moe." in name for name in names)
    for notes in (told.notes, report.notes):
        note = next(note for note in notes if "text does not reach them" in note)
        assert "vision_moe.experts.gate_up_proj" in note and "text_moe" not in note
    assert told.bytes_after == report.bytes_after
    stacks = {name for name in Shards(tmp_path / "whole").specs if "vision_moe.experts" in name}
    assert stacks and not any(part.isdigit() for name in stacks for part in name.split("experts")[1].split("."))
    packed, tokens = quantkit.load(tmp_path / "whole", dtype=torch.float32).eval(), torch.arange(10, 50).view(2, 20)
    found = logits(packed, tokens)
    packed.dequantize(torch.float32)
    torch.testing.assert_close(logits(packed, tokens), found, rtol=0, atol=1e-5 * float(found.abs().max()))

    with pytest.raises(QuantkitError, match=r"text does not reach .*vision_moe.*give it rtn"):
        quantize_checkpoint(
            folder, Recipe(METHODS["gptq"], rules={"*vision_moe*": METHODS["gptq"]}), tmp_path / "refused"
        )
    rtn = quantize_checkpoint(folder, Recipe(METHODS["rtn"]), tmp_path / "rtn")
    assert any(".vision_moe.experts.0." in layer.name for layer in rtn.layers)
    quantkit.load(tmp_path / "rtn")
