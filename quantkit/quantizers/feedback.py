"""The one second-order loop: quantize column by column, push each error into the columns to come.

For a layer with inputs of second moment H, minimising tr((W - Q) H (W - Q)^T) over Q with a fixed
order of columns gives, with H^-1 = U^T U and U upper triangular,

    q_j = round(w_j),    e_j = (w_j - q_j) / U_jj,    w_k -= e_j U_jk  for k > j

(GPTQ, arXiv 2210.17323, algorithm 1; the same as LDLQ, arXiv 2307.13304). The loss is exactly the sum
of all e^2. How a column is rounded is the caller's: a scalar grid, a codebook, a trellis. Updates of
columns beyond a block of `block_size` are deferred to one matrix product; that changes the order of
additions and nothing else, because a block ends early where a group of columns that is about to be
opened would otherwise be seen without them.

A code over several columns rounds them together, without feedback among them: with U_BB the diagonal
block, q_B = round(w_B) and e_B = (w_B - q_B) U_BB^-1 (QuIP#, arXiv 2402.04396, block LDLQ).
"""

from typing import Protocol

import torch
from torch import Tensor

from quantkit.core.stats import LayerStats


class Rounding(Protocol):
    """Rounds one column after the other, or `width` columns at a time, and keeps the codes it chose."""

    width: int

    def group_size(self) -> int:
        """Columns that are opened together; the loop calls `open` at each multiple of it."""
        ...

    def open(self, start: int, columns: Tensor) -> None:
        """Sees columns [count, out_features] from `start` on, with all feedback so far applied."""
        ...

    def round(self, index: int, column: Tensor) -> Tensor:
        """The quantized value of column `index`, [out_features], or of `width` columns from there, [width, out]."""
        ...


def error_feedback(weight: Tensor, factor: Tensor, rounding: Rounding, block_size: int = 128) -> Tensor:
    """Quantizes all columns of `weight`.

    Args:
        weight: fp32 or fp64 [out_features, in_features], columns in the order of quantization.
        factor: U, upper triangular [in_features, in_features], in the same order.
        rounding: the rounding primitive; it keeps the codes.
        block_size: columns between two deferred updates; a multiple of the rounding's width.

    Returns:
        The loss of each row, [out_features]: its sum is tr((W - Q) H (W - Q)^T) for the damped H.
    """
    columns = weight.T.contiguous().clone()  # a column of W is then contiguous
    in_features, group = len(columns), rounding.group_size()
    loss = torch.zeros_like(columns[0])
    start = 0
    while start < in_features:
        stop = _block_end(start, min(start + block_size, in_features), group, in_features)
        errors = torch.empty_like(columns[start:stop])
        diagonal = factor.diagonal()[start:stop].tolist()
        for j in range(start, stop, rounding.width):
            if j % group == 0:
                rounding.open(j, columns[j : j + group])
            if rounding.width == 1:
                error = columns[j].sub(rounding.round(j, columns[j])).div_(diagonal[j - start])
                columns[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
                errors[j - start] = error
            else:
                end = min(j + rounding.width, in_features)
                error = columns[j:end] - rounding.round(j, columns[j:end])
                error = torch.linalg.solve_triangular(factor[j:end, j:end].T, error, upper=False)
                columns[end:stop].addmm_(factor[j:end, end:stop].T, error, alpha=-1)
                errors[j - start : end - start] = error
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        loss += errors.square().sum(0)
        start = stop
    return loss


def check_feedback(damp: float, block_size: int) -> None:
    """Raises ValueError where a quantizer's settings of the loop make no sense."""
    if not 0 <= damp <= 1:
        raise ValueError(f"damp={damp}: a fraction of the mean diagonal, from 0 to 1")
    if type(block_size) is not int or block_size < 1:
        raise ValueError(f"block_size={block_size!r}: a whole number of columns, at least one")


def required(stats: LayerStats | None, method: object) -> LayerStats:
    """The statistics of the layer's inputs, for a method that cannot do without.

    Raises:
        ValueError: there are none.
    """
    if stats is None:
        raise ValueError(f"{type(method).__name__} reads the Hessian of the layer's inputs; RTN works without")
    return stats


def _block_end(start: int, stop: int, group: int, in_features: int) -> int:
    """The end of the block at `start`: before the first group that opens inside it and reaches beyond it."""
    last_opening = (stop - 1) // group * group
    if start < last_opening and min(last_opening + group, in_features) > stop:
        return last_opening
    return stop
