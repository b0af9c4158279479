"""Quantized activations in evaluation: what is coded, what it costs, and that the model comes back unharmed."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import quantkit
from quantkit import RTN, Hadamard
from quantkit.cli.main import app
from quantkit.core.errors import QuantkitError
from quantkit.evals import activations
from quantkit.evals.activations import (
    IntActivations,
    PyramidActivations,
    RotatedActivations,
    activation_code,
    decoder_linears,
    quantized_activations,
)
from quantkit.evals.perplexity import evaluate
from quantkit.kernels.pyramid import index_bits
from quantkit.models.linear import QuantizedLinear
from quantkit.models.structure import block_linears
from quantkit.models.unpacking import choose_unpacked
from quantkit.run.documents import documents
from quantkit.run.text import evaluation_text

SEQLEN = 128


@pytest.fixture(scope="module")
def model(reference):
    return AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def held_out(tokenizer):
    return evaluation_text(documents("stdlib", "evaluation")[:20], tokenizer)


@pytest.fixture(scope="module")
def measured(model, held_out):
    """A function: arguments of `activation_code` -> (held-out quality, what was observed), each measured once."""
    known = {}
    subject = copy.deepcopy(model)

    def measure(*arguments):
        if arguments not in known:
            with quantized_activations(subject, activation_code(*arguments)) as observed:
                quality = evaluate(subject, held_out, SEQLEN, baseline=model, num_samples=2)
            known[arguments] = quality, observed
        return known[arguments]

    return measure


@pytest.fixture(scope="module")
def packed(model_folder):
    """A small Llama, all linear layers packed behind rotations."""
    dense = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32).eval()
    return quantkit.quantize(dense, None, method=Hadamard(RTN(4, 64)))


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(40)[None] * 7, use_cache=False).logits


def test_the_model_comes_back_exactly(model):
    before, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with quantized_activations(model, IntActivations(4)) as observed:
        inside = logits(model)
    assert not torch.equal(inside, before)
    assert observed.reached == set(block_linears(model))
    with pytest.raises(RuntimeError, match="stop"), quantized_activations(model, IntActivations(2)):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("method", "hadamard"), activations.METHODS)
def test_error_falls_with_bits(measured, method, hadamard):
    found = [measured(method, bits, 32, hadamard) for bits in (2, 3, 4)]
    errors, kl = [observed.relative_error for _, observed in found], [quality.kl for quality, _ in found]
    assert errors == sorted(errors, reverse=True)
    assert kl == sorted(kl, reverse=True)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_pyramid_beats_integers_at_equal_bits(measured, bits):
    for hadamard in (False, True) if bits < 4 else (True,):  # without, its levels do not reach the outliers' groups
        pyramid, integers = measured("pyramid", bits, 32, hadamard), measured("int", bits, 32, hadamard)
        assert pyramid[1].bits_per_activation == pytest.approx(integers[1].bits_per_activation)
        assert pyramid[1].relative_error < integers[1].relative_error
        assert pyramid[0].kl < integers[0].kl
    fitted = measured("int-fitted", bits, 32, True)
    assert measured("pyramid", bits, 32, True)[1].relative_error < 0.95 * fitted[1].relative_error


def test_the_pyramid_wants_rotation(measured):
    plain, rotated = (measured("pyramid", 4, 32, hadamard) for hadamard in (False, True))
    assert rotated[1].relative_error < 0.5 * plain[1].relative_error
    assert rotated[0].kl < 0.5 * plain[0].kl


@pytest.mark.parametrize(("method", "dimension"), [("int", 32), ("pyramid", 8)])
def test_eight_bits_lose_next_to_nothing(measured, method, dimension):
    kl = measured(method, 8, dimension, True)[0].kl
    assert kl < 1e-3 * measured(method, 2, dimension, True)[0].kl
    assert kl < 1e-3


def test_rotated_pyramid_reaches_its_error_on_gaussian_vectors(measured):
    """Activations of a trained model, rotated, are as good as Gaussian ones."""
    assert measured("pyramid", 3, 32, True)[1].relative_error == pytest.approx(0.0253, rel=0.05)


def test_bits_are_what_a_file_would_hold(measured):
    code = activation_code("pyramid", 3, 32)
    chosen = quantkit.Pyramid(3, 32).code
    assert code.bits_per_activation(768) == (24 * (index_bits(32, chosen.pulses) + chosen.gain_bits) + 16) / 768
    assert code.bits_per_activation(40) == (2 * chosen.field_bits + 16) / 40, "the second group is padded"
    assert IntActivations(3).bits_per_activation(256) == 3 + 16 / 256
    widths = [256, 256, 256, 768]  # a block's distinct tensors: of q, k, v; of o; of gate, up; of down
    expected = sum(3 * width + 16 for width in widths) / sum(widths)
    assert measured("int", 3, 32, False)[1].bits_per_activation == pytest.approx(expected)


def test_coded_vectors_are_points_of_the_pyramid():
    x = torch.randn(5, 64) * torch.tensor([1.0, 1e-3, 50.0, 1.0, 0.0])[:, None]
    code = quantkit.Pyramid(2, 16).code
    groups = PyramidActivations(2, 16).apply(x)[:4].unflatten(1, (-1, 16))
    points = groups / groups.abs().sum(-1, keepdim=True) * code.pulses
    torch.testing.assert_close(points, points.round(), atol=1e-3, rtol=0)
    ratios = groups.square().sum(-1).sqrt()
    assert all(len(set((row / row.min()).round(decimals=3).tolist())) <= 2**code.gain_bits for row in ratios)
    assert PyramidActivations(2, 16).apply(x)[4].abs().max() < 1e-5


def test_int_grid_is_about_zero_and_reaches_the_largest_value():
    x = torch.tensor([[0.0, 0.4, -0.6, 3.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(IntActivations(3).apply(x), torch.tensor([[0.0, 0.0, -1.0, 3.0], [0.0] * 4]))


def test_rotation_spreads_an_outlier():
    x = torch.randn(16, 256)
    x[:, 3] *= 60
    plain, rotated = IntActivations(4), RotatedActivations(IntActivations(4))
    errors = [(x - code.apply(x))[:, 4:].square().mean() for code in (plain, rotated)]
    assert errors[1] < 0.5 * errors[0]


def test_packed_and_fused_models(packed, model_folder):
    dense = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    layers = decoder_linears(packed)
    assert list(layers) == list(decoder_linears(dense)) == list(block_linears(dense))
    assert all(isinstance(layer, QuantizedLinear) for layer in layers.values())

    applied = []

    class Counting(PyramidActivations):
        def apply(self, x):
            applied.append(x.shape)
            return super().apply(x)

    before, code = logits(packed), Counting(4, 32)
    layer, x = layers["model.layers.0.mlp.down_proj"], torch.randn(3, 704)
    expected = layer(code.apply(x))
    applied.clear()
    with quantized_activations(packed, code):
        torch.testing.assert_close(layer(x), expected)
        apart, calls = logits(packed), len(applied)
    assert calls == 1 + 2 * 4, "layers that read one tensor share its code"
    assert not torch.equal(apart, before)
    fused = copy.deepcopy(packed)
    choose_unpacked(fused, unpack=False)  # unpacked layers are not fused
    assert quantkit.fuse(fused) == 4
    with quantized_activations(fused, code):  # a sum in another order gives some numbers another code
        assert (logits(fused) - apart).norm() <= 0.1 * apart.norm() and not torch.equal(apart, before)
    assert torch.equal(logits(packed), before)


def test_a_tensor_that_changed_in_place_is_coded_anew():
    block = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    x = torch.randn(2, 8)
    with quantized_activations(model, IntActivations(4)) as observed, torch.no_grad():
        block["a"](x)
        x += 1
        changed = block["b"](x)
    assert set(observed.errors) == {"blocks.0.a", "blocks.0.b"}
    torch.testing.assert_close(changed, block["b"](IntActivations(4).apply(x)))


def test_routers_and_nan_are_left_alone():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict({"gate": nn.Linear(8, 2), "up": nn.Linear(8, 8)})])
    assert list(decoder_linears(model)) == ["blocks.0.up"]
    with quantized_activations(model, PyramidActivations(2, 8)) as observed:
        assert model.blocks[0]["up"](torch.full((2, 8), torch.nan)).isnan().all()
    assert observed.activations == 0
    with pytest.raises(QuantkitError, match="decoder blocks"):
        decoder_linears(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pyramyd", 4), "unknown activation method"),
        (("int", 2.5), "whole bits"),
        (("int", 1), "2 to 8"),
        (("pyramid", 9), "0.5 to 8"),
        (("pyramid", 2, 1), "groups hold 2 to 256"),
    ],
)
def test_senseless_codes_are_refused(arguments, message):
    with pytest.raises(QuantkitError, match=message):
        activation_code(*arguments)


def test_command_line(model_folder, text_file):
    def run(*options):
        common = ["--data", str(text_file), "--seqlen", "64", "--max-windows", "2", "--device", "cpu"]
        return CliRunner().invoke(app, ["eval", str(model_folder("llama")), *common, *options])

    result = run("--activation-bits", "3", "--activation-dimension", "16", "--json")
    found = json.loads(result.stdout)["activations"]
    assert found["bits_per_activation"] == pytest.approx(3.0, abs=0.06)
    assert (found["layers"], found["layers_reached"]) == (14, 14)
    assert "RotatedActivations(inner=PyramidActivations(bits=3.0, dimension=16)" in found["code"]
    printed = run("--activation-bits", "4", "--activation-method", "int").stdout
    assert "bits each, measured, into 14 of 14 layers; IntActivations(bits=4" in " ".join(printed.split())
    assert json.loads(run("--json").stdout)["activations"] is None
    assert "--activation-bits" in str(run("--hadamard-activations").exception)
    refused = run("--activation-bits", "4", "--activation-method", "int", "--activation-dimension", "8")
    assert "belongs to pyramid" in str(refused.exception)
    assert "groups hold" in str(run("--activation-bits", "4", "--activation-dimension", "0").exception)


def test_the_table(model_folder, text_file, tmp_path, capsys):
    arguments = ["--data", str(text_file), "--bits", "2", "--max-windows", "1", "--seqlen", "64", "--device", "cpu"]
    activations.main([str(model_folder("llama")), *arguments, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["method"], row["hadamard"]) for row in rows] == list(activations.METHODS)
    assert all(row["layers"] == 14 and row["kl"] > 0 for row in rows)
    assert "| pyramid + Hadamard | 2.0" in capsys.readouterr().out
