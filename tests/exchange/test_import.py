"""`quantkit import`: what others have quantized is packed with the very same numbers, and goes back the same."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import quantkit
from quantkit import RTN
from quantkit.cli.main import app
from quantkit.core.errors import QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.exchange.survey import survey
from quantkit.formats.int_group import IntGroupWeight
from quantkit.formats.ordered import OrderedWeight
from quantkit.formats.scaled import ScaledWeight
from quantkit.formats.tied import TiedWeight
from quantkit.io.checkpoint import contents, read_config
from quantkit.io.shards import Shards
from quantkit.io.stored_forms import Dequantized
from quantkit.kernels.int_group_layout import STORED, WHOLE

from ..conftest import CONFIGS
from ..helpers.ggufs import write_gguf
from ..helpers.stored import FORMS, store

STORED_FORMS = [form for form in FORMS if form.startswith(("gptq", "auto", "awq", "compressed")) and "fp8" not in form]


def layers_of(folder):
    shards, found = Shards(folder), {}
    state = dict(shards.read(shards.specs))
    for name, weight in contents(folder).layers.items():
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
        found[name] = QuantizedWeight.from_state(weight.metadata(), own)
    return found


@pytest.mark.parametrize("form", STORED_FORMS)
def test_the_same_numbers(form, model_folder, tmp_path):
    meant = store(model_folder("llama_even"), form, tmp_path / "stored")
    report = quantkit.import_model(tmp_path / "stored", tmp_path / "packed")
    packed = layers_of(tmp_path / "packed")
    assert {f"{name}.weight" for name in packed} == meant.keys() and len(report.layers) == 14
    for name, weight in packed.items():
        ordered = form.startswith(("gptq", "auto"))  # whose groups go by activation order
        assert isinstance(weight, OrderedWeight if ordered else IntGroupWeight)
        torch.testing.assert_close(weight.dequantize(), meant[f"{name}.weight"], rtol=1e-6, atol=0)
    model = quantkit.load(tmp_path / "packed", dtype=torch.float32)
    assert torch.isfinite(model(torch.arange(12)[None]).logits).all()


@pytest.mark.parametrize("form", ["gptq-4", "awq", "compressed-4"])
def test_experts_and_heads_are_taken(form, model_folder, tmp_path):
    """Experts' gate and up, which the files have apart, become one layer; a head is a layer too."""
    meant = store(model_folder("qwen3_moe"), form, tmp_path / "stored", ("lm_head.weight",))
    quantkit.import_model(tmp_path / "stored", tmp_path / "packed")
    packed = layers_of(tmp_path / "packed")
    assert "lm_head" in packed and len(packed) == 2 * 4 + 2 * 8 * 2 + 1
    for name, weight in packed.items():
        if name.endswith("gate_up_proj"):
            apart = [meant[f"{name.replace('gate_up', part)}.weight"] for part in ("gate", "up")]
            torch.testing.assert_close(weight.dequantize(), torch.cat(apart), rtol=1e-6, atol=0)
        else:
            torch.testing.assert_close(weight.dequantize(), meant[f"{name}.weight"], rtol=1e-6, atol=0)
    model = quantkit.load(tmp_path / "packed", dtype=torch.float32)
    assert torch.isfinite(model(torch.arange(12)[None]).logits).all()


@pytest.mark.parametrize("model, count", [("llama_even", 16), ("llama_tied", 16), ("mixtral", 26), ("qwen3_moe", 42)])
def test_what_mlx_has_quantized(model, count, model_folder, tmp_path):
    """By mlx-lm itself: offsets that are no whole numbers of steps; embedding, head and experts among the layers."""
    mlx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    import numpy as np

    folder = shutil.copytree(model_folder(model), tmp_path / "model")
    config = read_config(folder)
    older = {"num_experts": config.get("num_local_experts"), "rope_theta": 10000.0}  # as mlx-lm knows them
    (folder / "config.json").write_text(json.dumps(config | older))
    mlx_lm.convert(str(folder), str(tmp_path / "mlx"), True, 32, 4)
    found = survey(tmp_path / "mlx")
    assert found.by == "mlx" and all(matrix.format.startswith("mlx ") for matrix in found.layers.values())
    report = quantkit.import_model(tmp_path / "mlx", tmp_path / "packed")
    assert len(report.layers) == count
    theirs, _ = mlx_lm.load(str(tmp_path / "mlx"))
    theirs.set_dtype(mlx.float32)
    tokens = torch.arange(24).view(2, 12)
    expected = torch.from_numpy(np.array(theirs(mlx.array(tokens.numpy()))))
    dense = tmp_path / "dense"
    quantkit.quantize(tmp_path / "mlx", output=dense, bits=8, method="rtn", group_size=32)  # of what it stands for
    for folder, most in ((tmp_path / "packed", 5e-3 if count > 16 else 1e-4), (dense, 0.1)):  # bf16 for routers
        with torch.no_grad():
            found = quantkit.load(folder, dtype=torch.float32)(tokens).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=most * float(expected.abs().max()))
    quantkit.export(tmp_path / "packed", tmp_path / "again", to="mlx", dtype="bfloat16")
    first, again = (dict(shards.read(shards.specs)) for shards in map(Shards, (tmp_path / "mlx", tmp_path / "again")))
    kept = {name for name in first if ".gate." not in name}
    assert kept == {name for name in again if ".gate." not in name}
    assert all(torch.equal(first[name], again[name]) for name in kept if not name.endswith("biases"))


