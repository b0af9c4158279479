"""What every method must do, the same for all: a new method is a row of METHODS in tests/helpers/methods.py."""

import dataclasses
import json
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit import GPTQ, VPTQ, Calibration, Hadamard, Pyramid, Recipe, TargetShift
from quantkit.core import spec
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.core.metrics import proxy_loss
from quantkit.core.protocols import Needs
from quantkit.core.stats import LayerStats
from quantkit.core.weight import QuantizedWeight
from quantkit.run.pipeline import quantize_checkpoint

from .conftest import VOCABULARY
from .helpers.checkpoints import digest, interrupted
from .helpers.methods import METHODS, layer

SHAPES = [(128, 256), (100, 70), (33, 320), (5, 130)]
each = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


@cache
def packed_layer(method, *shape):
    """A layer that several tests read, packed once."""
    return method.quantize(*layer(*shape))


@each
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layout_state_and_validity(method, shape):
    """The layout is exact, the state says everything, and what is written passes its own checks."""
    packed = packed_layer(method, *shape)
    packed.validate()
    assert packed.shape == shape
    assert method.layout(*shape).metadata() == packed.metadata()
    assert method.layout(*shape).nbytes == packed.nbytes == sum(t.nbytes for t in packed.state().values())
    metadata = json.loads(json.dumps(packed.metadata()))
    again = QuantizedWeight.from_state(metadata, packed.state())
    assert torch.equal(again.dequantize(), packed.dequantize())
    assert packed.dequantize().dtype == torch.float32
    assert packed.dequantize(torch.bfloat16).dtype == torch.bfloat16


@each
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16])
def test_layouts_do_not_depend_on_the_default_type(method, default):
    """Which is the model's own while transformers loads it."""
    expected = method.layout(100, 70).metadata(), {name: t.dtype for name, t in method.layout(100, 70).state().items()}
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        layout = method.layout(100, 70)
        empty = QuantizedWeight.empty(expected[0])
        empty.validate()
    finally:
        torch.set_default_dtype(before)
    assert layout.metadata() == empty.metadata() == expected[0]
    assert {name: t.dtype for name, t in layout.state().items()} == expected[1]


@each
def test_matmul_is_the_dequantized_weights(method):
    packed = packed_layer(method, 100, 70)
    x, bias = torch.randn(2, 3, 70), torch.randn(100)
    expected = torch.nn.functional.linear(x, packed.dequantize(), bias)
    torch.testing.assert_close(packed.matmul(x, bias), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed.matmul(torch.eye(70)), packed.dequantize().T, rtol=1e-5, atol=1e-6)
    half = packed.matmul(x.half(), bias.half())
    assert half.dtype == torch.float16
    assert float((half.float() - expected).norm() / expected.norm()) < 4e-3


@each
def test_never_worse_than_nothing_and_pure(method):
    """A layer's loss is far below that of dropping it; the inputs stay as they are; a second call gives the same."""
    weight, stats = layer(128, 256)
    before = weight.clone(), stats.hessian.clone()
    first, second = packed_layer(method, 128, 256), method.quantize(weight, stats)
    assert torch.equal(weight, before[0])
    assert torch.equal(stats.hessian, before[1])
    assert all(torch.equal(first.state()[name], second.state()[name]) for name in first.state())
    assert proxy_loss(weight - first.dequantize(), stats.hessian) < 0.2 * proxy_loss(weight, stats.hessian)


@each
def test_degenerate_weights(method):
    """All zeros, one huge weight, constant rows, tiny weights: finite, and not worse than dropping the layer."""
    _, stats = layer(64, 96)
    for weight in (torch.zeros(64, 96), torch.ones(64, 96), torch.randn(64, 96) * 1e-6):
        packed = method.quantize(weight, stats)
        packed.validate()
        assert proxy_loss(packed.dequantize() - weight, stats.hessian) <= proxy_loss(weight, stats.hessian) + 1e-5
    spike = torch.randn(64, 96)
    spike[3, 5] = 1e4
    assert torch.isfinite(method.quantize(spike, stats).dequantize()).all()


@each
def test_frozen_and_described(method):
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.damp = 1
    assert spec.read(spec.write(method)) == method, "the report's text makes the quantizer again"
    assert hash(method) == hash(dataclasses.replace(method))


@each
def test_statistics_are_asked_for(method):
    if method.needs > Needs.NOTHING:
        with pytest.raises(ValueError, match="works without"):
            method.quantize(torch.randn(16, 32), None)


