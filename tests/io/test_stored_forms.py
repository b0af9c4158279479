"""Models whose files hold quantized weights: read as the model that these stand for."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import quantkit
from quantkit import Calibration, Recipe
from quantkit.core.errors import QuantkitError
from quantkit.io.shards import Shards
from quantkit.io.stored_forms import Dequantized
from quantkit.run.estimate import estimate
from quantkit.run.pipeline import quantize_checkpoint

from ..helpers.methods import METHODS
from ..helpers.stored import FORMS, store


@torch.no_grad()
def logits(model):
    return model(torch.arange(40).view(2, 20)).logits


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_as_what_it_stands_for(form, model_folder, tmp_path):
    folder = model_folder("llama_even")
    meant = store(folder, form, tmp_path / "stored")
    config = json.loads((tmp_path / "stored" / "config.json").read_text())
    shards = Dequantized(Shards(tmp_path / "stored"), config)
    found = dict(shards.read(shards.specs))
    assert found.keys() == Shards(folder).specs.keys() and len(meant) == 14
    for name, weight in meant.items():
        assert torch.equal(found[name], weight.bfloat16()), name
        assert shards.specs[name] == ("BF16", list(weight.shape))
    loaded = quantkit.load(tmp_path / "stored", dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = expected.state_dict() | {name: weight.bfloat16().float() for name, weight in meant.items()}
    expected.load_state_dict(state)
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama_small", "qwen3_moe"])
def test_quantized_from_another_form(family, model_folder, text_file, tmp_path):
    """As from a folder with the dequantized weights, byte by byte."""
    folder = model_folder(family)
    meant = store(folder, "fp8", tmp_path / "stored")
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in folder.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    with safe_open(folder / "model.safetensors", "pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}
    save_file(tensors | {n: w.bfloat16() for n, w in meant.items()}, plain / "model.safetensors", {"format": "pt"})
    recipe = Recipe(METHODS["gptq"], calibration=Calibration(str(text_file), 2, 64))
    report = quantize_checkpoint(tmp_path / "stored", recipe, tmp_path / "a")
    quantize_checkpoint(plain, recipe, tmp_path / "b")
    same = [Shards(tmp_path / name).checksums() for name in "ab"]
    assert same[0] == same[1]
    said = "the files hold the model as fp8, from which it is read; sizes are in its own dtype"
    assert said in report.notes and said in estimate(tmp_path / "stored", recipe).notes
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "quantkit"
    logits(quantkit.load(tmp_path / "a"))


def test_stacked_experts_in_mxfp4(model_folder, text_file, tmp_path):
    """As transformers has them; gpt_oss exists in no other form."""
    folder, stored = model_folder("gpt_oss"), tmp_path / "stored"
    stored.mkdir()
    generator, tensors, meant = torch.Generator().manual_seed(0), {}, {}
    with safe_open(folder / "model.safetensors", "pt") as shard:
        for name in shard.keys():
            tensor = shard.get_tensor(name)
            if name.endswith(("gate_up_proj", "down_proj")):
                experts, inputs, outputs = tensor.shape
                blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator).byte()
                scales = torch.randint(118, 123, blocks.shape[:-1], generator=generator).byte()
                tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
                meant[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
                assert meant[name].shape == tensor.shape
            else:
                tensors[name] = tensor
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (stored / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (stored / "config.json").write_text(json.dumps(config))
    shards = Dequantized(Shards(stored), config)
    for name, tensor in shards.read(meant):
        assert torch.equal(tensor, meant[name])
    text = Calibration(str(text_file), 2, 64)
    report = quantkit.quantize(stored, output=tmp_path / "packed", method="gptq", group_size=32, calibration=text)
    assert len(report.layers) == 2 * (4 + 2 * 4)
    full = quantkit.load(stored, dtype=torch.float32)
    packed = quantkit.load(tmp_path / "packed", dtype=torch.float32)
    assert 0 < (logits(full) - logits(packed)).norm() < 0.5 * logits(full).norm()


ODD = {
    "another method": ("gptq-4", {"quant_method": "hqq"}, None, "quantized already, by hqq, .* it reads fp8, "),
    "no bits": ("gptq-4", {"quant_method": "gptq"}, None, "are not what gptq has .KeyError: 'bits'"),
    "bits in words": ("gptq-4", {"bits": "four"}, None, "are not what gptq has"),
    "half a bit": ("gptq-4", {"bits": 4.5}, None, "whole bits"),
    "another layout": ("gptq-4", {"checkpoint_format": "marlin"}, None, "not marlin"),
    "other groups": ("gptq-4", {"group_size": 64}, ".g_idx", "groups of 64"),
    "an order that is lost": ("gptq-4", {"desc_act": True}, ".g_idx", "are not what gptq has .*g_idx"),
    "no scales": ("gptq-4", {}, "0.mlp.up_proj.scales", "are not what gptq has .*scales"),
    "no zeros": ("awq", {}, "0.mlp.up_proj.qzeros", "are not what awq has .*qzeros"),
    "3 bits": ("awq", {"bits": 3}, None, "of AWQ quantkit reads 4 bits"),
    "no factors": ("fp8", {}, "1.mlp.up_proj.weight_scale_inv", "stored in FP8, and its factors are not there"),
    "other blocks": ("fp8", {"weight_block_size": [64, 64]}, None, "parts do not go together"),
    "blocks unsaid": ("fp8", {"weight_block_size": None}, None, "parts do not go together"),
    "no blocks' factors": ("bnb-4", {}, "0.mlp.up_proj.weight.absmax", "are not what bitsandbytes has .*absmax"),
    "rows' factors": ("bnb-8", {}, "1.mlp.up_proj.weight", "are not what bitsandbytes has"),
    "no zeros of 3 bits": ("compressed-3-asym", {}, "up_proj.weight_zero_point", "are not what compressed-tensors has"),
    "by block": (
        "compressed-fp8", {"config_groups": {"a": {"weights": {"num_bits": 8, "strategy": "block"}}}}, None, "by block"
    ),
    "other groups than said": (
        "compressed-4", {"config_groups": {"a": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 64}}}},
        None, "are not what compressed-tensors has .*factors",
    ),
    "half a bit of MLX's": ("mlx-3", {"bits": 3.5}, None, "are not what mlx has .*3 bits in groups of 32"),
    "another mode": ("mlx-3", {"mode": "mxfp4"}, None, "MLX's mode 'mxfp4', and quantkit reads affine ones"),
    "no offsets": ("mlx-3", {}, "1.mlp.up_proj.biases", "are not what mlx has .*biases"),
    "no groups": ("compressed-4", {"config_groups": []}, None, "are not what compressed-tensors has"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_files_are_refused_in_a_line(case, model_folder, tmp_path):
    form, changed, without, words = ODD[case]
    store(model_folder("llama_even"), form, tmp_path / "stored")
    path = tmp_path / "stored" / "config.json"
    config = json.loads(path.read_text())
    said = changed if "quant_method" in changed else config["quantization_config"] | changed
    path.write_text(json.dumps(config | {"quantization_config": said}))
    if without:
        file = tmp_path / "stored" / "model.safetensors"
        with safe_open(file, "pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys() if not name.endswith(without)}
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(QuantkitError, match=words):
        quantkit.quantize(tmp_path / "stored", output=tmp_path / "packed", method="rtn", group_size=32)