def test_products_in_an_order(model_folder, tmp_path):
    """Whatever runs them: packed, unpacked, with a correction."""
    store(model_folder("llama_even"), "gptq-3", tmp_path / "stored")
    quantkit.import_model(tmp_path / "stored", tmp_path / "packed")
    weight = layers_of(tmp_path / "packed")["model.layers.0.mlp.down_proj"]
    x, (rows, columns) = torch.randn(3, weight.shape[1]), weight.shape
    up, down, bias = torch.randn(rows, 2), torch.randn(2, columns), torch.randn(rows)
    dense = weight.dequantize()
    torch.testing.assert_close(weight.matmul(x), x @ dense.T, rtol=1e-4, atol=1e-4)
    corrected = x @ (dense + up @ down).T + bias
    torch.testing.assert_close(weight.matmul(x, bias, up, down), corrected, rtol=1e-4, atol=1e-3)
    assert torch.equal(weight.rows(torch.tensor([5, 1])), dense[[5, 1]])
    assert torch.equal(weight.cut(0, 8, 24).dequantize(), dense[8:24])
    with pytest.raises(ValueError, match="order of its own"):
        weight.cut(1, 0, 32)
    twice = weight.order.clone()
    twice[0] = twice[1]
    with pytest.raises(ValueError, match="each input once"):
        OrderedWeight(weight.base, twice).validate()


def test_layers_with_one_order_are_fused(model_folder, tmp_path):
    store(model_folder("llama_even"), "gptq-4", tmp_path / "stored")
    quantkit.import_model(tmp_path / "stored", tmp_path / "packed")
    model, tokens = quantkit.load(tmp_path / "packed", dtype=torch.float32, unpack=False), torch.arange(24).view(2, 12)
    with torch.no_grad():
        apart = model(tokens).logits
        assert quantkit.fuse(model) == 2 * len(model.model.layers)
        torch.testing.assert_close(model(tokens).logits, apart, rtol=0, atol=1e-5 * float(apart.abs().max()))
    model.save_pretrained(tmp_path / "again")
    before, after = layers_of(tmp_path / "packed"), layers_of(tmp_path / "again")
    for name, weight in before.items():
        assert all(torch.equal(tensor, after[name].state()[key]) for key, tensor in weight.state().items())
    gate = layers_of(tmp_path / "packed")["model.layers.0.mlp.gate_proj"]
    assert QuantizedWeight.side_by_side([gate, OrderedWeight(gate.base, gate.order.flip(0))]) is None


def test_an_order_of_inputs_goes_back(model_folder, tmp_path):
    pytest.importorskip("compressed_tensors")
    store(model_folder("llama_even"), "gptq-4", tmp_path / "stored")
    quantkit.import_model(tmp_path / "stored", tmp_path / "packed")
    quantkit.export(tmp_path / "packed", tmp_path / "back", to="gptq")
    asked = read_config(tmp_path / "back")["quantization_config"]
    assert asked["desc_act"] and asked["bits"] == 4 and asked["group_size"] == 32
    before, after = (dict(Shards(tmp_path / name).read(Shards(tmp_path / name).specs)) for name in ("stored", "back"))
    parts = [name for name in before if name.endswith(("qweight", "qzeros", "scales", "g_idx"))]
    assert len(parts) == 4 * 14 and all(torch.equal(before[name], after[name]) for name in parts)
    with pytest.raises(QuantkitError, match="groups of inputs that lie apart; `--to gptq` has them"):
        quantkit.export(tmp_path / "packed", tmp_path / "out", to="compressed-tensors")