@each
def test_reads_the_shifted_target(method):
    weight, stats = layer(64, 96)
    stats = LayerStats(stats.hessian, stats.hessian * 1.05, 400)
    shifted = TargetShift(method, 1.0)
    assert float((shifted.quantize(weight, stats).dequantize() - 1.05 * weight).norm()) < 1.2 * float(
        (method.quantize(weight, stats).dequantize() - weight).norm()
    )


DENSE = {"llama_small": ("*.[qko]_proj", "*.gate_proj", "*.up_proj"), "gpt2_small": ("*.c_attn", "*.c_fc")}
"""Layers that most methods leave out below; those that stay are of all widths."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        (name, architecture)
        for number, name in enumerate(METHODS)
        for architecture in DENSE
        if name in ("rtn", "gptq") or (architecture == "llama_small") == (number % 2 == 0)
    ],
)
def test_disk_memory_resume_and_generation(name, architecture, model_folder, text_file, tmp_path):
    """Disk path = memory path, an interrupted run = a whole one, a loaded model = the one that was saved.

    Two methods on all layers of both architectures, the others on some of either: how a model stores its layers is
    nothing that methods see.
    """
    folder, method = model_folder(architecture), METHODS[name]
    rules = {} if name in ("rtn", "gptq") else dict.fromkeys(DENSE[architecture])
    recipe = Recipe(method, rules, calibration=Calibration(str(text_file), 3, 128))
    report = quantize_checkpoint(folder, recipe, tmp_path / "whole")
    assert not [name for name in tmp_path.iterdir() if name.name.endswith(".partial")]

    interrupted(folder, recipe, tmp_path / "resumed", after=1, by=KeyboardInterrupt)
    quantize_checkpoint(folder, recipe, tmp_path / "resumed", resume=True)
    assert digest(tmp_path / "resumed") == digest(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = quantkit.quantize(
        model, AutoTokenizer.from_pretrained(folder), method=method, calibration=recipe.calibration, rules=rules
    )
    loaded = quantkit.load(tmp_path / "whole", dtype=torch.float32).eval()
    tokens = torch.randint(0, VOCABULARY, (2, 40))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(
            quantkit.load(tmp_path / "saved", dtype=torch.float32).eval()(tokens).logits, model(tokens).logits
        )
    generated = loaded.generate(tokens[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 12)
    stored = 8 * sum(module.packed.nbytes for module in loaded.modules() if hasattr(module, "packed"))
    assert report.bits_per_weight == pytest.approx(stored / report.packed_weights)


@each
def test_damaged_files_are_refused(method, model_folder, text_file, tmp_path):
    """Codes of all ones, scales of NaN: an error or a finite model, never a wild read."""
    weight, stats = layer(64, 96)
    packed = method.quantize(weight, stats)
    wild = packed.map(lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t)
    with pytest.raises((ValueError, CheckpointError), match="NaN"):
        wild.validate()
    if not any(tensor.dtype == torch.int32 for tensor in packed.state().values()):
        return  # a format without codes
    short = packed.map(lambda t: t[:-1] if t.dtype == torch.int32 else t)
    with pytest.raises(ValueError):
        short.validate()
    ones = packed.map(lambda t: torch.full_like(t, -1) if t.dtype == torch.int32 else t)
    try:
        ones.validate()
    except ValueError:
        return
    assert torch.isfinite(ones.dequantize()).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "pyramid", "group_size": 64}, "pyramid has no setting 'group_size'"),
        ({"method": "vptq", "symmetric": True}, "vptq has no setting 'symmetric'"),
        ({"method": "gptq", "bits": 2.5}, "integer formats hold 1 to 8 bits"),
        ({"method": "pyramid", "bits": 0.01}, "0.5 to 8"),
        ({"method": VPTQ(2), "bits": 3}, "bits is given beside a quantizer object"),
        ({"method": VPTQ(2), "hadamard": True}, "hadamard is given beside a quantizer object"),
    ],
)
def test_settings_of_another_method_are_refused(settings, message, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    with pytest.raises(QuantkitError, match=message):
        quantkit.quantize(model, None, **settings)


def test_rotation_is_the_default_where_the_method_wants_it():
    from quantkit.run.recipe import make_quantizer

    assert make_quantizer("pyramid", bits=2.5) == Hadamard(Pyramid(2.5))
    assert make_quantizer("pyramid", False, bits=2.0) == Pyramid(2)
    assert make_quantizer("vptq", bits=2) == Hadamard(VPTQ(2))
    assert make_quantizer("gptq", bits=2.0) == GPTQ(2)
    assert make_quantizer("gptq", True, bits=2) == Hadamard(GPTQ(2))
