"""Formats that no entry takes apart: their schema says what is continuous, and that is tuned everywhere."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch

import quantkit
from quantkit import RTN, BlockTuning, Calibration, Hadamard, LowRank, PVSettings, TuningSettings
from quantkit.core import registry
from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Needs
from quantkit.core.schema import TensorSpec, unset
from quantkit.core.stats import LayerStats
from quantkit.core.weight import QuantizedWeight
from quantkit.tuning.parts.base import Scaled, Tunable, TunableFields, tunable
from quantkit.tuning.pv import PVOptimizer, TunedLinear

TEXT = Calibration("stdlib", 24, 64)


@dataclass(frozen=True, eq=False)
class LevelsWeight(QuantizedWeight, format="levels_for_tests"):
    """W[o, i] = levels[o, codes[o, i]]."""

    codes: torch.Tensor
    levels: torch.Tensor
    out_features: int
    in_features: int

    @property
    def shape(self):
        return self.out_features, self.in_features

    def schema(self):
        return {
            "codes": TensorSpec(torch.uint8, self.shape),
            "levels": TensorSpec((torch.float16, torch.bfloat16), (self.out_features, 4), continuous=True),
        }

    def dequantize(self, dtype=torch.float32):
        return self.levels.float().gather(1, self.codes.long()).to(dtype)


@dataclass(frozen=True)
class Levels:
    """The nearest of four levels a row."""

    dtype: torch.dtype = torch.float16
    needs = Needs.NOTHING

    def quantize(self, weight, stats=None):
        levels = (weight.std(1, keepdim=True) * torch.tensor([-1.5, -0.5, 0.5, 1.5])).to(self.dtype)
        codes = (weight.unsqueeze(2) - levels.to(weight).unsqueeze(1)).abs().argmin(2).to(torch.uint8)
        return LevelsWeight(codes, levels, *weight.shape)

    def layout(self, out_features, in_features):
        return LevelsWeight(unset(), unset(), out_features, in_features).laid_out()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The format's name, as if its package were installed."""
    table = registry._BUILT_IN["quantkit.formats"] | {LevelsWeight.format: "a module:LevelsWeight"}
    monkeypatch.setitem(registry._BUILT_IN, "quantkit.formats", table)
    resolve = registry.resolve

    def found(group, name):
        return LevelsWeight if (group, name) == ("quantkit.formats", LevelsWeight.format) else resolve(group, name)

    monkeypatch.setattr("quantkit.core.weight.resolve", found)


def problem(rows=40, columns=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_taken_apart_and_put_together_is_the_same(dtype):
    packed = Levels(dtype).quantize(problem())
    packed.validate()
    parts = tunable(packed)
    assert isinstance(parts, TunableFields) and not [*parts.coded()]
    torch.testing.assert_close(parts(), packed.dequantize(), rtol=1e-6, atol=0)
    again = parts.packed()
    assert again.metadata() == packed.metadata()
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in packed.state().items())


@pytest.mark.parametrize(
    "method", [Levels(), Hadamard(Levels()), LowRank(Levels(), 2)], ids=["plain", "rotated", "low-rank"]
)
def test_continuous_parts_descend_and_codes_stay(method):
    weight = problem()
    packed = method.quantize(weight, LayerStats(torch.eye(64)))
    layer = TunedLinear(tunable(packed), None)
    optimizer = PVOptimizer([layer], PVSettings(lr=1e-2))
    assert optimizer.coded == [] and optimizer.targets == []
    losses = []
    for _ in range(20):
        optimizer.open()
        loss = (layer.leaf - weight).square().sum()
        loss.backward()
        losses.append(float(loss.detach()))
        assert optimizer.step() == 0
    assert losses[-1] < 0.99 * losses[0]
    tuned = layer.packed
    tuned.validate()
    assert tuned.metadata() == packed.metadata()
    moved = {name for name, tensor in packed.state().items() if not torch.equal(tensor, tuned.state()[name])}
    assert {name.rpartition(".")[2] for name in moved} in ({"levels"}, {"levels", "up", "down"})


def test_what_grows_beyond_its_type_stays_finite():
    parts = tunable(Levels().quantize(problem()))
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter *= 1e6
    parts.packed().validate()


def test_blocks_are_tuned(teacher, tokenizer):
    tuner = BlockTuning(4, batch_tokens=512, pv=PVSettings(lr=5e-3))
    model = quantkit.quantize(copy.deepcopy(teacher), tokenizer, method=Levels(), tune_blocks=tuner, calibration=TEXT)
    losses = [layer.tuned for layer in model.quantkit_report.layers]
    assert all(after <= before for before, after in losses)
    assert any(after < before for before, after in losses)


def test_whole_models_are_tuned(teacher, tokenizer):
    model = quantkit.quantize(copy.deepcopy(teacher), tokenizer, method=Levels(), calibration=TEXT)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = TuningSettings(4, 4, 4, evaluate_every=2, held_out=8, pv=PVSettings(lr=2e-3))
    quantkit.tune(model, teacher, tokenizer, calibration=TEXT, settings=settings)
    history = [entry["kl"] for entry in model.quantkit_tuning]
    assert min(history) < history[0]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith(".codes"))
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith(".levels"))


def test_a_format_that_passes_no_gradient_is_refused(monkeypatch):
    packed = Levels().quantize(problem())
    dequantize = LevelsWeight.dequantize
    monkeypatch.setattr(LevelsWeight, "dequantize", lambda self, dtype=torch.float32: dequantize(self, dtype).detach())
    with pytest.raises(QuantkitError, match="'levels_for_tests' cannot be tuned: its dequantize is not differentiable"):
        TunedLinear(tunable(packed), None).open()


class TunableLevels(Tunable):
    """One parameter for all levels."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.scale = weight, Scaled(torch.ones(()))

    def coded(self):
        yield from ()

    def forward(self):
        return self.scale() * self.weight.dequantize()

    def packed(self):
        return self.weight


def test_an_entry_of_the_formats_name_comes_first(monkeypatch):
    table = registry._BUILT_IN["quantkit.tunables"] | {LevelsWeight.format: "a module:TunableLevels"}
    monkeypatch.setitem(registry._BUILT_IN, "quantkit.tunables", table)
    monkeypatch.setattr("quantkit.tuning.parts.base.resolve", lambda group, name: TunableLevels)
    parts = tunable(Levels().quantize(problem()))
    assert isinstance(parts, TunableLevels)
    assert len([*parts.parameters()]) == 1


def test_every_entry_is_a_formats_and_resolves():
    assert set(registry.names("quantkit.tunables")) <= set(registry.names("quantkit.formats"))
    for name in registry.names("quantkit.tunables"):
        assert issubclass(registry.resolve("quantkit.tunables", name), Tunable)


def test_zeros_in_fp32_stay_such():
    """Of imported offsets; beside one with zeros in fp16 such a weight is not put."""
    plain = RTN(4, 32, symmetric=False).quantize(torch.randn(24, 96))
    wide = replace(plain, zeros=plain.zeros.float() + 1e-4)
    again = tunable(wide).packed()
    assert again.metadata() == wide.metadata()
    assert all(torch.equal(tensor, again.state()[name]) for name, tensor in wide.state().items())
    both = QuantizedWeight.side_by_side([wide, wide])
    assert torch.equal(both.dequantize(), torch.cat([wide.dequantize()] * 2))
    assert QuantizedWeight.side_by_side([wide, plain]) is None