def test_loaded_by_transformers_as_here(model_folder, tmp_path):
    pytest.importorskip("compressed_tensors")
    quantkit.quantize(model_folder("llama_even"), output=tmp_path / "a", bits=4, method="rtn", group_size=32)
    quantkit.export(tmp_path / "a", tmp_path / "stored", to="compressed-tensors")
    quantkit.import_model(tmp_path / "stored", tmp_path / "packed")
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "stored", dtype=torch.float32)(tokens).logits
        ours = quantkit.load(tmp_path / "packed", dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("to, bits", [("gptq", 3), ("gptq", 4), ("compressed-tensors", 3), ("compressed-tensors", 6)])
def test_there_and_back_again(to, bits, model_folder, tmp_path):
    """The same weights after export and import, and the same codes and scales after another export."""
    quantkit.quantize(model_folder("llama_even"), output=tmp_path / "a", bits=bits, method="rtn", group_size=32)
    quantkit.export(tmp_path / "a", tmp_path / "b", to=to)
    quantkit.import_model(tmp_path / "b", tmp_path / "c")
    first, second = layers_of(tmp_path / "a"), layers_of(tmp_path / "c")
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name].dequantize(), second[name].dequantize())
    quantkit.export(tmp_path / "c", tmp_path / "d", to=to)
    before, after = (dict(Shards(tmp_path / name).read(Shards(tmp_path / name).specs)) for name in "bd")
    shared = before.keys() & after.keys()
    assert sum(name.endswith(("weight_packed", "qweight")) for name in shared) == 14
    assert all(torch.equal(before[name], after[name]) for name in shared)


def test_layers_of_different_bits_and_groups(model_folder, tmp_path):
    rules = {"*down_proj": RTN(6, group_size=32), "*o_proj": RTN(4, group_size=-1)}
    folder = model_folder("llama_even")
    quantkit.quantize(folder, output=tmp_path / "a", bits=4, method="rtn", group_size=32, rules=rules)
    quantkit.export(tmp_path / "a", tmp_path / "b", to="compressed-tensors")
    quantkit.import_model(tmp_path / "b", tmp_path / "c")
    first, second = layers_of(tmp_path / "a"), layers_of(tmp_path / "c")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].dequantize(), second[name].dequantize()) for name in first)
    assert len(survey(tmp_path / "b").layers) == 14


def test_stopped_and_gone_on_with(model_folder, tmp_path):
    store(model_folder("llama_even"), "awq", tmp_path / "stored")

    def stop(done, _total, _name):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantkit.import_model(tmp_path / "stored", tmp_path / "out", progress=stop)
    quantkit.import_model(tmp_path / "stored", tmp_path / "out", resume=True)
    quantkit.import_model(tmp_path / "stored", tmp_path / "whole")
    assert Shards(tmp_path / "out").checksums() == Shards(tmp_path / "whole").checksums()


def test_refused(model_folder, tmp_path):
    folder = model_folder("llama_even")
    with pytest.raises(QuantkitError, match="holds no quantized model"):
        quantkit.import_model(folder, tmp_path / "out")
    store(folder, "bnb-4", tmp_path / "bnb")
    with pytest.raises(QuantkitError, match="stored as bitsandbytes, and no layer of its blocks as whole numbers"):
        quantkit.import_model(tmp_path / "bnb", tmp_path / "out")


def changed_scales(folder, form, output, change):
    """A stored model whose first block's down_proj has other scales; the name of that layer."""
    store(folder, form, output)
    shards = Shards(output)
    tensors = dict(shards.read(shards.specs))
    layer = "model.layers.0.mlp.down_proj"
    name = f"{layer}.weight_scale"
    tensors[name] = change(tensors[name].float())
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return layer


def test_small_scales_of_bf16_are_taken(model_folder, tmp_path):
    def small(scales):
        scales = scales.bfloat16()
        scales[:, :1] = 2.0**-21 * 1.3125  # of which fp16 has three binary digits
        return scales

    layer = changed_scales(model_folder("llama_even"), "compressed-4", tmp_path / "stored", small)
    report = quantkit.import_model(tmp_path / "stored", tmp_path / "out")
    assert len(report.layers) == 14 and not any("does not hold" in note for note in report.notes)
    weight = layers_of(tmp_path / "out")[layer]
    assert isinstance(weight, ScaledWeight) and float(weight.factor) < 1
    shards = Dequantized(Shards(tmp_path / "stored"), read_config(tmp_path / "stored"))
    assert torch.equal(weight.dequantize(), shards.numbers(f"{layer}.weight").values())


def test_scales_beyond_fp16_leave_a_layer_dense(model_folder, tmp_path):
    folder = model_folder("llama_even")
    layer = changed_scales(folder, "compressed-4", tmp_path / "stored", lambda scales: scales * (1 + 2**-14))
    report = quantkit.import_model(tmp_path / "stored", tmp_path / "out")
    assert len(report.layers) == 13 and layer not in {one.name for one in report.layers}
    assert any(f"{layer} stay dense: fp16 does not hold their scales" in note for note in report.notes)
    model = quantkit.load(tmp_path / "out", dtype=torch.float32)
    assert torch.isfinite(model(torch.arange(12)[None]).logits).all()


