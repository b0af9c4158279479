"""Trellis codes under feedback: what they gain, where fractions go, and what is refused."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import quantkit
from quantkit import GPTQ, Calibration, Hadamard, LowRank, Recipe, Trellis
from quantkit.core.errors import QuantkitError
from quantkit.core.metrics import proxy_loss
from quantkit.core.stats import LayerStats
from quantkit.formats.trellis import columns_of, rings_of
from quantkit.kernels import trellis
from quantkit.kernels.trellis import nearest_step, step
from quantkit.quantizers import trellis as module
from quantkit.run.recipe import core, make_quantizer


def layer(rows=128, columns=160, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    x = torch.randn(2000, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), LayerStats(x.T @ x / 2000, num_tokens=2000)


def loss(quantizer, weight, stats):
    return proxy_loss(weight - quantizer.quantize(weight, stats).dequantize(), stats.hessian)


def test_steps_are_products_that_two_bf16_hold():
    steps = step(torch.arange(256, dtype=torch.uint8))
    assert bool((steps.diff() > 0).all()) and steps[-1] == 31 / 16
    assert torch.equal(nearest_step(steps), torch.arange(256, dtype=torch.uint8))
    assert torch.equal(nearest_step(torch.tensor([0.0, 1e-30, 1e30])).int(), torch.tensor([0, 0, 255]).int())
    wanted = torch.rand(1000) + 1e-3
    assert float((step(nearest_step(wanted)) / wanted).log().abs().max()) < 0.032  # half of 1/16
    x = torch.randn(4096).bfloat16().float() * step(nearest_step(torch.rand(4096)))
    high = x.bfloat16().float()
    assert torch.equal(high + (x - high).bfloat16().float(), x)


@pytest.mark.parametrize("width", [1, 4, 16])
@pytest.mark.parametrize("shape", [(32, 16), (33, 50), (5, 1)])
def test_ring_order(width, shape):
    columns = torch.randn(shape)
    rings = rings_of(columns, width)
    assert torch.equal(columns_of(rings, width)[: shape[0], : shape[1]], columns)
    if width == 4 and shape == (32, 16):  # row tile, column, row within the tile
        assert rings[16 + 4 * 2 + 3, 1] == columns[4 + 3, 4 + 2]


def test_one_more_bit_quarters_the_loss_and_states_help():
    weight, stats = layer()
    losses = [loss(Trellis(bits, 12), weight, stats) for bits in (1, 2, 3, 4, 5, 6)]
    assert all(0.15 < after / before < 0.35 for before, after in pairwise(losses))
    by_states = [loss(Trellis(2, states), weight, stats) for states in (8, 10, 12, 14)]
    assert by_states == sorted(by_states, reverse=True)
    rotated = loss(Hadamard(Trellis(2, 12)), weight, stats)
    assert rotated < 0.5 * loss(Hadamard(GPTQ(2, -1)), weight, stats)
    assert rotated < 0.8 * loss(Hadamard(Trellis(2, 12, order="none")), weight, stats)


def test_feedback_is_worth_it(monkeypatch):
    weight, stats = layer()
    fed = loss(Trellis(2, 12), weight, stats)
    diagonal = LayerStats(stats.hessian.diagonal().diag(), num_tokens=2000)
    alone = proxy_loss(weight - Trellis(2, 12).quantize(weight, diagonal).dequantize(), stats.hessian)
    assert fed < 0.5 * alone
    tiles = loss(Trellis(2, 12, axis="in"), weight, stats)
    assert fed < tiles < alone, "16 columns rounded together lose the feedback among them"


def test_scales_follow_the_feedback(monkeypatch):
    """A scale for each column as it stands when its turn comes, against one for all."""
    weight, stats = layer()
    own = loss(Trellis(2, 12), weight, stats)
    same = nearest_step(torch.tensor([1 / module._HEADROOM]))
    monkeypatch.setattr(trellis, "nearest_step", lambda wanted: same.expand(len(wanted)))
    assert own < 0.99 * loss(Trellis(2, 12), weight, stats)


def model():
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("bits", [2.0, 2.1, 2.25, 2.5, 3.9])
def test_fractions_are_shared_out(bits):
    """Whole numbers around the fraction, smaller layers first, and never more than was asked for."""
    found = model()
    plan = Recipe(Hadamard(LowRank(Trellis(bits, 12), 2)), calibration=Calibration("stdlib")).plan(found)
    widths = {name: core(quantizer).bits for name, quantizer in plan.items()}
    weights = {name: found.get_submodule(name).weight.numel() for name in plan}
    assert set(widths.values()) <= {int(bits), int(bits) + 1}
    mean = sum(widths[name] * weights[name] for name in plan) / sum(weights.values())
    assert bits - max(weights.values()) / sum(weights.values()) < mean <= bits
    if int(bits) < bits < 3:
        sizes = {width: {weights[n] for n in plan if widths[n] == width} for width in (2, 3)}
        assert max(sizes[3]) <= min(sizes[2]), "keys and values come first"
    assert all(type(quantizer.inner.inner) is LowRank for quantizer in plan.values())


def test_bad_settings():
    for settings, message in (
        ({"bits": 0}, "1 to 8 bits"),
        ({"bits": 9}, "1 to 8 bits"),
        ({"state_bits": 17}, "use 8 to 16"),
        ({"state_bits": 12.5}, "use 8 to 16"),
        ({"state_bits": "x"}, "use 8 to 16"),
        ({"block_size": 4.5}, "whole number of columns"),
        ({"bits": 7, "state_bits": 12}, "use 14 to 16"),
        ({"axis": "both"}, "axis='both'"),
        ({"order": "act"}, "known orders are least, none"),
        ({"group_size": 64}, "no setting 'group_size'"),
    ):
        with pytest.raises(QuantkitError, match=message):
            make_quantizer("trellis", **settings)
    with pytest.raises(ValueError, match="averages over layers"):
        Trellis(2.5).layout(32, 32)
    assert make_quantizer("trellis") == Hadamard(Trellis(2))


def test_damaged_weights_are_refused():
    packed = Trellis(2, 12).layout(64, 32).map(lambda t: torch.zeros(t.shape, dtype=t.dtype))
    packed.validate()
    changes = [{"parts": parts} for parts in ([4096], [32, 32], [], 64, [64.0])]
    changes += [{"bits": 9}, {"bits": 2.0}, {"state_bits": 3}, {"state_bits": 12.0}, {"width": 0}]
    for change in (*changes, {"scale": torch.ones(2)}):
        with pytest.raises(ValueError):
            dataclasses.replace(packed, **change).validate()


def test_loads_in_half_precision(model_folder, tokenizer, tmp_path):
    """Where a model's type is the default one while it is loaded; the scale stays fp32."""
    found = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.bfloat16)
    method = Hadamard(Trellis(2, 8))
    quantkit.quantize(found, tokenizer, method=method, calibration="stdlib", num_samples=2, seqlen=32)
    found.save_pretrained(tmp_path)
    tokens = torch.randint(0, 64, (1, 8))
    for dtype in (None, torch.bfloat16, torch.float16, torch.float32):
        loaded = quantkit.load(tmp_path, **({} if dtype is None else {"dtype": dtype}))
        weight = loaded.model.layers[0].mlp.up_proj.packed.base
        assert loaded.dtype == (dtype or torch.bfloat16) and weight.scale.dtype == torch.float32
        assert torch.isfinite(loaded(tokens).logits).all()


def test_works_on_a_layer_without_inputs():
    dead = LayerStats(torch.zeros(16, 16), num_tokens=10)
    assert torch.isfinite(Trellis(2, 10).quantize(nn.Linear(16, 40).weight.detach(), dead).dequantize()).all()
