"""Blocks that are called at several depths: packed once, by what flows at the first of them, and in place at all."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Zamba2Config, ZambaConfig

import quantkit
from quantkit import GPTQ, Calibration, Recipe
from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Needs
from quantkit.evals.architecture_sizes import small
from quantkit.io.classes import meta_model
from quantkit.io.shards import Shards
from quantkit.io.source import open_folder
from quantkit.io.weights import LoadedWeights
from quantkit.models.linear import QuantizedLinear
from quantkit.models.plan import Tied
from quantkit.models.structure import block_linears, shared_layers
from quantkit.models.ties import tied_names
from quantkit.run.estimate import estimate
from quantkit.run.pipeline import quantize_checkpoint
from quantkit.run.sequential import Walker
from quantkit.tuning.end_to_end import tune
from quantkit.tuning.settings import TuningSettings

from ..helpers.checkpoints import digest, interrupted
from ..helpers.methods import spy

KINDS = {"zamba": ZambaConfig, "zamba2": Zamba2Config}
each = pytest.mark.parametrize("kind", KINDS)
ADAPTER = "model.layers.{}.shared_transformer.self_attn.linear_q_adapter_list.{}.0"


def build(kind):
    """Of Zamba 2, two shared blocks that are called twice each, with adapters at each place."""
    torch.manual_seed(0)
    config = small(KINDS[kind]())
    if kind == "zamba2":
        config.num_hidden_layers, config.hybrid_layer_ids = 5, [1, 2, 3, 4]
        config.layers_block_type = ["linear_attention", *["hybrid"] * 4]
        config.num_mem_blocks, config.use_shared_attention_adapter = 2, True
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture
def folder(kind, tmp_path, tokenizer):
    build(kind).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def recipe(text_file):
    return Recipe(GPTQ(3, 32), calibration=Calibration(str(text_file), 3, 64))


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


TOKENS = torch.arange(10, 50).view(2, 20)


@each
def test_packed_once_resumed_and_loaded(kind, folder, recipe, tmp_path):
    told = estimate(folder, recipe, "cpu")
    report = quantize_checkpoint(folder, recipe, tmp_path / "whole")
    interrupted(folder, recipe, tmp_path / "resumed", after=3 if kind == "zamba2" else 2)
    quantize_checkpoint(folder, recipe, tmp_path / "resumed", resume=True)
    assert digest(tmp_path / "whole") == digest(tmp_path / "resumed")
    source = meta_model(folder, None)
    shared = shared_layers(source)
    assert {layer.name for layer in report.layers} == {*block_linears(source), *shared}
    assert report.packed_weights == sum(module.weight.numel() for module in block_linears(source).values())
    assert report.packed_weights == told.packed_weights and report.bytes_after == told.bytes_after
    assert any("share weights with earlier blocks" in note for note in report.notes)
    written = Shards(tmp_path / "whole").specs
    assert not any(name.startswith(f"{layer}.") for name in written for layer in shared)
    assert {name for name in Shards(folder).specs if name not in written} == {
        f"{layer}.weight" for layer in [*block_linears(source), *shared] if f"{layer}.weight" in Shards(folder).specs
    }

    packed = quantkit.load(tmp_path / "whole", dtype=torch.float32).eval()
    assert all(packed.get_submodule(layer) is packed.get_submodule(first) for layer, first in shared.items())
    dense = quantkit.load(folder, dtype=torch.float32).eval()
    for layer in block_linears(source):  # of the full model, whose shared weights are one still
        weight = packed.get_submodule(layer).packed.dequantize()
        dense.get_submodule(layer).weight.data.copy_(weight)
    found = logits(packed, TOKENS)
    torch.testing.assert_close(found, logits(dense, TOKENS), rtol=0, atol=1e-5 * float(found.abs().max()))
    packed.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    packed.dequantize(torch.float32)
    packed.save_pretrained(tmp_path / "dense")
    for plain in (packed, AutoModelForCausalLM.from_pretrained(tmp_path / "dense")):
        torch.testing.assert_close(logits(plain.eval(), TOKENS), found, rtol=0, atol=1e-5 * float(found.abs().max()))


@each
def test_in_memory_and_saved(kind, folder, recipe, tmp_path):
    """What is packed in memory is what is packed from the folder, and saves as a checkpoint that loads."""
    quantize_checkpoint(folder, recipe, tmp_path / "whole")
    model = quantkit.load(folder, dtype=torch.float32).eval()
    shared = shared_layers(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    quantkit.quantize(model, tokenizer, method=recipe.quantizer, calibration=recipe.calibration)
    found = logits(model, TOKENS)
    assert torch.equal(found, logits(quantkit.load(tmp_path / "whole", dtype=torch.float32).eval(), TOKENS))
    assert all(model.get_submodule(layer) is model.get_submodule(first) for layer, first in shared.items())
    model.save_pretrained(tmp_path / "saved")
    again = quantkit.load(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(again, TOKENS), found)
    again.save_pretrained(tmp_path / "saved-again")
    assert torch.equal(logits(quantkit.load(tmp_path / "saved-again", dtype=torch.float32).eval(), TOKENS), found)


def places(model):
    """The places of each packed layer."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLinear):
            found.setdefault(module, []).append(name)
    return [*found.values()]