def test_no_layer_that_can_be_taken(model_folder, tmp_path):
    store(model_folder("llama_even"), "compressed-4", tmp_path / "stored")
    tensors = dict(Shards(tmp_path / "stored").read(Shards(tmp_path / "stored").specs))
    odd = {name: tensor.float() * (1 + 2**-14) for name, tensor in tensors.items() if name.endswith("weight_scale")}
    save_file(tensors | odd, tmp_path / "stored" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantkitError, match=r"nothing can be taken as it is: .* and 12 others stay dense"):
        quantkit.import_model(tmp_path / "stored", tmp_path / "out")


def test_awq_whose_config_does_not_say_the_groups(model_folder, tmp_path):
    meant = store(model_folder("llama_even"), "awq", tmp_path / "stored")
    config = json.loads((tmp_path / "stored" / "config.json").read_text())
    del config["quantization_config"]["group_size"]
    (tmp_path / "stored" / "config.json").write_text(json.dumps(config))
    quantkit.import_model(tmp_path / "stored", tmp_path / "out")
    for name, weight in layers_of(tmp_path / "out").items():
        torch.testing.assert_close(weight.dequantize(), meant[f"{name}.weight"], rtol=1e-6, atol=0)


def test_the_command(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store(model_folder("llama_even"), "awq", tmp_path / "stored")
    said = CliRunner().invoke(app, ["import", str(tmp_path / "stored"), "--output", str(tmp_path / "out")])
    assert said.exit_code == 0 and "14 layers as they were" in said.stdout, said.output
    again = CliRunner().invoke(app, ["import", str(tmp_path / "stored"), "--json"])
    assert again.exit_code == 0 and json.loads(again.stdout)["output"].endswith("stored-quantkit")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_of_a_gguf_file(kind, tied, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    config = deepcopy(CONFIGS["llama_even"])
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, :64] = 0.0  # blocks without a step
        model.model.layers[1].mlp.down_proj.weight[4, :32] = -0.375
    write_gguf(tmp_path / "model.gguf", model, tokenizer, kind)  # which rounds the model's own weights
    report = quantkit.import_model(tmp_path / "model.gguf", tmp_path / "packed")
    packed, state = layers_of(tmp_path / "packed"), model.state_dict()
    ends = {name: weight for name, weight in packed.items() if "layers" not in name}
    assert len(packed) == 14 + 2 and len(ends) == 2 and len(report.layers) == 16
    assert sum(isinstance(weight, TiedWeight) for weight in ends.values()) == tied
    for name, weight in packed.items():
        if isinstance(weight, TiedWeight):
            continue
        assert isinstance(weight, IntGroupWeight) and weight.bits == int(kind[1])
        assert weight.zero == (STORED if kind.endswith("1") else WHOLE)
        close = {"rtol": 0, "atol": 0 if kind.endswith("0") else 1e-6}
        torch.testing.assert_close(weight.dequantize(), state[f"{name}.weight"], **close)
    tokens = torch.arange(24).view(2, 12)
    ours = quantkit.load(tmp_path / "packed", dtype=torch.float32)
    with torch.no_grad():
        logits = model(tokens).logits
        torch.testing.assert_close(ours(tokens).logits, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    quantkit.export(tmp_path / "packed", tmp_path / "again.gguf", to="gguf")
    first, again = (survey(tmp_path / name).layers for name in ("model.gguf", "again.gguf"))
    blocks = {name: matrix for name, matrix in first.items() if name.startswith("blk.")}
    assert blocks == {name: matrix for name, matrix in again.items() if name in blocks}


@pytest.mark.parametrize("bits", [4, 8])
def test_experts_of_a_gguf_file(bits, tokenizer, tmp_path, monkeypatch):
    """All of a block lie in one tensor there, gate and up in one each."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    config = deepcopy(CONFIGS["qwen3_moe"])
    config.norm_topk_prob = True
    config.save_pretrained(tmp_path / "source")
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    quantkit.quantize(tmp_path / "source", output=tmp_path / "packed", bits=bits, method="rtn", group_size=32)
    quantkit.export(tmp_path / "packed", tmp_path / "model.gguf", to="gguf")
    report = quantkit.import_model(tmp_path / "model.gguf", tmp_path / "again")
    before, after = (layers_of(tmp_path / name) for name in ("packed", "again"))
    assert before.keys() == after.keys() and len(report.layers) == len(before) == 40
    for name, weight in before.items():
        assert torch.equal(weight.dequantize(), after[name].dequantize())


def test_a_gguf_file_without_such_blocks(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    model = AutoModelForCausalLM.from_config(CONFIGS["llama_even"]).float()
    write_gguf(tmp_path / "model.gguf", model, tokenizer, "F16")
    with pytest.raises(QuantkitError, match="no layer of its blocks as whole numbers with scales"):
        quantkit.import_model(tmp_path / "model.gguf", tmp_path / "packed")
