"""The few matrix facts that second-order quantization rests on.

With U upper triangular and H^-1 = U^T U, GPTQ's error feedback reads its multipliers off the rows of U. U is obtained
without forming H^-1: a Cholesky factor of H taken from the last row upwards gives H = R R^T with R upper triangular,
and then U = R^-1. That the multipliers are rows of a Cholesky factor is GPTQ's (arXiv 2210.17323, section 3, step 3),
which factors the inverse.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


class NotPositiveDefinite(ValueError):
    """The matrix does not factor, whatever damping was tried."""


def inverse_power(value: float) -> float:
    """The power of two that brings a positive number to between 1/2 and 1, as far as fp32 goes; 1 for 0, NaN and Inf.

    To multiply by it rounds nothing, and keeps what is squared afterwards within the range of fp32.
    """
    return 2.0 ** -min(max(math.frexp(value)[1], -126), 126) if math.isfinite(value) else 1.0


PANELS, LEAST = 4, 256
"""Panels in which a symmetric sum is added up, and columns from which on."""


def _panels(columns: int) -> list[tuple[int, int]]:
    count = PANELS if columns >= LEAST else 1
    return list(pairwise(columns * panel // count for panel in range(count + 1)))


def moments(total: Tensor, x: Tensor, y: Tensor, symmetric: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """What x^T y adds to a sum of such products: places in it, each with its product; `mirrored` completes the sum.

    Args:
        total: the sum, [n, n]; of a symmetric one only panels of rows, each from its diagonal block on, are brought up
            to date, at two thirds of the cost.
        x, y: [tokens, n].
        symmetric: whether x^T y is.
    """
    for start, stop in _panels(len(total)):
        first = start if symmetric else 0
        yield total[start:stop, first:], x[:, start:stop].T @ y[:, first:]


def mirrored(total: Tensor) -> Tensor:
    """The sum that `moments` has made, completed in place."""
    for start, stop in _panels(len(total)):
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def inverse_factor(matrix: Tensor) -> Tensor | None:
    """Upper-triangular U with matrix^-1 = U^T U, or None where `matrix` is not positive definite.

    Args:
        matrix: symmetric [n, n], fp32 or fp64.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if failed.item():
        return None
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return upper if bool(torch.isfinite(upper).all()) else None


def damped_inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """`inverse_factor` of H + damp * mean(diag H) * I, with the smallest damping that factors.

    Args:
        hessian: symmetric [n, n]; a zero on the diagonal marks a dead input and is set to 1.
        damp: the first damping to try; it is raised fourfold (from 1e-4 at least) up to 1.

    Returns:
        (U, the damping used).

    Raises:
        NotPositiveDefinite: non-finite entries, or no damping up to 1 factors.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian).all()):
        raise NotPositiveDefinite("the Hessian holds NaN or Inf")
    mean = float(diagonal.mean())
    dead = diagonal == 0
    used = damp
    while True:
        matrix = hessian.clone()
        matrix.diagonal()[dead] = 1.0
        matrix.diagonal().add_(used * mean)
        upper = inverse_factor(matrix)
        if upper is not None:
            return upper, used
        if used >= 1.0:
            raise NotPositiveDefinite(f"the Hessian does not factor with any damping from {damp:g} to 1")
        used = min(max(4 * used, 1e-4), 1.0)


def elimination_order(hessian: Tensor, damp: float) -> Tensor:
    """An order of columns in which error feedback loses little, int64 [n].

    Feedback pays D_j, the variance of input j that the inputs after it leave unexplained, for the error of column j.
    The product of all D_j is det H in any order, so that their sum is least where they are most alike: the last column
    is the one with the least variance, the one before it that with the least of what the last leaves unexplained, and
    so on (the ordered interference cancellation of V-BLAST, Wolniansky et al. 1998). Columns are taken n / 64 at a
    time, which costs n^3 operations in matrix products.

    Args:
        hessian: H, symmetric [n, n].
        damp: added to its diagonal, as a fraction of the mean; 0.001 at least.
    """
    left = torch.arange(len(hessian), device=hessian.device)
    rest = hessian.clone()
    rest.diagonal().add_(max(damp, 1e-3) * hessian.diagonal().mean().clamp_min(1e-30))  # any order is a valid one
    size, order = max(1, len(hessian) // 64), []
    while len(left):
        by_variance = rest.diagonal().argsort(stable=True)
        taken, kept = by_variance[:size], by_variance[size:].sort().values
        order.append(left[taken])
        known, across = rest[taken][:, taken], rest[kept][:, taken]
        explained = torch.linalg.solve(known, across.T) if len(kept) else across.T
        rest, left = rest[kept][:, kept].sub_(across @ explained), left[kept]
    return torch.cat(order).flip(0)


def column_scales(target: Tensor, values: Tensor, hessian: Tensor, damp: float = 1e-3) -> Tensor:
    """Factors s [in_features] of the columns of V that minimise tr((W - V S) H (W - V S)^T), S = diag(s).

    The normal equations are ((V^T V) o H) s = diag(V^T W H); a ridge pulls s towards 1, so that columns which hold
    nothing keep their factor.

    Args:
        target: W, fp32 or fp64 [out_features, in_features].
        values: V, the same shape.
        hessian: H, [in_features, in_features].
        damp: the ridge, as a fraction of the mean diagonal.
    """
    normal = (values.T @ values) * hessian
    right = ((target @ hessian) * values).sum(0)
    ridge = damp * normal.diagonal().mean().clamp_min(1e-30)
    normal.diagonal().add_(ridge)
    scales: Tensor = torch.linalg.solve(normal, right + ridge)
    return scales
