"""peft's adapters on packed layers: by its plain calls, merged exactly, saved and counted; or refused in words."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import GPTQ, RTN, Calibration, Hadamard, LowRank, Recipe
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.formats.low_rank import LowRankWeight, plus
from quantkit.formats.scaled import ScaledWeight
from quantkit.io.checkpoint import contents
from quantkit.io.source import open_folder
from quantkit.models.linear import QuantizedLinear
from quantkit.models.lora import PackedLoraLinear
from quantkit.models.unpacking import choose_unpacked
from quantkit.quantizers.factor import quantized
from quantkit.run.pipeline import quantize_checkpoint

from ..conftest import ROOT, VOCABULARY

TOKENS = torch.arange(40).view(2, 20) * 37 % VOCABULARY
ALL = "all-linear"


def check_merged(found, wanted, before):
    """Factors in fp16 instead of an adapter in fp32: a small part of what the adapter does to logits."""
    assert float((wanted - before).abs().max()) > 0.3
    assert float((found - wanted).norm() / (wanted - before).norm()) < 5e-3  # 1 where the adapter is dropped


def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def packed(model_folder):
    return quantkit.quantize(dense(model_folder("llama_small")), method=RTN(4, 32))


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def adapted(model, name="default", seed=0, **settings):
    """With an adapter that does something."""
    settings = {"r": 3, "target_modules": ALL} | settings
    if isinstance(model, PeftModel):
        model.add_adapter(name, LoraConfig(**settings))
    else:
        model = get_peft_model(model, LoraConfig(**settings), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key and f".{name}." in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def test_all_linear_layers_are_found_without_a_warning(packed):
    names = [name for name, module in packed.named_modules() if isinstance(module, QuantizedLinear)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = adapted(packed)
    found = [name for name, module in model.base_model.model.named_modules() if isinstance(module, PackedLoraLinear)]
    assert found == names
    assert isinstance(packed.lm_head, torch.nn.Linear), "which is dense here, and left alone by peft"


def test_wrapping_unpacks_nothing(packed, monkeypatch):
    """peft asks each layer many times where it is."""

    def refuse(*_args):
        raise AssertionError("a weight is unpacked")

    monkeypatch.setattr(packed.model.layers[0].mlp.up_proj.packed.__class__, "dequantize", refuse)
    adapted(packed)


METHODS = {
    "rtn": RTN(4, 32),
    "hadamard-gptq": Hadamard(GPTQ(3, 32)),
    "low-rank": LowRank(RTN(3, 32), 2),
    "low-rank-8-bits": LowRank(RTN(3, 32), 2, adapter_bits=8),
    "hadamard-low-rank": Hadamard(LowRank(GPTQ(3, 32), 2)),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
def test_merged_adapters_stay_when_saved_and_are_counted(method, safe, model_folder, tokenizer, texts, tmp_path):
    model = quantkit.quantize(
        dense(model_folder("llama_small")), tokenizer, method=method, calibration=Calibration(texts, 4, 64)
    )
    before, plain = logits(model), {n: m.packed for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    peft = adapted(model)
    wanted = logits(peft)
    merged = peft.merge_and_unload(safe_merge=safe)
    assert merged is model
    found = logits(merged)
    check_merged(found, wanted, before)
    for name, weight in plain.items():
        layer = merged.get_submodule(name)
        assert type(layer) is QuantizedLinear
        assert layer.packed.nbytes == weight.nbytes + 2 * 3 * sum(weight.shape)
        assert all(torch.equal(tensor, layer.packed.state()[_moved(key, layer)]) for key, tensor in _codes(weight))
    merged.save_pretrained(tmp_path)
    loaded = quantkit.load(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(loaded), found)
    bits = [m.packed.bits_per_weight for m in loaded.modules() if isinstance(m, QuantizedLinear)]
    assert bits == [merged.get_submodule(name).packed.bits_per_weight for name in plain]


def _codes(weight):
    return [(name, tensor) for name, tensor in weight.state().items() if tensor.dtype == torch.int32]


def _moved(key, layer):
    state = layer.packed.state()
    return key if key in state else f"base.{key}"


@pytest.mark.parametrize("architecture", ["llama_small", "llama_tied_small"])
def test_a_models_report_counts_merged_adapters(architecture, model_folder, tmp_path):
    """As it is when it is asked for: of the merged model what a checkpoint of it holds, else what the run found."""
    model = quantkit.quantize(dense(model_folder(architecture)), method=RTN(4, 32), head_bits=4)
    before = quantkit.report(model)
    peft = adapted(model, target_modules=["q_proj", "down_proj"])
    assert quantkit.report(model) == before == model.quantkit_report, "an adapter beside a layer is no part of it"
    peft.merge_adapter()
    inside = quantkit.report(model)
    merged = peft.merge_and_unload()
    report = quantkit.report(merged)
    assert report == inside == quantkit.report(copy.deepcopy(merged))
    merged.save_pretrained(tmp_path)
    found = contents(tmp_path)
    assert report.bits_per_weight == pytest.approx(found.bits_per_weight, rel=1e-12)
    assert report.bits_per_weight > before.bits_per_weight + 0.05
    assert report.bytes_after - before.bytes_after == sum(
        2 * 3 * sum(found.layers[layer.name].shape) for layer in report.layers if "rank 3" in layer.format
    )
    assert {layer.name: layer.bits_per_weight for layer in report.layers} == {
        name: weight.bits_per_weight for name, weight in found.layers.items()
    }
    changed = {layer.name.rsplit(".")[-1] for layer in report.layers if layer not in before.layers}
    assert changed == {"q_proj", "down_proj"}
    again = adapted(merged, target_modules=["q_proj"])
    again.merge_adapter()
    assert quantkit.report(merged).bytes_after > report.bytes_after
    again.unmerge_adapter()
    assert quantkit.report(merged) == report


def test_models_that_no_run_has_packed_have_no_report(model_folder):
    with pytest.raises(QuantkitError, match="not quantized in memory"):
        quantkit.report(dense(model_folder("llama_small")))


def test_ranks_of_several_merges_add_up(packed):
    before = logits(packed)
    model = adapted(packed, "first", r=2)
    adapted(model, "second", seed=1, r=3, lora_alpha=16, use_rslora=True)
    model.base_model.set_adapter(["first", "second"])
    wanted = logits(model)
    merged = model.merge_and_unload()
    check_merged(logits(merged), wanted, before)
    weight = merged.model.layers[1].mlp.down_proj.packed
    assert type(weight) is LowRankWeight and weight.rank == 5 and not isinstance(weight.base, LowRankWeight)
    again = adapted(merged, seed=2, r=4)
    before, wanted = wanted, logits(again)
    check_merged(logits(again.merge_and_unload()), wanted, before)
    assert merged.model.layers[1].mlp.down_proj.packed.rank == 9


def test_merging_is_undone_exactly(packed, tmp_path):
    before, state = logits(packed), {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    model = adapted(packed, "first")
    adapted(model, "second", seed=1)
    model.set_adapter("second")
    wanted = logits(model)
    model.merge_adapter()
    check_merged(logits(model), wanted, before)
    model.merge_adapter(["first"])
    assert float((logits(model) - wanted).abs().max()) > 0.1
    model.unmerge_adapter()
    assert torch.equal(logits(model), wanted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    plain = model.unload()
    assert torch.equal(logits(plain), before)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in state.items())
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(quantkit.load(tmp_path, dtype=torch.float32)), before)


def test_copies_of_merged_models_are_their_own(packed):
    model = adapted(packed)
    model.merge_adapter()
    merged, other = logits(model), copy.deepcopy(model)
    other.unmerge_adapter()
    assert torch.equal(logits(model), merged) and not torch.equal(logits(other), merged)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_corrections_of_layers_of_any_size(size):
    generator = torch.Generator().manual_seed(0)
    weight = quantized(LowRank(RTN(3, 16), 1), size * torch.randn(24, 32, generator=generator), STATS)
    up, down = size * 30 * torch.randn(24, 2, generator=generator), 0.01 * torch.randn(2, 32, generator=generator)
    found = plus(weight, up, down)
    found.validate()
    wanted = weight.dequantize().double() + up.double() @ down.double()
    assert float((found.dequantize() - wanted).norm() / wanted.norm()) < 1e-3
    inner = found.base if size != 1 else found
    assert isinstance(inner, LowRankWeight) and inner.rank == 3 and (size == 1 or isinstance(found, ScaledWeight))
    zero = plus(quantized(RTN(3, 16), torch.zeros(24, 32), None), up, down)
    assert float((zero.dequantize() - up @ down).norm() / (up @ down).norm()) < 3e-3


STATS = quantkit.core.stats.LayerStats(torch.eye(32), num_tokens=1)


@pytest.mark.parametrize("architecture", ["gpt2_small", "llama_tied_small"])
def test_other_architectures(architecture, model_folder, tmp_path):
    """Biases; Conv1D, whose adapters say that weights are [in, out]; a head whose rows are the embedding's."""
    model = quantkit.quantize(dense(model_folder(architecture)), method=RTN(4, 32), head_bits=4)
    before = logits(model)
    peft = adapted(model, fan_in_fan_out=architecture == "gpt2_small")
    wanted = logits(peft)
    merged = peft.merge_and_unload()
    check_merged(logits(merged), wanted, before)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(quantkit.load(tmp_path, dtype=torch.float32)), logits(merged))


