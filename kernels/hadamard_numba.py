"""The rotation of `hadamard` for few rows on a CPU, compiled by numba.

A block of x is a matrix X [order of C, power of two], and Y = C X S. S is applied in log2(power) stages of sums and
differences: a stage takes the lowest bit of the column and makes it the highest, so that it reads neighbours, writes
two runs, and is made of vectors whatever its number; after all of them each column is in its place again.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.kernels.hadamard import factors, paley
from quantkit.kernels.numba_words import fast

FEW = 2
"""Rows of x up to which these loops take less time than torch's products with matrices of order 16."""


def rotate(x: Tensor, signs: Tensor, inverse: bool) -> Tensor:
    """R x, or R^T x, of x fp32 [M, n]."""
    y = torch.empty(x.shape, dtype=torch.float32)
    _, core, power = factors(x.shape[1])
    matrix = _core(core, inverse)
    scratch = np.empty((2, core, power), np.float32)
    for row, result in zip(x.detach().contiguous().numpy(), y.numpy(), strict=True):
        _rotate(row, signs.numpy(), matrix, np.float32((core * power) ** -0.5), inverse, scratch, result)
    return y


@lru_cache
def _core(order: int, inverse: bool) -> Any:
    known = paley(order)
    if known is None:
        return np.ones((1, 1), np.float32)
    return (known.T if inverse else known).contiguous().numpy()


@fast
def _flip(x, signs, first, factor, y):
    """x * factor, negated where a sign's bit is set."""
    for i in range(len(x)):
        at = np.uint64(first + i)
        negative = (signs[at >> np.uint64(3)] >> (at & np.uint64(7))) & 1
        y[i] = x[i] * (-factor if negative else factor)


@fast
def _sylvester(one, other):
    """one [power] times S; the result is in the first of the two returned, which are the arguments in some order."""
    half = len(one) // 2
    stages = 0
    while (1 << stages) < len(one):
        low, high = other[:half], other[half:]
        for i in range(half):
            a, b = one[np.uint64(2 * i)], one[np.uint64(2 * i + 1)]
            low[i] = a + b
            high[i] = a - b
        one, other = other, one
        stages += 1
    return one


@fast
def _rotate(x, signs, matrix, factor, inverse, scratch, y):
    """One row; `scratch` is fp32 [2, order of C, power]."""
    core, power = scratch.shape[1:]
    size = core * power
    turned, other = scratch[0], scratch[1]
    for first in range(0, len(x), size):
        result = y[first : first + size]
        if inverse:
            for i in range(core):
                turned[i] = x[first + i * power : first + (i + 1) * power]
        else:
            for i in range(core):
                start = first + i * power
                _flip(x[start : start + power], signs, start, factor, turned[i])
        for i in range(core):
            found = _sylvester(turned[i], other[i])
            for k in range(power):
                turned[i, k] = found[k]
        for i in range(core):
            row = result[i * power : (i + 1) * power]
            if core == 1:
                row[:] = turned[0]
            else:
                row[:] = 0
                for j in range(core):
                    sign = matrix[i, j]
                    for k in range(power):
                        row[k] += sign * turned[j, k]
        if inverse:
            _flip(result, signs, first, factor, result)
