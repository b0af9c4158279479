"""What the loops that numba compiles for a CPU share: numbers of 32 bits, codes in the order of columns, threads.

numba widens every sum, mask and shift of 32-bit integers to 64 bits, which halves the lanes of a vector: `shr`, `shl`,
`mul` and the like stay in 32. Indices that the compiler cannot prove to be positive are made uint64, because numba
would count negative ones from an array's end, and test each for it.

Compiled code is kept on disk beside these files, or in the user's cache folder where that cannot be written, so that
only the first call on a machine compiles. A function is found there by its arguments' types alone: what is to be a
constant of a loop (a width) is an argument of a function that numba inlines. numba and not C++, because it needs no
compiler on the user's machine.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic

_EXACT: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "cache": True}
exact = numba.njit(**_EXACT)
"""Compiles a loop whose floating-point operations are done as they stand."""
fast = numba.njit(fastmath=True, **_EXACT)
"""Compiles a loop whose sums may be taken in any order, so that they become vectors."""
contracting = numba.njit(fastmath={"contract"}, **_EXACT)
"""Compiles a loop in which products are added without a rounding between, and no sum changes its order."""
fast_parallel = numba.njit(fastmath=True, parallel=True, **_EXACT)
"""As `fast`, with `numba.prange` over threads."""
exact_parallel = numba.njit(parallel=True, **_EXACT)
"""As `exact`, with `numba.prange` over threads."""
inlined = numba.njit(inline="always", error_model="numpy")
"""A part of other functions, in which constant arguments are constants."""

SMALL = 2**18
"""Weights up to which a call is left to one thread: to wake another takes as long."""
MOST = int(vars(numba.config)["NUMBA_NUM_THREADS"])  # not an attribute that every mypy sees: numba fills its module
_LOCK = threading.Lock()
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(
    one: Callable[..., None], many: Callable[..., None], count: int, step: int, weights: int, *arguments: Any
) -> None:
    """Does the steps of range(count), by as many threads as torch has.

    numba's threads and not our own: OpenMP's, of torch and of numba, stay awake for a while after their work, and
    others would have to wait for them. A forked process has none of them, and OpenMP ends one that asks for some.

    Args:
        one: (*arguments, first, last), compiled, for the calling thread.
        many: (*arguments, ends) calls it in threads for all shares [ends[i], ends[i + 1]).
        count, step: shares begin at multiples of `step`.
        weights: numbers that the whole call reads.
    """
    steps = -(-count // step)
    threads = 1 if weights <= SMALL or _forked else min(torch.get_num_threads(), steps, MOST)
    if threads == 1:
        one(*arguments, 0, count)
        return
    ends = np.minimum(steps * np.arange(threads + 1) // threads * step, count)
    with _LOCK:  # each takes all threads anyway, and not every threading layer of numba's bears two callers
        if numba.get_num_threads() != threads:
            numba.set_num_threads(threads)
        many(*arguments, ends)


def words_of(tensor: torch.Tensor) -> Any:
    """The numbers of a tensor [...] as a contiguous array of its shape: int32 as uint32, fp16 as its bits in uint16."""
    array = tensor.detach().contiguous()
    if tensor.dtype == torch.float16:
        return array.view(torch.int16).numpy().view(np.uint16)
    return array.numpy().view(np.uint32) if tensor.dtype == torch.int32 else array.numpy()


def _operation(name: str) -> Any:
    @intrinsic
    def operation(_context, left, right):
        """LLVM's instruction `name` of two numbers of 32 bits."""

        def emit(_context, builder, _signature, arguments):
            return getattr(builder, name)(*arguments)

        return numba.uint32(numba.uint32, numba.uint32), emit

    return operation


shr, shl, mul, add = _operation("lshr"), _operation("shl"), _operation("mul"), _operation("add")
both, either, differ = _operation("and_"), _operation("or_"), _operation("xor")


@intrinsic
def _as_float(_context, word):
    def emit(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return numba.float32(numba.uint32), emit


as_float: Any = _as_float
"""The fp32 number that 32 bits stand for."""


@inlined
def of_half(bits):
    """fp32 of the bits of a finite fp16; one exact product puts the exponent right."""
    word = np.uint32(bits)
    sign, rest = both(word, np.uint32(0x8000)), both(word, np.uint32(0x7FFF))
    return as_float(either(shl(sign, np.uint32(16)), shl(rest, np.uint32(13)))) * np.float32(2.0**112)


@inlined
def tail_words(in_features, width):
    """`bitpack.tail_words_per_lane`."""
    return ((in_features % 128 + 7) // 8 * width + 15) // 16


@fast
def _decode_plane(words, start, in_features, quads, width, shift):
    """Writes, or from the second plane on adds, a plane's bits; returns where its words end."""
    fields, mask = np.uint64(16 // width), np.uint64(((1 << width) - 1) * 0x0001000100010001)
    full, at = in_features // 128, np.uint64(start)
    for tile in range(full + 1):
        per_lane = np.uint64(width if tile < full else tail_words(in_features, width))
        for lanes in range(np.uint64(2)):
            for r in range(per_lane):
                word = np.uint64(words[at]) | np.uint64(words[at + per_lane]) << np.uint64(32)
                to = np.uint64(32 * tile) + np.uint64(2) * fields * r + lanes
                if shift == 0:
                    for _ in range(fields):
                        quads[to] = word & mask
                        word >>= np.uint64(width)
                        to += np.uint64(2)
                else:
                    for _ in range(fields):
                        quads[to] |= (word & mask) << np.uint64(shift)
                        word >>= np.uint64(width)
                        to += np.uint64(2)
                at += np.uint64(1)
            at += per_lane
    return np.int64(at)


@fast
def decode(words, bits, in_features, quads):
    """A row of codes in the order of columns.

    Args:
        words: uint32 [row_words(in_features, bits)], see `quantkit.kernels.bitpack`.
        bits: 1..16.
        in_features: columns.
        quads: uint64 [32 * tiles], four codes of 16 bits in each; what is behind the last column is left undefined.
    """
    start = shift = 0
    for width in (16, 8, 4, 2, 1):
        if bits & width:
            start, shift = _decode_plane(words, start, in_features, quads, width, shift), shift + width