def test_biases_of_adapters_are_merged_or_refused(model_folder, packed):
    model = quantkit.quantize(dense(model_folder("gpt2_small")), method=RTN(4, 32))
    before = logits(model)
    peft = adapted(model, lora_bias=True, target_modules=["c_fc"])
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.normal_()
    wanted = logits(peft)
    peft.merge_adapter()
    check_merged(logits(peft), wanted, before)
    peft.unmerge_adapter()
    assert torch.equal(logits(peft), wanted)
    with pytest.raises(QuantkitError, match="has a bias, and the packed layer none"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted(packed, lora_bias=True).merge_adapter()


def test_fused_layers_are_merged(packed, tmp_path):
    choose_unpacked(packed, False)
    assert quantkit.fuse(packed)
    before = logits(packed)
    peft = adapted(packed, target_modules=["q_proj", "up_proj"])
    wanted = logits(peft)
    peft.merge_adapter()
    check_merged(logits(peft), wanted, before)
    peft.unmerge_adapter()
    torch.testing.assert_close(logits(peft), wanted, rtol=1e-4, atol=1e-5)
    merged = peft.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = quantkit.load(tmp_path, dtype=torch.float32, unpack=False)
    check_merged(logits(loaded), wanted, before)


def test_a_head_that_is_the_embedding_too_is_not_merged(model_folder):
    model = quantkit.quantize(dense(model_folder("llama_tied_small")), method=RTN(4, 32), head_bits=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = adapted(model, target_modules=["lm_head"])
    with pytest.raises(QuantkitError, match="the input embedding's too"):
        peft.merge_adapter()


@pytest.mark.parametrize(
    "settings", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}], ids=["pissa", "olora"]
)
def test_inits_that_move_the_base_weight_are_refused(settings, packed):
    with pytest.raises(QuantkitError, match="a packed layer's weight is a copy"):
        get_peft_model(packed, LoraConfig(r=2, target_modules=["q_proj"], **settings))


