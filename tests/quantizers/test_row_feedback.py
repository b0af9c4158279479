"""Feedback among rows: against its equations, and what it gains in the loss that it is for."""

from itertools import pairwise

import pytest
import torch

from quantkit import GPTQ, Hadamard, Trellis, quantizers
from quantkit.core.errors import CalibrationError
from quantkit.core.stats import LayerStats
from quantkit.kernels import trellis
from quantkit.quantizers import row_feedback
from quantkit.quantizers.row_feedback import RowFeedback


def layer(rows=96, columns=64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def moment(size):
        mix = torch.randn(size, size, generator=generator) * torch.logspace(0, -1.0, size)
        x = torch.randn(2000, size, generator=generator) @ mix
        return x.T @ x / 2000

    weight = torch.randn(rows, columns, generator=generator)
    return weight, LayerStats(moment(columns)), moment(rows)


def loss(weight, packed, stats, outputs):
    error = weight - packed.dequantize()
    return float((outputs @ error @ stats.hessian * error).sum())


def test_a_part_a_row_is_the_sequential_rounding_of_least_squares(monkeypatch):
    """Each row in turn: its target is where the loss is least for the errors before it, all rows after it free."""
    monkeypatch.setattr(row_feedback, "PARTS", 1000)
    monkeypatch.setattr(row_feedback, "LEAST_ROWS", 1)
    _, _, outputs = layer(12)
    column = torch.randn(12, dtype=torch.float64)
    stats = LayerStats(torch.eye(3)).of_layer("x", outputs.double())
    order = outputs.diagonal().argsort(descending=True)  # first what is felt most
    damped = outputs.double() + 0.05 * outputs.double().diagonal().mean() * torch.eye(12, dtype=torch.float64)
    damped = damped[order][:, order]
    expected, errors = [], torch.zeros(0, dtype=torch.float64)
    for row in range(12):
        rest = slice(row, None)
        aim = column[order][rest]
        if row:  # E_R = -H_RR^-1 H_RB E_B is the error that is wanted of the rows to come
            aim = aim + torch.linalg.solve(damped[rest, rest], damped[rest, :row] @ errors)
        expected.append(aim[0].round())
        errors = torch.cat([errors, (column[order][row] - expected[-1]).view(1)])
    feedback = RowFeedback(12, stats)
    found = feedback.round(column, lambda rows, part: rows[feedback.rows[part]].round())
    assert torch.equal(found[order], torch.stack(expected))
    assert len(feedback.rows) == 12


@pytest.mark.parametrize("quantizer", [GPTQ(2, 32), Hadamard(GPTQ(3, 32)), Hadamard(Trellis(2, 8)), Trellis(3, 10)])
def test_it_gains_in_the_loss_that_it_is_for(quantizer):
    weight, stats, outputs = layer()
    plain = loss(weight, quantizer.quantize(weight, stats), stats, outputs)
    packed = quantizer.quantize(weight, stats.of_layer("x", outputs))
    assert loss(weight, packed, stats, outputs) < 0.85 * plain
    assert packed.metadata() == quantizer.quantize(weight, stats).metadata()


@pytest.mark.parametrize("quantizer", [GPTQ(2, 32), GPTQ(4, 32, symmetric=False, order="act")])
def test_outputs_that_count_alike_change_nothing(quantizer):
    weight, stats, _ = layer()
    plain = quantizer.quantize(weight, stats)
    packed = quantizer.quantize(weight, stats.of_layer("x", torch.eye(len(weight))))
    assert all(torch.equal(tensor, packed.state()[key]) for key, tensor in plain.state().items())


@pytest.mark.parametrize("rows", [96, 100, 129, 640, 805])
def test_rings_of_parts_close_and_cost_little(rows):
    weight, stats, _ = layer(rows, 32)
    plain = Trellis(2, 10).quantize(weight, stats)
    packed = Trellis(2, 10).quantize(weight, stats.of_layer("x", torch.eye(rows)))
    identity = torch.eye(rows)
    assert loss(weight, packed, stats, identity) < 1.06 * loss(weight, plain, stats, identity)
    states = trellis.states(packed.codes, 2, 10)
    assert torch.equal(states >> 2, states.roll(-1, 0) & 255)


def test_runs_of_a_part_follow_those_of_the_part_before():
    _, stats, outputs = layer(805, 32)
    feedback = RowFeedback(805, stats.of_layer("x", outputs), 24)
    spans = sorted(span for part in feedback.runs for span in part)
    assert len(feedback.runs) == 16 and {len(part) for part in feedback.runs} == {2}
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])] and spans[-1][1] == 805
    for before, after in pairwise(feedback.runs):
        assert [stop for _, stop in before] == [start for start, _ in after]
    assert torch.equal(torch.cat(feedback.rows).sort().values, torch.arange(805))
    assert RowFeedback(805, stats, 48).rows == [slice(None)]


def test_runs_gain_nearly_as_much_as_whole_parts(monkeypatch):
    """Which rows go together does not matter; every further run is one more whose both ends are given."""
    weight, stats, outputs = layer(768, 48)
    monkeypatch.setattr(row_feedback, "PARTS", 8)
    known = stats.of_layer("x", outputs)
    whole = loss(weight, Trellis(2, 10).quantize(weight, known), stats, outputs)
    monkeypatch.setattr(quantizers.trellis, "RUN", 48)
    side_by_side = loss(weight, Trellis(2, 10).quantize(weight, known), stats, outputs)
    assert (
        whole < side_by_side < 1.3 * whole < 1.2 * loss(weight, Trellis(2, 10).quantize(weight, stats), stats, outputs)
    )


@pytest.mark.parametrize(("rows", "bits", "run", "dtype"), [(205, 2, 96, torch.float32), (805, 3, 24, torch.float64)])
def test_one_compiled_call_a_column_finds_what_single_steps_find(rows, bits, run, dtype, monkeypatch):
    pytest.importorskip("numba")
    weight, stats, outputs = layer(rows, 32)
    monkeypatch.setattr(quantizers.trellis, "RUN", run)
    known, quantizer = stats.of_layer("x", outputs), Trellis(bits, 8)
    compiled = quantizer.quantize(weight.to(dtype), known)
    monkeypatch.setattr(quantizers.trellis, "_compiled", lambda *_: None)
    assert torch.equal(compiled.codes, quantizer.quantize(weight.to(dtype), known).codes)


def test_outputs_that_do_not_factor_are_named():
    weight, stats, _ = layer(64)
    broken = stats.of_layer("layers.3.up", torch.full((64, 64), float("nan")))
    with pytest.raises(CalibrationError, match=r"layers\.3\.up: at its outputs"):
        GPTQ(2, 32).quantize(weight, broken)
