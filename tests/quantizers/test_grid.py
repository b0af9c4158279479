import pytest
import torch

from quantkit.quantizers.grid import GridSettings, fit_grid

GAUSSIAN_OPTIMUM = {2: 0.11885, 3: 0.03744, 4: 0.01154}  # uniform quantizer at its best step, N(0, 1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_reaches_the_uniform_optimum(bits):
    """Fitted to each group of 128, a searched grid must beat the one step that is best for all of N(0, 1)."""
    weight = torch.randn(2000, 128)
    for symmetric in (True, False):
        grid = fit_grid(weight, bits, symmetric, search=True)
        mse = (weight - grid.decode(grid.encode(weight))).square().mean().item()
        assert mse < GAUSSIAN_OPTIMUM[bits]
        ranged = fit_grid(weight, bits, symmetric, search=False)
        assert mse < (weight - ranged.decode(ranged.encode(weight))).square().mean().item()


def test_search_is_near_brute_force():
    weight = torch.randn(20, 32)
    grid = fit_grid(weight, 2, symmetric=True, search=True)
    found = (weight - grid.decode(grid.encode(weight))).square().sum(-1)
    scales = torch.linspace(0.2, 2.5, 2000).view(-1, 1, 1)
    codes = (weight / scales + 1.5).round().clamp(0, 3)
    best = (weight - (codes - 1.5) * scales).square().sum(-1).amin(0)
    assert (found <= 1.06 * best).all()
    assert found.sum() <= 1.02 * best.sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_degenerate_groups_stay_finite(bits, symmetric):
    for weight in (torch.zeros(2, 16), torch.full((2, 16), 3.0), torch.full((2, 16), 1e-9), torch.eye(2, 16) * 1e4):
        grid = fit_grid(weight, bits, symmetric, search=True)
        decoded = grid.decode(grid.encode(weight))
        assert torch.isfinite(decoded).all()
        assert torch.isfinite(grid.scale.half()).all()
        assert torch.isfinite(grid.zero.half()).all()


def test_asymmetric_grid_represents_a_constant():
    weight = torch.full((3, 16), 0.75)
    grid = fit_grid(weight, 4, symmetric=False, search=True)
    torch.testing.assert_close(grid.decode(grid.encode(weight)), weight, rtol=2e-3, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("search", [True, False])
def test_a_grid_around_a_whole_number(bits, search):
    """Zero is a level, there is one more on one side, and each group has it where it fits better."""
    weight = torch.randn(200, 64)
    weight[0] = weight[0].abs()
    weight[1] = -weight[0]
    grid = fit_grid(weight, bits, True, search, whole=True)
    assert torch.equal(grid.zero, torch.full_like(grid.zero, 2 ** (bits - 1)))
    assert torch.equal(grid.scale, grid.scale.half().float()) and (grid.scale != 0).all()
    assert torch.equal(grid.decode(grid.zero.expand_as(weight)), torch.zeros_like(weight))
    error = (weight - grid.decode(grid.encode(weight))).square().sum(-1)
    assert (error <= weight.square().sum(-1)).all()
    if search and 1 < bits < 8:
        half = fit_grid(weight, bits, True, True)
        other = (weight - half.decode(half.encode(weight))).square().sum(-1)
        assert error[2:].sum() < 2 * other[2:].sum() and error[0] < other[0]
        assert float(grid.scale[0]) == -float(grid.scale[1]) < 0


def test_importance_moves_the_grid():
    weight = torch.randn(50, 64)
    importance = torch.ones(64)
    importance[:8] = 1e4
    plain = fit_grid(weight, 2, True, True)
    weighted = fit_grid(weight, 2, True, True, importance)
    error = [(weight - g.decode(g.encode(weight)))[:, :8].square().sum() for g in (plain, weighted)]
    assert error[1] < 0.8 * error[0]


@pytest.mark.parametrize(
    "settings",
    [
        *({"bits": 0}, {"bits": 9}, {"group_size": 0}, {"group_size": -2}, {"group_size": 4}, {"grid": "whole"}),
        {"grid": "int", "symmetric": False},
    ],
)
def test_senseless_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"bits|group_size|grid"):
        GridSettings(**settings)


@pytest.mark.parametrize("spread", [0.1, 1e-2, 1e-3, 1e-4])
def test_small_weights_keep_their_precision(spread):
    weight = torch.randn(50, 128)
    errors = []
    for values in (weight, weight * spread):
        grid = fit_grid(values, 4, True, True)
        errors.append(((values - grid.decode(grid.encode(values))).square().sum() / values.square().sum()).item())
    assert errors[1] < 1.1 * errors[0]
