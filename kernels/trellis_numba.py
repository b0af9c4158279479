"""Products with trellis-coded weights on a CPU, compiled by numba: see `trellis` for the code.

    y[n] = scale * sum over k of value(state n of ring k) * step[k] x[k]

The i-th words of all rings lie side by side, so that a loop along k loads a vector of words and the one of words behind
it; all lanes shift by the same number of places. A value is computed by eight instructions, without a table.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from quantkit.kernels import trellis
from quantkit.kernels.numba_words import (
    add,
    as_float,
    both,
    differ,
    either,
    exact,
    exact_parallel,
    fast,
    fast_parallel,
    inlined,
    mul,
    run,
    shl,
    shr,
    words_of,
)  # fmt: skip
from quantkit.kernels.trellis import FLIP, INCREMENT, MASK, MULTIPLIER, PLACES

FEW = 2
"""Rows of x up to which a product a row takes less time than to write W out."""


def multiply(
    x: Tensor, codes: Tensor, scales: Tensor, scale: Tensor, bits: int, state_bits: int, parts: Sequence[int]
) -> Tensor:
    """x fp32 [M, K] times the weight: fp32 [M, N], by one product a row."""
    y = torch.empty(len(x), sum(parts), dtype=torch.float32)
    stepped = x[:, None] * trellis.step(scales)
    for m in range(len(x)):
        for i, (words, first) in enumerate(_parts(codes, bits, parts)):
            result = y[m, first : first + parts[i]].numpy()
            form = words, stepped[m, i].numpy(), bits, state_bits, float(scale[i]), result
            run(_multiply, _multiply_parallel, parts[i], PLACES, parts[i] * x.shape[1], *form)
    return y


def unpack(
    codes: Tensor,
    scales: Tensor,
    scale: Tensor,
    bits: int,
    state_bits: int,
    parts: Sequence[int],
    out: Tensor,
    first: int,
) -> None:
    """Rows of the weight from `first` on into out, fp32 [rows, K]; the same numbers as `trellis.dequantized`."""
    steps = trellis.step(scales)
    for i, (words, start) in enumerate(_parts(codes, bits, parts)):
        low, high = max(first, start), min(first + len(out), start + parts[i])
        if low < high:
            form = words, steps[i].numpy(), bits, state_bits, float(scale[i])
            target = out[low - first : high - first].numpy()
            run(_unpack, _unpack_parallel, high - low, 1, target.size, *form, low - start, target)


def _parts(codes: Tensor, bits: int, parts: Sequence[int]) -> list[tuple[Any, int]]:
    """(words of its rings, number of its first output) of each part."""
    ends = np.cumsum([0, *parts])
    return [(words_of(own), int(end)) for own, end in zip(codes.split(trellis.lines(parts, bits)), ends, strict=False)]


@inlined
def _value(state):
    """`trellis.evaluate` of a state."""
    word = both(add(mul(state, np.uint32(MULTIPLIER)), np.uint32(INCREMENT)), np.uint32(MASK))
    word = differ(word, np.uint32(FLIP))
    return as_float(shl(word, np.uint32(16))) + as_float(both(word, np.uint32(0xFFFF0000)))


@inlined
def _place(place, bits, words):
    """(number of the word in which a place begins, that of the word behind it, its first bit)."""
    bit = place * bits
    word = bit // 32
    return word, word + 1 if word + 1 < words else 0, np.uint32(bit % 32)


@fast
def _sum(words, behind, shift, state_bits, x):
    """The sum over k of value * x, at one place of all rings."""
    mask, total = np.uint32((1 << state_bits) - 1), np.float32(0)
    if shift + state_bits <= 32:
        for k in range(len(x)):
            total += _value(both(shr(words[k], shift), mask)) * x[k]
    else:
        back = np.uint32(32 - shift)
        for k in range(len(x)):
            total += _value(both(either(shr(words[k], shift), shl(behind[k], back)), mask)) * x[k]
    return total


@fast
def _multiply(words, x, bits, state_bits, scale, y, first, last):
    """Outputs from `first` to `last`."""
    for n in range(first, last):
        word, behind, shift = _place(n, bits, len(words))
        y[n] = np.float32(scale) * _sum(words[word], words[behind], shift, state_bits, x)


@fast_parallel
def _multiply_parallel(words, x, bits, state_bits, scale, y, ends):
    for i in prange(len(ends) - 1):
        _multiply(words, x, bits, state_bits, scale, y, ends[i], ends[i + 1])


@exact
def _unpack(words, steps, bits, state_bits, scale, start, out, first, last):
    """Rows from `first` to `last` of `out`, which are those from `start` on of the weight."""
    mask, factor = np.uint32((1 << state_bits) - 1), np.float32(scale)
    for n in range(first, last):
        word, behind, shift = _place(start + n, bits, len(words))
        one, other, row = words[word], words[behind], out[n]
        if shift + state_bits <= 32:
            for k in range(len(row)):
                row[k] = _value(both(shr(one[k], shift), mask)) * steps[k] * factor
        else:
            back = np.uint32(32 - shift)
            for k in range(len(row)):
                row[k] = _value(both(either(shr(one[k], shift), shl(other[k], back)), mask)) * steps[k] * factor


@exact_parallel
def _unpack_parallel(words, steps, bits, state_bits, scale, start, out, ends):
    for i in prange(len(ends) - 1):
        _unpack(words, steps, bits, state_bits, scale, start, out, ends[i], ends[i + 1])
