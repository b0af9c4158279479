"""Very small or large weights, or inputs, cost no more than others do; layers of zeros lose nothing."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import GPTQ, RTN, BlockTuning, Calibration, Hadamard, LowRank, PVSettings, Recipe, TargetShift
from quantkit.core.errors import QuantkitError
from quantkit.core.metrics import proxy_loss
from quantkit.core.protocols import Needs
from quantkit.core.stats import LayerStats
from quantkit.evopress.budget import Budget
from quantkit.formats.low_rank import LowRankWeight
from quantkit.formats.scaled import ScaledWeight
from quantkit.models.embedding import QuantizedEmbedding
from quantkit.models.unpacking import choose_unpacked
from quantkit.quantizers.factor import LARGEST, SMALLEST, layer_factor, quantized
from quantkit.run.estimate import estimate
from quantkit.run.packing import Pack
from quantkit.run.pipeline import quantize_checkpoint
from quantkit.tuning.adapters import correction_outside
from quantkit.tuning.parts.base import tunable
from quantkit.tuning.pv import PVOptimizer, TunedLinear

from ..conftest import VOCABULARY
from ..helpers.methods import METHODS, layer

each = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
WEIGHT, STATS = layer(48, 64)


def statistics(inputs=1.0):
    """Of inputs this many times as large; the other stream's are a twentieth larger still."""
    hessian = STATS.hessian * inputs**2
    return LayerStats(hessian, 1.05 * hessian, 400)


def packed(method, weight, inputs=1.0):
    return Pack({"layer": method})("layer", weight, statistics(inputs))


@each
def test_weights_of_any_size_lose_the_same(method):
    usual = packed(method, WEIGHT)
    assert not isinstance(usual.weight, ScaledWeight)
    for size in (1e-9, 1e-5, 1e8):
        found = packed(method, size * WEIGHT)
        found.weight.validate()
        assert isinstance(found.weight, ScaledWeight)
        assert found.relative_error < 1.1 * usual.relative_error  # other grids and codebooks round a little otherwise
        error = (size * WEIGHT - found.weight.dequantize()) / size
        lost = proxy_loss(error, STATS.hessian) / proxy_loss(WEIGHT, STATS.hessian)
        assert lost == pytest.approx(found.relative_error, rel=1e-3)


