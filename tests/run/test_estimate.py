import pytest
import torch

from quantkit import GPTQ, RTN, Recipe
from quantkit.run import trial
from quantkit.run.estimate import estimate
from quantkit.run.pipeline import quantize_checkpoint


@pytest.mark.parametrize("head_bits", [None, 6])
@pytest.mark.parametrize("architecture", ["llama_tied", "neox", "mixtral"])
def test_sizes_are_those_of_the_run_and_no_weight_is_read(architecture, head_bits, model_folder, tmp_path, monkeypatch):
    """Also for models whose shards have another form (NeoX, experts)."""
    folder, recipe = model_folder(architecture), Recipe(RTN(3, 32), head_bits=head_bits)
    report = quantize_checkpoint(folder, recipe, tmp_path / "packed")

    def refuse(*_args, **_kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr("quantkit.io.source.load", refuse)
    monkeypatch.setattr("quantkit.io.shards.Shards.read", refuse)
    expected = estimate(folder, recipe)
    assert (expected.bytes_before, expected.bytes_after) == (report.bytes_before, report.bytes_after)
    assert expected.bits_per_weight == pytest.approx(report.bits_per_weight)
    assert (expected.packed_weights, expected.all_weights) == (report.packed_weights, report.all_weights)
    assert expected.layers == len(report.layers)


def test_what_is_compiled_for_many_rows_alone_is_not_a_rows_time(monkeypatch):
    """Found with trellis codes: their compiled call for a column is not reached by a layer of eight rows."""
    seen = []

    def seconds(work, _device):
        rows = len(work.args[1])
        seen.append(rows)
        return 5.0 if rows == 64 and seen.count(64) == 1 else 0.1 + rows / 1000

    monkeypatch.setattr(trial, "_seconds", seconds)
    monkeypatch.setattr(trial, "LONG", 1.0)
    monkeypatch.setattr(trial, "WIDEST", 4096)
    layers = {"model.layers.0.mlp.up_proj": (GPTQ(3), (500, 128))}
    assert trial.rounding_seconds(layers, torch.device("cpu")) == pytest.approx(0.1 + 500 / 1000)
