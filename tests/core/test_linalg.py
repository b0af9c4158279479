import math

import pytest
import torch

from quantkit.core.linalg import (
    NotPositiveDefinite,
    damped_inverse_factor,
    elimination_order,
    inverse_factor,
    inverse_power,
    mirrored,
    moments,
)


def _hessian(n=24):
    x = torch.randn(4 * n, n, dtype=torch.float64)
    return x.T @ x / len(x)


def test_factor_of_the_inverse():
    hessian = _hessian()
    upper = inverse_factor(hessian)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(hessian))


def test_indefinite_matrix_has_no_factor():
    assert inverse_factor(-torch.eye(3)) is None


def test_damping_raises_itself_and_says_so():
    x = torch.randn(2, 16)
    singular = x.T @ x  # rank 2: fp32 cannot factor it undamped
    _, used = damped_inverse_factor(singular, 0.0)
    assert 0 < used <= 1
    _, kept = damped_inverse_factor(_hessian(), 0.01)
    assert kept == 0.01


def test_dead_inputs_do_not_matter():
    hessian = _hessian(8)
    hessian[3] = hessian[:, 3] = 0
    upper, used = damped_inverse_factor(hessian, 0.01)
    assert used == 0.01
    assert upper[3, :3].abs().max() == 0
    assert upper[3, 4:].abs().max() == 0


def test_non_finite_and_negative_matrices_are_refused():
    with pytest.raises(NotPositiveDefinite, match="NaN or Inf"):
        damped_inverse_factor(torch.full((2, 2), float("nan")), 0.01)
    with pytest.raises(NotPositiveDefinite, match="any damping"):
        damped_inverse_factor(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), 0.01)


def test_elimination_order_without_damping_and_with_dead_inputs():
    x = torch.randn(50, 80)
    x[:, ::3] = 0
    for hessian in (x.T @ x, torch.zeros(80, 80)):
        assert sorted(elimination_order(hessian, 0.0).tolist()) == list(range(80))


def test_elimination_order_lessens_what_feedback_pays():
    """A permutation; the unexplained variances have the same product in any order, and here a smaller sum."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64)).Q
    hessian = basis * torch.logspace(0, -4, 200, dtype=torch.float64) @ basis.T
    order = elimination_order(hessian, 0.01)
    assert sorted(order.tolist()) == list(range(200))

    def unexplained(order):
        factor, _ = damped_inverse_factor(hessian[order][:, order], 0.01)
        return factor.diagonal() ** -2

    found, natural = unexplained(order), unexplained(torch.arange(200))
    torch.testing.assert_close(found.log().sum(), natural.log().sum())
    assert found.sum() < 0.9 * natural.sum()
    assert found.sum() < unexplained(order.flip(0)).sum()


def test_the_inverse_power_rounds_nothing_and_keeps_to_fp32():
    for value in (1e-30, 0.3, 0.5, 1.0, 7e37):
        assert 0.5 <= value * inverse_power(value) <= 1
        assert math.frexp(inverse_power(value))[0] == 0.5
    assert inverse_power(0.0) == inverse_power(math.inf) == inverse_power(math.nan) == 1
    assert torch.isfinite(torch.tensor(1e-45) * inverse_power(1e-45))


def _add(total, x, y):
    for place, product in moments(total, x, y):
        place += product


@pytest.mark.parametrize("columns", [3, 255, 256, 259, 1023])
def test_symmetric_sums_are_whole_once_mirrored(columns):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, columns, generator=generator, dtype=torch.float64)
    weights = torch.rand(2, 40, 1, generator=generator, dtype=torch.float64)
    total = torch.zeros(columns, columns, dtype=torch.float64)
    for rows, counted in zip(x, weights, strict=True):
        _add(total, rows * counted, rows)
    expected = sum(rows.T @ (rows * counted) for rows, counted in zip(x, weights, strict=True))
    torch.testing.assert_close(mirrored(total), expected)
    _add(total, x[0], x[0])
    torch.testing.assert_close(mirrored(total), expected + x[0].T @ x[0])
