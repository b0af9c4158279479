import pytest
import torch

from quantkit.core.errors import CalibrationError
from quantkit.core.stats import LayerStats, StatsAccumulator


def test_means_do_not_depend_on_the_batches():
    x_q, x = torch.randn(30, 7), torch.randn(30, 7)
    whole = StatsAccumulator(7, True, torch.device("cpu"))
    whole.add(x_q, x)
    parts = StatsAccumulator(7, True, torch.device("cpu"))
    parts.add(x_q[:10].view(2, 5, 7), x[:10].view(2, 5, 7))
    parts.add(x_q[10:], x[10:])
    for stats in (whole.finish("a"), parts.finish("a")):
        assert stats.num_tokens == 30
        torch.testing.assert_close(stats.hessian, x_q.T @ x_q / 30)
        torch.testing.assert_close(stats.cross, x.T @ x_q / 30)


def test_half_precision_inputs_are_summed_in_fp32():
    x = torch.full((4, 3), 300.0, dtype=torch.float16)  # squares overflow fp16
    accumulator = StatsAccumulator(3, False, torch.device("cpu"))
    accumulator.add(x)
    assert accumulator.finish("a").hessian.max() == 90000


def test_factor_is_shared_and_damping_reported():
    stats = LayerStats(torch.eye(4))
    assert stats.damping is None
    assert stats.inverse_factor(0.01) is stats.inverse_factor(0.01)
    assert stats.damping == 0.01
    assert stats.raised_damping is None
    singular = LayerStats(torch.ones(8, 8))
    singular.inverse_factor(0.0)
    assert singular.raised_damping == singular.damping > 0


def test_layers_that_share_factors_have_their_own_damping():
    """So that it does not matter for a report which of them one process packs."""
    stats = LayerStats(torch.eye(4))
    first, second = stats.of_layer("q", None), stats.of_layer("k", None)
    factor = first.inverse_factor(0.1)
    first.changed("twice", lambda x: 2 * x).inverse_factor(0.2)
    second.inverse_factor(0.01)
    second.changed("twice", lambda x: 2 * x).inverse_factor(0.05)
    assert (first.damping, second.damping) == (0.2, 0.05)
    assert stats.of_layer("v", None).inverse_factor(0.1) is factor


def test_unusable_inputs_name_the_layer():
    accumulator = StatsAccumulator(3, False, torch.device("cpu"))
    with pytest.raises(CalibrationError, match=r"mlp\.up: no calibration token"):
        accumulator.finish("mlp.up")
    accumulator.add(torch.tensor([[1.0, float("inf"), 0.0]]))
    with pytest.raises(CalibrationError, match=r"mlp\.up: its inputs hold NaN or Inf"):
        accumulator.finish("mlp.up")
