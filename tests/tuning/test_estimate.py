"""What a run of tuning would hold is what the run then holds, and no weight is read to know it."""

from functools import cache

import pytest
import torch

import quantkit
from quantkit import RTN, Calibration, Hadamard, LowRank, PVSettings, Trellis, TuningSettings
from quantkit.core.device import multiplies_bf16
from quantkit.core.errors import QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.run.teacher import Teacher
from quantkit.tuning.end_to_end import _Run
from quantkit.tuning.estimate import estimate
from quantkit.tuning.parts.base import tunable
from quantkit.tuning.request import TuningRun
from quantkit.tuning.run import run

from ..helpers.methods import METHODS, layer

CORRECTED = Hadamard(LowRank(RTN(3, 32), 2))
TEXT = Calibration("stdlib", 8, 32, seed=1)
TUNABLE = {name: method for name, method in METHODS.items() if name != "sparse"}  # stored dense


@pytest.mark.parametrize("method", TUNABLE.values(), ids=TUNABLE.keys())
def test_a_weight_without_tensors_is_taken_apart_like_one_with(method):
    weight, stats = layer(64, 128)
    packed = method.quantize(weight, stats)
    real, described = tunable(packed), tunable(QuantizedWeight.empty(packed.metadata()))
    both = [parts.state_dict() for parts in (real, described)]
    assert len({tuple((name, tensor.shape, tensor.dtype) for name, tensor in state.items()) for state in both}) == 1
    assert all(tensor.is_meta for tensor in described.state_dict().values() if tensor.dim())
    assert len([*real.coded()]) == len([*described.coded()])


@pytest.fixture(scope="module")
def packed_by(model_folder, tmp_path_factory):
    """A function: method -> (packed checkpoint, its teacher)."""
    teacher = model_folder("llama_small")

    @cache
    def packed(method):
        folder = tmp_path_factory.mktemp("tuning") / "packed"
        quantkit.quantize(teacher, method=method, calibration=TEXT, output=folder)
        return folder, teacher

    return packed


@pytest.fixture
def folders(packed_by):
    """(packed checkpoint, its teacher)."""
    return packed_by(CORRECTED)


SETTINGS = {
    "all": TuningSettings(3, 2, 2, held_out=2, evaluate_every=2, embeddings=True),
    "codes stay": TuningSettings(3, 2, 2, held_out=2, norms=False, pv=PVSettings("continuous")),
    "corrections": TuningSettings(3, 2, 2, held_out=2, corrections=True),
}


@pytest.mark.parametrize("method", [CORRECTED, Hadamard(Trellis(2, 10))], ids=["corrected", "trellis"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_what_is_told_is_what_a_run_holds(settings, method, packed_by, tokenizer, tmp_path, monkeypatch):
    if settings.corrections and method is not CORRECTED:
        pytest.skip("it has no corrections")
    packed, teacher = folders = packed_by(method)
    models = [quantkit.load(folder, dtype=torch.float32) for folder in folders]

    def refuse(*_args, **_kwargs):
        raise AssertionError("weights are read")

    with monkeypatch.context() as patched:
        for place in ("quantkit.tuning.run.load", "quantkit.io.shards.Shards.read"):
            patched.setattr(place, refuse)
        told = estimate(TuningRun(packed, teacher, tmp_path / "out", TEXT, settings), "cpu")
    assert not list(tmp_path.iterdir())
    sequences = TEXT.sequences(tokenizer, models[0])
    made = _Run(models[0].eval(), Teacher(models[1].eval()), sequences, settings, multiplies_bf16(models[0].device))
    made.begin()
    made.advance()
    adam = made.optimizer.adam
    moved = [parameter for group in adam.param_groups for parameter in group["params"]]
    assert sum(told.trainable.values()) == sum(parameter.numel() for parameter in moved)
    assert told.trainable.get("codes", 0) == sum(target.numel() for target in made.optimizer.targets)
    assert told.memory["targets"] == sum(target.nbytes for target in made.optimizer.targets)
    moments = [state[name] for state in adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert told.memory["optimizer"] == sum(moment.nbytes for moment in moments)
    assert told.memory["mean"] == sum(mean.nbytes for mean in made.mean)
    assert told.memory["best"] == sum(tensor.nbytes for tensor in made.best)
    gradients = [parameter.grad for parameter in moved]
    gradients += [layer.leaf.grad for layer in made.layers.values() if hasattr(layer, "leaf")]
    assert told.memory["gradients"] == sum(gradient.nbytes for gradient in gradients if gradient is not None)
    copies = [layer.leaf for layer in made.layers.values() if hasattr(layer, "leaf")]
    copies += [layer.values for layer in made.layers.values() if hasattr(layer, "values")]
    copies += [dense.copy for dense in made._dense]
    if not settings.corrections:
        assert told.memory["copies"] == sum(copy.nbytes for copy in copies)
    assert told.memory["teacher"] == sum(p.nbytes for p in models[1].parameters())
    assert (told.layers, told.tokens, told.seqlen) == (len(made.layers), 3 * 2 * 32, 32)
    assert told.seconds is told.activation_bytes is None
    made.finish()


@pytest.mark.parametrize("steps", [9, 20])
def test_a_run_measures_as_often_as_is_told(steps, folders, tmp_path):
    packed, teacher = folders
    pv = PVSettings("continuous", lr=0.5)  # which does harm: patience ends with the last step
    settings = TuningSettings(steps, 1, 1, held_out=2, evaluate_every=6, patience=-(-steps // 6), pv=pv)
    asked = TuningRun(packed, teacher, tmp_path / "out", TEXT, settings)
    found = run(asked, "cpu")
    assert found.history[-1]["step"] == steps
    assert len(found.history) == estimate(asked, "cpu", overwrite=True).measurements
    assert ("averaged" in found.history[-1]) == (steps == 20)


def test_what_a_run_would_refuse_is_refused(folders, model_folder, tmp_path):
    packed, teacher = folders
    asked = {
        "is a packed model": TuningRun(packed, packed, tmp_path / "out", TEXT, SETTINGS["all"]),
        "is not a quantkit checkpoint": TuningRun(teacher, teacher, tmp_path / "out", TEXT, SETTINGS["all"]),
        "the teacher's model_type is gpt2": TuningRun(
            packed, model_folder("gpt2_small"), tmp_path / "out", TEXT, SETTINGS["all"]
        ),
        "8 sequences of text, 9 of them held out": TuningRun(
            packed, teacher, tmp_path / "out", TEXT, TuningSettings(held_out=9)
        ),
        "has no hidden states": TuningRun(
            packed, teacher, tmp_path / "out", TEXT, TuningSettings(held_out=2, hidden=1), tmp_path / "cache"
        ),
        "would replace": TuningRun(packed, teacher, packed, TEXT, SETTINGS["all"]),
    }
    for message, one in asked.items():
        with pytest.raises(QuantkitError, match=message):
            estimate(one, "cpu")
    assert not list(tmp_path.iterdir())
