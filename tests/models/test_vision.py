"""Models that see: their language models are packed, all else stays as it was, and they go on seeing."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import quantkit
from quantkit import Calibration, Recipe
from quantkit.cli.main import app
from quantkit.core.errors import QuantkitError
from quantkit.io.checkpoint import read_config
from quantkit.io.classes import class_of, meta_model
from quantkit.io.conversion import origins
from quantkit.io.shards import Shards
from quantkit.models.linear import QuantizedLinear
from quantkit.models.structure import find_blocks
from quantkit.run.pipeline import quantize_checkpoint

from ..helpers.checkpoints import digest, interrupted
from ..helpers.methods import METHODS
from ..helpers.vision import SEEING

each = pytest.mark.parametrize("family", SEEING)


@pytest.fixture
def seeing_folder(tmp_path, tokenizer):
    def make(family):
        torch.manual_seed(0)
        config = copy.deepcopy(SEEING[family].config)
        model = class_of(config)._from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # some projectors begin at zero, and see nothing
                nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return make


@torch.no_grad()
def logits(model, inputs):
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return model(**inputs, return_dict=False)[0]


def stored(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}
    return found


@each
def test_quantized_resumed_loaded_and_seeing(family, seeing_folder, text_file, tmp_path):
    folder = seeing_folder(family)
    assert origins(meta_model(folder, None), Shards(folder)) is not None, "read a block at a time"
    recipe = Recipe(METHODS["gptq"], calibration=Calibration(str(text_file), 3, 64))
    report = quantize_checkpoint(folder, recipe, tmp_path / "whole")
    interrupted(folder, recipe, tmp_path / "resumed", after=1)
    quantize_checkpoint(folder, recipe, tmp_path / "resumed", resume=True)
    assert digest(tmp_path / "resumed") == digest(tmp_path / "whole")

    full = quantkit.load(folder, dtype=torch.float32).eval()
    packed = quantkit.load(tmp_path / "whole", dtype=torch.float32).eval()
    prefix, blocks = find_blocks(full)
    assert type(packed) is type(full) and ("language_model" in prefix or "text_model" in prefix)
    assert report.packed_weights >= 0.9 * sum(p.numel() for p in blocks.parameters())
    layers = {name for name, layer in packed.named_modules() if isinstance(layer, QuantizedLinear)}
    assert layers and all(name.startswith(prefix) for name in layers)
    before, after = full.state_dict(), packed.state_dict()
    for name, tensor in after.items():
        if not any(name.startswith(f"{layer}.") for layer in layers):
            assert torch.equal(tensor, before[name]), name

    inputs = SEEING[family].inputs()
    found = logits(packed, inputs)
    blind = logits(packed, {**inputs, "pixel_values": -inputs["pixel_values"]})
    assert not torch.equal(found, blind) and not torch.equal(found, logits(full, inputs))
    packed.dequantize(torch.float32)
    torch.testing.assert_close(logits(packed, inputs), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "llama4", "llava", "qwen2_5_vl", "qwen3_5", "smolvlm"])
def test_packed_in_memory_and_saved(family, seeing_folder, tokenizer, text_file, tmp_path):
    model = quantkit.load(seeing_folder(family), dtype=torch.float32).eval()
    calibration = Calibration(str(text_file), 2, 64)
    memory = quantkit.quantize(model, tokenizer, method="gptq", group_size=32, calibration=calibration)
    memory.save_pretrained(tmp_path / "saved")
    inputs = SEEING[family].inputs()
    again = quantkit.load(tmp_path / "saved", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again, inputs), logits(memory, inputs), rtol=1e-5, atol=1e-5)


def test_towers_are_packed_where_it_is_asked_for(seeing_folder, text_file, tmp_path):
    folder, inputs = seeing_folder("qwen2_vl"), SEEING["qwen2_vl"].inputs()
    text = Calibration(str(text_file), 2, 64)
    plain = quantkit.quantize(folder, output=tmp_path / "plain", method="gptq", group_size=32, calibration=text)
    assert any(note.startswith("model.visual stays dense: ") and "'model.visual*'" in note for note in plain.notes)
    asked = {"model.visual*": 8, "lm_head": 6}
    report = quantkit.quantize(
        folder, output=tmp_path / "packed", method="gptq", group_size=32, calibration=text, include=asked
    )
    ways = {layer.name: layer.quantizer for layer in report.layers}
    tower = [name for name in ways if name.startswith("model.visual.")]
    assert len(tower) == len(ways) - len(plain.layers) - 1 >= 8 and ways["lm_head"].startswith("target_shift(gptq(6")
    assert all(ways[name].startswith("rtn(8") for name in tower) and not any("stays dense" in n for n in report.notes)
    found = logits(quantkit.load(tmp_path / "packed", dtype=torch.float32).eval(), inputs)
    left = logits(quantkit.load(tmp_path / "plain", dtype=torch.float32).eval(), inputs)
    assert 0 < (found - left).norm() < 0.2 * left.norm()
    for wrong, words in (
        ({"visual*": 8}, "matches no linear layer .* model.visual.blocks.*"),
        ({"lm_head": 9}, "1 to 8"),
    ):
        with pytest.raises(QuantkitError, match=words):
            quantkit.quantize(folder, output=tmp_path / "no", method="rtn", include=wrong)


def test_all_that_is_stored_goes_along(seeing_folder, text_file, tmp_path):
    """Be it part of no model that transformers knows, as layers that predict further tokens are."""
    folder = seeing_folder("llava")
    shard = folder / "model.safetensors"
    more = {"model.language_model.layers.2.mtp.weight": torch.randn(3, 5), "odd": torch.arange(4)}
    save_file(stored(folder) | more | {"model.rotary_emb.inv_freq": torch.ones(8)}, shard, metadata={"format": "pt"})
    text = Calibration(str(text_file), 2, 64)
    quantkit.quantize(folder, output=tmp_path / "packed", method="gptq", group_size=32, calibration=text)
    before, after = stored(folder), stored(tmp_path / "packed")
    packed = {f"{layer}." for layer in read_config(tmp_path / "packed")["quantization_config"]["layers"]}
    mapping = origins(meta_model(folder, None), Shards(folder))
    read = {name for origin in mapping.values() for name in origin.stored}
    assert before.keys() - read == {*more, "model.rotary_emb.inv_freq"}, "the model works the last one out itself"
    assert [name for name in mapping if name not in after and not name.startswith(tuple(packed))] == []
    assert all(torch.equal(after[name], tensor) for name, tensor in more.items())
    assert quantkit.load(tmp_path / "packed")


def test_the_command_packs_towers(seeing_folder, tmp_path):
    asked = ["quantize", str(seeing_folder("llava")), "--method", "rtn", "--group-size", "32", "--no-check", "--output"]
    more = ["--include", "model.vision_tower*=4", "--include", "model.multi_modal_projector*"]
    assert CliRunner().invoke(app, [*asked, str(tmp_path / "packed"), *more]).exit_code == 0
    layers = read_config(tmp_path / "packed")["quantization_config"]["layers"]
    bits = {name: layer["bits"] for name, layer in layers.items() if "language_model" not in name}
    assert {bit for name, bit in bits.items() if "tower" in name} == {4}
    assert {bit for name, bit in bits.items() if "projector" in name} == {8}
    for wrong in ("=4", "model.*=four", "model.vision_tower*=9"):
        refused = CliRunner().invoke(app, [*asked, str(tmp_path / "no"), "--include", wrong])
        assert isinstance(refused.exception, QuantkitError)


def test_a_search_refuses_towers_before_it_makes_anything(seeing_folder, text_file, tmp_path):
    folder, text = seeing_folder("llava"), Calibration(str(text_file), 4, 64)
    asked = {"avg_bits": 5, "candidates": "rtn(3, 32), rtn(4, 32)", "base": "rtn(3, 32)", "calibration": text}
    with pytest.raises(QuantkitError, match=r"text does not reach model\.vision_tower.*leave it dense \(`ignore`\)"):
        quantkit.search(folder, tmp_path / "out", include=["model.vision_tower*"], held_out=2, **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]
