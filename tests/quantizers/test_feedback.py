"""GPTQ's identities, in float64: what the loop must satisfy whatever the data."""

import itertools

import pytest
import torch

from quantkit.core.linalg import damped_inverse_factor
from quantkit.core.metrics import proxy_loss
from quantkit.quantizers.feedback import error_feedback

from ..helpers.methods import problem


class UniformGrid:
    """Rounds to multiples of `step`, within +-limit steps; the simplest rounding primitive."""

    def __init__(self, step, limit=1e9, group=10**9, width=1):
        self.step, self.limit, self.group, self.columns, self.opened = step, limit, group, {}, []
        self.width = width

    def group_size(self):
        return self.group

    def open(self, start, columns):
        self.opened.append((start, columns.clone()))

    def round(self, index, column):
        rounded = (column / self.step).round().clamp(-self.limit, self.limit) * self.step
        for offset, own in enumerate(rounded if self.width > 1 else [rounded]):
            self.columns[index + offset] = own
        return rounded

    def weight(self):
        return torch.stack([self.columns[i] for i in range(len(self.columns))], dim=1)


def quantize(weight, hessian, rounding, damp=0.01, **options):
    factor, used = damped_inverse_factor(hessian, damp)
    loss = error_feedback(weight, factor, rounding, **options)
    damped = hessian + used * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    return rounding.weight(), loss, damped


def test_loss_is_the_damped_proxy_loss():
    """Sum of e^2 = tr(dW H dW^T), ALGORITHMS identity (i)."""
    weight, hessian = problem()
    quantized, loss, damped = quantize(weight, hessian, UniformGrid(0.5))
    assert abs(loss.sum().item() / proxy_loss(weight - quantized, damped) - 1) < 1e-6


@pytest.mark.parametrize("group", [1, 7, 16, 48])
def test_codes_do_not_depend_on_the_block_size(group):
    weight, hessian = problem()
    runs = []
    for block_size in (1, 5, 16, 32, 48, 1000):
        rounding = UniformGrid(0.5, limit=2, group=group)
        runs.append((quantize(weight, hessian, rounding, block_size=block_size)[0], rounding.opened))
    for quantized, opened in runs[1:]:
        assert torch.equal(quantized, runs[0][0])
        assert [start for start, _ in opened] == [start for start, _ in runs[0][1]] == list(range(0, 48, group))
        for (_, seen), (_, expected) in zip(opened, runs[0][1], strict=True):
            torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)


def test_equals_rounding_to_nearest_on_a_diagonal_hessian():
    weight, hessian = problem()
    quantized, _, _ = quantize(weight, hessian.diagonal().diag(), UniformGrid(0.3))
    assert torch.equal(quantized, (weight / 0.3).round() * 0.3)


def test_equals_fixed_order_obq():
    """OBQ (arXiv 2208.11580) with the order fixed left to right: remove a row and column of H^-1 at a time."""
    weight, hessian = problem(out_features=5, in_features=10)
    factor, _ = damped_inverse_factor(hessian, 0.01)
    inverse = factor.T @ factor
    expected = weight.clone()
    for j in range(10):
        column = (expected[:, j] / 0.4).round() * 0.4
        error = (expected[:, j] - column) / inverse[j, j]
        expected -= error.unsqueeze(1) * inverse[j].unsqueeze(0)
        expected[:, j] = column
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
        inverse[j] = inverse[:, j] = 0
        inverse[j, j] = 1
        expected[:, : j + 1] = expected[:, : j + 1]
    quantized, _, _ = quantize(weight, hessian, UniformGrid(0.4))
    torch.testing.assert_close(quantized, expected, rtol=0, atol=1e-9)


def test_never_worse_than_brute_force_allows():
    """Three columns at four levels: the loop lies between the optimum and rounding to nearest, on average below it."""
    levels = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64)
    choices = torch.tensor(list(itertools.product(levels.tolist(), repeat=3)), dtype=torch.float64)
    looped_sum = nearest_sum = best_sum = 0.0
    for seed in range(40):
        weight, hessian = problem(out_features=1, in_features=3, seed=seed)
        rounding = UniformGrid(1.0)
        rounding.round = lambda index, column, r=rounding: r.columns.setdefault(  # snap to the four levels
            index, levels[(column.unsqueeze(1) - levels).abs().argmin(1)]
        )
        looped, _, _ = quantize(weight, hessian, rounding, damp=0.0)
        nearest = levels[(weight.unsqueeze(2) - levels).abs().argmin(2)]
        errors = ((weight - choices) @ hessian * (weight - choices)).sum(1)
        assert proxy_loss(weight - looped, hessian) >= errors.min().item() - 1e-12
        looped_sum += proxy_loss(weight - looped, hessian)
        nearest_sum += proxy_loss(weight - nearest, hessian)
        best_sum += errors.min().item()
    assert best_sum <= looped_sum < nearest_sum


def test_gain_over_nearest_is_as_predicted():
    """With a grid that does not clip, E(loop) / E(nearest) is about tr(D) / tr(H) with D_jj = U_jj^-2."""
    weight, hessian = problem(out_features=300, in_features=64)
    factor, _ = damped_inverse_factor(hessian, 0.0)
    looped, _, _ = quantize(weight, hessian, UniformGrid(0.05), damp=0.0)
    nearest = (weight / 0.05).round() * 0.05
    ratio = proxy_loss(weight - looped, hessian) / proxy_loss(weight - nearest, hessian)
    predicted = (factor.diagonal() ** -2).sum() / hessian.trace()
    assert abs(ratio / predicted.item() - 1) < 0.1


@pytest.mark.parametrize("width", [4, 16])
def test_columns_rounded_together_lose_only_the_feedback_among_them(width):
    """The loss is exact for blocks too, the last of which may be short, and wider blocks lose more."""
    weight, hessian = problem(in_features=50)
    factor, _ = damped_inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(50, dtype=torch.float64)
    losses = {}
    for step in (1, width, 50):
        for block_size in (step, 3 * step):
            grid = UniformGrid(0.3, group=step, width=step)
            loss = error_feedback(weight, factor, grid, block_size)
            assert float(loss.sum()) == pytest.approx(proxy_loss(weight - grid.weight(), damped), rel=1e-9)
            losses.setdefault(step, float(loss.sum()))
            assert float(loss.sum()) == pytest.approx(losses[step], rel=1e-9)
    nearest = proxy_loss(weight - (weight / 0.3).round() * 0.3, damped)
    assert losses[1] < losses[width] < losses[50] == pytest.approx(nearest)
