"""Block-wise tuning inside quantization: it helps every method, never harms, resumes exactly."""

import copy

import pytest
import torch

import quantkit
from quantkit import GPTQ, RTN, BlockTuning, Calibration, Hadamard, LowRank, PVSettings, Recipe
from quantkit.core.errors import QuantkitError
from quantkit.formats.dense import DenseWeight
from quantkit.io.checkpoint import CheckpointWriter
from quantkit.run.pipeline import quantize_checkpoint

SHORT = BlockTuning(12, batch_tokens=512, pv=PVSettings(lr=5e-3))
TEXT = Calibration("stdlib", 32, 64)
FIRST = {"model.layers.1.*": None}
"""Of two blocks."""


def quantized(teacher, tokenizer, method, tune_blocks=0, **settings):
    settings.setdefault("calibration", TEXT)
    return quantkit.quantize(copy.deepcopy(teacher), tokenizer, method=method, tune_blocks=tune_blocks, **settings)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@torch.no_grad()
def distance(model, teacher, tokenizer):
    windows = Calibration("stdlib", 64, 64, seed=5).sequences(tokenizer, teacher)  # fewer do not tell
    return float(quantkit.core.metrics.token_kl(teacher(windows).logits, model(windows).logits).mean())


@pytest.mark.parametrize(
    ("method", "rules"),
    [(GPTQ(2), {}), (RTN(3), FIRST), (Hadamard(LowRank(RTN(2), 4)), FIRST)],
    ids=["gptq", "rtn", "wrapped"],
)
def test_it_helps_at_the_same_size(method, rules, teacher, tokenizer):
    plain = quantized(teacher, tokenizer, method, rules=rules)
    tuned = quantized(teacher, tokenizer, method, SHORT, rules=rules)
    reports = plain.quantkit_report, tuned.quantkit_report
    assert reports[0].bits_per_weight == reports[1].bits_per_weight
    assert all(layer.tuned is None for layer in reports[0].layers)
    losses = [layer.tuned for layer in reports[1].layers]
    assert all(after <= before for before, after in losses)
    assert any(after < before for before, after in losses)
    assert distance(tuned, teacher, tokenizer) < distance(plain, teacher, tokenizer)


def test_a_run_that_is_cut_and_resumed_gives_the_same_bytes(short_reference, tmp_path, monkeypatch):
    recipe = Recipe(GPTQ(2), calibration=Calibration("stdlib", 4, 64), tuner=BlockTuning(2, batch_tokens=128))
    report = quantize_checkpoint(short_reference, recipe, tmp_path / "whole")
    write = CheckpointWriter.write

    def dies(self, index, name, layers):
        write(self, index, name, layers)
        if index == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(short_reference, recipe, tmp_path / "cut")
    monkeypatch.undo()
    seen = []
    resumed = quantize_checkpoint(
        short_reference, recipe, tmp_path / "cut", resume=True, progress=lambda *told: seen.append(told[2])
    )
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    assert resumed.layers == report.layers
    tuning = [name for name in seen if "tuning" in name]
    assert tuning == [f"model.layers.1, tuning {step}/2" for step in (1, 2)]


def test_what_gains_nothing_changes_nothing(teacher, tokenizer):
    text = Calibration("stdlib", 4, 64)
    wild = BlockTuning(2, pv=PVSettings(lr=0.9, code_lr=0.9, fraction=1.0, trust=1.0))
    plain = quantized(teacher, tokenizer, GPTQ(4), calibration=text)
    tuned = quantized(teacher, tokenizer, GPTQ(4), wild, calibration=text)
    assert all(before == after for before, after in (layer.tuned for layer in tuned.quantkit_report.layers))
    found = tuned.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in plain.state_dict().items())
    assert all(parameter.requires_grad for name, parameter in tuned.named_parameters() if "norm" in name)


def test_bad_input(teacher, tokenizer):
    with pytest.raises(QuantkitError, match="steps=-1 of block-wise tuning"):
        quantized(teacher, tokenizer, GPTQ(2), -1)
    with pytest.raises(QuantkitError, match="needs the model's tokenizer"):
        quantized(teacher, None, RTN(3), SHORT)

    class Rounded(RTN):
        def quantize(self, weight, stats=None):
            return DenseWeight(super().quantize(weight).dequantize().half())

    with pytest.raises(QuantkitError, match="the format 'dense' cannot be tuned"):
        quantized(teacher, tokenizer, Rounded(3), SHORT)