@each
def test_tuned_and_trained_as_one(kind, folder, recipe, tmp_path):
    """At all its places; what is saved while it trains and afterwards loads as it is."""
    quantize_checkpoint(folder, recipe, tmp_path / "packed")
    model = quantkit.load(tmp_path / "packed", device="cpu", dtype="float32")
    before, at = logits(model, TOKENS), places(model)
    assert any(len(names) > 1 for names in at)
    settings = TuningSettings(2, 2, 2, held_out=1, evaluate_every=1)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in teacher.parameters():
        parameter.data.mul_(1.2)  # far enough from the packed model that every step brings it nearer
    tune(model, teacher, AutoTokenizer.from_pretrained(folder), calibration=recipe.calibration, settings=settings)
    assert places(model) == at
    tuned = logits(model, TOKENS)
    assert not torch.equal(tuned, before)
    model.save_pretrained(tmp_path / "tuned")
    assert torch.equal(logits(quantkit.load(tmp_path / "tuned", device="cpu", dtype="float32"), TOKENS), tuned)
    quantkit.finetune(model, 2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        nn.init.constant_(parameter, 2.0**-4)  # which fp16 holds
    learnt = logits(model, TOKENS)
    assert (learnt - tuned).abs().max() > 1e-3
    for name in ("training", "more", "finished"):
        if name == "more":  # by an optimizer that tells nobody
            for parameter in trained:
                parameter.data.add_(2.0**-5)
            learnt = logits(model, TOKENS)
        model = quantkit.finished(model) if name == "finished" else model
        model.save_pretrained(tmp_path / name)
        found = logits(quantkit.load(tmp_path / name, device="cpu", dtype="float32"), TOKENS)
        torch.testing.assert_close(found, learnt, rtol=1e-4, atol=1e-4)
    assert places(model) == at


@each
def test_each_place_sees_its_own_streams(kind, tokenizer, texts):
    """The last block's moments are of the full model's and the packed model's inputs there, shared blocks and all."""
    model, seen = build(kind), {}
    full = copy.deepcopy(model)
    layer = next(name for name in reversed([*block_linears(model)]) if name.endswith("mamba.in_proj"))
    windows = Calibration(texts, 2, 64).sequences(tokenizer, model)
    quantizer = spy(Needs.CROSS, seen)(2, 32)
    plan = dict.fromkeys(block_linears(model), quantizer)
    plan |= {name: Tied(first) for name, first in shared_layers(model).items()}

    class Sink:
        def finished(self, index):
            return None

        def write(self, index, name, layers):
            pass

    Walker(model, plan, windows, LoadedWeights(model), torch.device("cpu")).run(Sink())
    inputs = []
    for one in (full, model):
        handle = one.get_submodule(layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        logits(one, windows)
        handle.remove()
    x, x_q = (each.reshape(-1, each.shape[-1]) for each in inputs)
    stats = seen[layer]
    torch.testing.assert_close(stats.hessian, x_q.T @ x_q / len(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(stats.cross, x.T @ x_q / len(x), rtol=1e-3, atol=1e-4)


@each
def test_the_check_runs_the_full_model(kind, folder, recipe, tmp_path):
    own = Recipe(recipe.quantizer, calibration=recipe.calibration, check=2)
    report = quantize_checkpoint(folder, own, tmp_path / "packed")
    source = open_folder(folder)
    _, held_out = own.calibration.sequences_apart(source.tokenizer(), source.model, 2)
    assert report.check.sequences == 2
    model = quantkit.load(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        loss = model(held_out, labels=held_out).loss
    assert report.check.baseline_perplexity == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.parametrize("kind", ["zamba2"])
def test_adapters_are_packed_where_they_are_called(kind, folder, recipe, tmp_path):
    model = meta_model(folder, None)
    assert ADAPTER.format(1, 2) in {name.removesuffix(".weight") for name in Shards(folder).specs}
    assert shared_layers(model)[ADAPTER.format(1, 2)] == ADAPTER.format(3, 2)
    plan = recipe.plan(model)
    assert plan[ADAPTER.format(1, 2)] == Tied(ADAPTER.format(3, 2))
    report = quantize_checkpoint(folder, recipe, tmp_path / "packed")
    assert not any("no token of the text" in note for note in report.notes)
    source = open_folder(folder)
    source.settle(plan)
    assert tied_names(source.model)[ADAPTER.format(1, 2) + ".weight"] == ADAPTER.format(3, 2) + ".weight"


@each
def test_a_dense_shared_layer_stays_as_it_is(kind, folder, recipe, tmp_path):
    name = "feed_forward"
    rules = Recipe(recipe.quantizer, calibration=recipe.calibration, rules={f"*{name}*": None})
    report = quantize_checkpoint(folder, rules, tmp_path / "packed")
    assert report.layers and not any(name in layer.name for layer in report.layers)
    kept = {tensor for tensor in Shards(folder).specs if name in tensor}
    assert kept and kept <= Shards(tmp_path / "packed").specs.keys()
    quantkit.load(tmp_path / "packed")


@each
def test_packing_the_head_is_refused(kind, folder, recipe, tmp_path):
    with pytest.raises(QuantkitError, match=r"ties its blocks and its head by one setting.*`head_bits`"):
        quantize_checkpoint(
            folder, Recipe(recipe.quantizer, calibration=recipe.calibration, head_bits=6), tmp_path / "no"
        )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", ["zamba"])
def test_a_search_refuses_them(kind, folder, recipe, tmp_path):
    with pytest.raises(QuantkitError, match="blocks of ZambaForCausalLM share weights"):
        quantkit.search(
            folder,
            tmp_path / "out",
            avg_bits=3,
            candidates="gptq(2, 32)",
            base="gptq(4, 32)",
            calibration=recipe.calibration,
        )