@each
def test_a_factor_changes_nothing_but_itself(method):
    """Weights that differ by a power of two are packed alike, and what multiplies by them agrees."""
    first, second = (packed(method, size * WEIGHT).weight for size in (2.0**-30, 2.0**-25))
    assert all(torch.equal(tensor, second.base.state()[name]) for name, tensor in first.base.state().items())
    assert float(second.factor / first.factor) == 2**5
    x, bias = torch.randn(2, 3, 64), torch.randn(48) * 2.0**-30
    expected = torch.nn.functional.linear(x, first.dequantize(), bias)
    torch.testing.assert_close(first.matmul(x, bias), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    up, down = torch.randn(48, 2) * 2.0**-30, torch.randn(2, 64)
    torch.testing.assert_close(first.matmul(x, None, up, down), first.matmul(x) + (x @ down.T) @ up.T)
    rows = torch.tensor([5, 0, 47])
    torch.testing.assert_close(first.rows(rows), first.dequantize()[rows], rtol=1e-4, atol=2.0**-40)
    assert first.nbytes == first.base.nbytes + 4
    assert first.by_rows == first.base.by_rows and first.cpu_slowdown == first.base.cpu_slowdown


@each
def test_inputs_of_any_size_lose_the_same(method):
    for target in (method, TargetShift(method, 0.7)):
        usual = packed(target, WEIGHT).relative_error
        for inputs in (1e-8, 1e-4, 1e4, 1e8):  # what comes out of a layer of weights of 1e8 is another's input
            assert packed(target, WEIGHT, inputs).relative_error < 1.01 * usual
        assert packed(target, 1e-9 * WEIGHT, 1e-4).relative_error < 1.1 * usual


@each
def test_a_layer_of_zeros_loses_nothing(method):
    found = packed(method, torch.zeros(48, 64))
    found.weight.validate()
    assert found.relative_error == 0
    assert not found.weight.dequantize().any()
    assert not found.weight.matmul(torch.randn(2, 64)).any()
    if method.needs == Needs.NOTHING:
        assert Pack({"layer": method})("layer", torch.zeros(48, 64), None).relative_error == 0


def test_the_factor_brings_weights_no_farther_than_into_the_range():
    for size in (1.0, SMALLEST, LARGEST / 2):
        assert layer_factor(size * torch.ones(4, 4)) == 1
    for exponent in (-140, -60, -11, 14, 60, 127):
        weight = torch.ones(4, 4) * 1.5 * 2.0**exponent
        factor = layer_factor(weight)
        inside = weight / factor
        assert float(inside.max()) == 1.5 * 2.0**exponent / factor
        if exponent > -130:
            assert SMALLEST <= float(inside.max()) < 2 * SMALLEST or LARGEST / 2 < float(inside.max()) <= LARGEST
    spike = torch.full((64, 64), 1e-7)
    spike[0, 0] = 1000
    assert layer_factor(spike) == 1, "of what one factor can do, this is the best"
    assert layer_factor(torch.zeros(2, 2)) == 0
    assert layer_factor(torch.tensor([[float("nan")]])) == layer_factor(torch.tensor([[float("inf")]])) == 1


def test_half_precision_does_not_lose_what_the_factor_saved():
    """A factor of 2^-20 is no number of fp16, and x times it would be none either."""
    weight = packed(RTN(8, 32), 1e-9 * WEIGHT).weight
    x = 1000 * torch.randn(3, 64)
    wanted = x.double() @ weight.dequantize().double().T
    for dtype, tolerance in ((torch.float16, 0.05), (torch.bfloat16, 0.02)):
        found = weight.matmul(x.to(dtype))
        assert found.dtype == dtype
        assert float((found.double() - wanted).norm() / wanted.norm()) < tolerance


def odd_model(folder, tied=False):
    """Some of its layers are tiny, huge or zero, and what they feed makes up for it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        first, second = model.model.layers
        for name, size in (("q_proj", 1e-9), ("k_proj", 1e-9), ("v_proj", 1e8), ("o_proj", 1e-8)):
            second.self_attn.get_submodule(name).weight *= size
        first.mlp.down_proj.weight.zero_()
        second.mlp.up_proj.weight *= 1e-6
        second.mlp.down_proj.weight *= 1e6
        if tied:
            model.get_input_embeddings().weight *= 1e-6
    return model


SCALED = {
    "model.layers.0.mlp.down_proj",
    *(f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"),
    *(f"model.layers.1.mlp.{name}_proj" for name in ("up", "down")),
}


def logits(model):
    with torch.no_grad():
        return model(torch.arange(60).view(2, 30) * 31 % VOCABULARY).logits


@pytest.mark.parametrize("method", [RTN(8, 32), Hadamard(GPTQ(8, 32))], ids=["rtn", "hadamard-gptq"])
def test_a_model_with_odd_layers_is_packed_saved_fused_and_moved(method, model_folder, tokenizer, texts, tmp_path):
    dense = odd_model(model_folder("llama_small"))
    wanted = logits(dense)
    model = quantkit.quantize(dense, tokenizer, method=method, calibration=Calibration(texts, 4, 64))
    report = {entry.name: entry for entry in model.quantkit_report.layers}
    assert {name for name, entry in report.items() if entry.format.startswith("scaled(")} == SCALED
    assert report["model.layers.0.mlp.down_proj"].relative_error == 0
    assert all(entry.relative_error < 2e-3 for entry in report.values())
    found = logits(model)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
    model.save_pretrained(tmp_path / "packed")
    loaded = quantkit.load(tmp_path / "packed", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded), found)
    choose_unpacked(loaded, False)
    before = logits(loaded)
    assert quantkit.fuse(loaded) == 2, "q, k, v and gate, up of the first block: factors keep the others' apart"
    torch.testing.assert_close(logits(loaded), before, rtol=1e-4, atol=1e-5)
    half = quantkit.load(tmp_path / "packed", dtype=torch.bfloat16)
    assert half.model.layers[1].mlp.up_proj.packed.factor.dtype == torch.float32


def test_a_folder_with_odd_layers_costs_what_was_estimated_and_a_factor_each(model_folder, tmp_path):
    odd_model(model_folder("llama_small")).save_pretrained(tmp_path / "odd")
    recipe = Recipe(RTN(3, 32))
    report = quantize_checkpoint(tmp_path / "odd", recipe, tmp_path / "packed")
    assert report.bytes_after == estimate(tmp_path / "odd", recipe).bytes_after + 4 * len(SCALED)
    stored = sum(layer.bits_per_weight for layer in report.layers if layer.name in SCALED)
    plain = RTN(3, 32).layout(64, 96).bits_per_weight
    assert stored > len(SCALED) * plain


def test_a_tied_embedding_may_be_tiny(model_folder):
    model = odd_model(model_folder("llama_tied_small"), tied=True)
    before = model.get_input_embeddings().weight.detach().clone()
    quantkit.quantize(model, method=RTN(8, 32), head_bits=8)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(embedding.packed, ScaledWeight)
    assert embedding.packed.by_rows
    tokens = torch.tensor([3, 1999])
    torch.testing.assert_close(embedding(tokens), before[tokens], rtol=0, atol=0.02 * float(before.abs().max()))


def test_tuning_takes_it_apart():
    """What is inside moves, codes and scales; the factor stays, and the layer's size is nothing to the steps."""
    losses = []
    for size in (1.0, 2.0**-30):
        weight = packed(RTN(2, 32), size * WEIGHT).weight
        layer_ = TunedLinear(tunable(weight), None)
        optimizer = PVOptimizer([layer_], PVSettings(lr=1e-2))
        assert len(optimizer.coded) == 1
        for _ in range(15):
            optimizer.open()
            loss = (layer_.leaf / size - 1.2 * WEIGHT).square().sum()
            loss.backward()
            losses.append(float(loss.detach()))
            optimizer.step()
        layer_.packed.validate()
        assert layer_.packed.metadata() == weight.metadata()
    assert losses[14] < 0.95 * losses[0]
    assert losses[15:] == losses[:15]
    assert torch.equal(layer_.packed.factor, weight.factor)


def test_blocks_with_odd_layers_are_tuned(model_folder, tokenizer, texts):
    tuner = BlockTuning(3, batch_tokens=64)
    model = odd_model(model_folder("llama_small"))
    quantkit.quantize(model, tokenizer, method=GPTQ(3, 32), tune_blocks=tuner, calibration=Calibration(texts, 4, 64))
    assert all(entry.tuned[1] <= entry.tuned[0] for entry in model.quantkit_report.layers)
    assert not model.model.layers[0].mlp.down_proj.weight.any()


def test_corrections_of_a_scaled_layer_can_be_trained():
    for size in (1e-9, 1e7):
        weight = packed(LowRank(GPTQ(2, 32), 4), size * WEIGHT).weight
        outside = correction_outside(weight)
        assert isinstance(outside, LowRankWeight) and isinstance(outside.base, ScaledWeight)
        outside.validate()
        change = outside.dequantize() - weight.dequantize()
        assert float(change.norm() / weight.dequantize().norm()) < 1e-3
    assert isinstance(correction_outside(packed(RTN(2, 32), 1e-9 * WEIGHT).weight), ScaledWeight)


def test_kernels_are_timed_without_the_factor():
    budget = Budget(1.0, "latency", {("int_group 3", 48, 64): 2.0})
    for weight in (WEIGHT, 1e-9 * WEIGHT):
        assert budget.cost(quantized(RTN(3, 32), weight, None), RTN(3, 32)) == 2000
    with pytest.raises(QuantkitError, match="lack 'int_group 4'"):
        budget.cost(quantized(RTN(4, 32), 1e-9 * WEIGHT, None), RTN(4, 32))