def test_what_is_no_plain_lora_runs_and_is_not_merged(packed):
    before = logits(packed)
    for config in (
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        LoHaConfig(r=2, target_modules=["q_proj"]),
    ):
        peft = get_peft_model(packed, config)
        torch.testing.assert_close(logits(peft), before, rtol=1e-4, atol=1e-5)
        with pytest.raises(QuantkitError, match=r"take up plain LoRA|a change of it would be lost"):
            peft.merge_and_unload()
        assert torch.equal(logits(peft.unload()), before)


def test_damaged_adapters_are_not_merged(packed):
    peft = adapted(packed)
    with torch.no_grad():
        next(p for name, p in peft.named_parameters() if "lora_A" in name)[0, 0] = float("nan")
    with pytest.raises(QuantkitError, match="NaN or Inf"):
        peft.merge_and_unload()


def test_saved_adapters_come_back_by_plain_calls(packed, tmp_path):
    packed.save_pretrained(tmp_path / "packed")
    peft = adapted(packed)
    wanted = logits(peft)
    peft.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantkit.load(tmp_path / "packed", dtype=torch.float32), tmp_path / "adapter")
    assert torch.equal(logits(again), wanted)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), wanted)


def test_peft_may_be_imported_first(packed, tmp_path):
    """In a process of its own, which imports nothing else of quantkit."""
    packed.save_pretrained(tmp_path / "packed")
    peft = adapted(packed)
    peft.save_pretrained(tmp_path / "adapter")
    torch.save(logits(peft), tmp_path / "wanted")
    code = (
        "import sys, torch, peft, quantkit; folder = sys.argv[1]\n"
        "base = quantkit.load(folder + '/packed', dtype=torch.float32)\n"
        "model = peft.PeftModel.from_pretrained(base, folder + '/adapter').merge_and_unload()\n"
        f"found = model(torch.arange(40).view(2, 20) * 37 % {VOCABULARY}).logits\n"
        "torch.testing.assert_close(found, torch.load(folder + '/wanted'), atol=5e-3, rtol=0)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, str(tmp_path)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_unmerged_adapters_are_not_saved_with_the_model(packed, tmp_path):
    model = adapted(packed).base_model.model
    with pytest.raises(QuantkitError, match=r"has an adapter that is not merged; merge_and_unload\(\) first"):
        model.save_pretrained(tmp_path)


def test_unmerged_adapters_are_not_tuned(packed):
    model = adapted(packed).base_model.model
    with pytest.raises(QuantkitError, match=r"q_proj has an adapter; merge_and_unload\(\) first"):
        quantkit.finetune(model)


def test_layers_of_pefts_own_refuse_to_merge(packed):
    """Should peft not let itself be told of packed layers, nothing is lost in silence."""
    layer = Linear(packed.model.layers[0].mlp.up_proj, "default", LoraConfig(r=2), r=2)
    for safe in (False, True):
        with pytest.raises(QuantkitError, match="a change of it would be lost"):
            layer.merge(safe_merge=safe)
    assert not layer.merged


UNMERGED = r"an adapter that is not merged .*merge_and_unload"


def test_models_with_adapters_are_not_quantized(model_folder, tmp_path):
    model = dense(model_folder("llama_small"))
    peft = adapted(model)
    peft.save_pretrained(tmp_path / "adapter")
    for asked in (peft, model):
        with pytest.raises(QuantkitError, match=UNMERGED):
            quantkit.quantize(asked, method="rtn")
    merged = peft.merge_and_unload()
    quantized_model = quantkit.quantize(merged, method=RTN(4, 32))
    assert isinstance(quantized_model.model.layers[1].mlp.down_proj, QuantizedLinear)
    with pytest.raises(QuantkitError, match="Linear is no transformers model"):
        quantkit.quantize(torch.nn.Linear(4, 4), method="rtn")


def test_folders_with_adapters_are_not_quantized(model_folder, tokenizer, tmp_path):
    folder, recipe = model_folder("llama_small"), Recipe(RTN(4, 32))
    peft = adapted(dense(folder))
    peft.save_pretrained(tmp_path / "adapter")
    peft.base_model.model.save_pretrained(tmp_path / "wrapped")
    dense(folder).save_pretrained(tmp_path / "both")
    peft.save_pretrained(tmp_path / "both")
    tokenizer.save_pretrained(tmp_path / "both")
    for name, message in (
        ("adapter", "is an adapter and no model; merge it first"),
        ("wrapped", UNMERGED),
        ("both", "holds an adapter beside the model; merge it first"),
    ):
        with pytest.raises((QuantkitError, CheckpointError), match=message):
            quantize_checkpoint(tmp_path / name, recipe, tmp_path / "out")
        with pytest.raises((QuantkitError, CheckpointError), match=message):
            open_folder(tmp_path / name, structure_only=True)
    for name in ("adapter", "both"):
        with pytest.raises((QuantkitError, CheckpointError), match=r"merge it first|not merged"):
            quantkit.quantize(tmp_path / name, method="rtn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "both", "wrapped"]


def test_a_packed_weight_is_not_written_to_in_silence(packed):
    layer = packed.model.layers[0].mlp.up_proj
    weight, kept = layer.weight, layer.packed.dequantize()
    changes = [
        lambda: weight.add_(1), lambda: weight.data.copy_(weight), lambda: weight.__setitem__(0, 0.0),
        lambda: torch.nn.init.zeros_(weight.data), lambda: torch.add(kept, 1, out=weight), lambda: weight.__iadd__(1),
        lambda: weight.detach().mul_(2), lambda: weight.fill_(0), lambda: setattr(weight, "data", kept),
        lambda: weight.data.__imul__(2), lambda: setattr(layer, "weight", kept + 1),
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(QuantkitError, match="a packed layer's weight is a copy"):
            change()
    with pytest.raises(KeyError):
        layer.weight = torch.nn.Parameter(kept)
    layer.weight = layer.weight  # as peft does where adapters are taken off
    assert torch.equal(weight, kept)
    assert type(weight + 1) is type(weight.float() @ kept.T) is torch.Tensor
    assert weight.requires_grad_(False).shape == weight.shape
    assert torch.equal(packed.get_input_embeddings().weight, packed.get_input_embeddings().weight)
