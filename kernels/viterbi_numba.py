"""The exact search of `viterbi` on a CPU, compiled by numba: a thread a sequence, all states of a step in vectors.

    cost[u] = min over t of (cost'[s >> K] + v_s (v_s - 2 x)),    s = t 2^(L-K) + u

for the 2^(L-K) last bits u; x^2, which all paths share, is left out. The loops are written so that the compiler makes
vectors of them: up to 8 ways into a state are compared in registers, over a cost' that is stored once for every s; more
are compared one after the other over a block of states, in which runs of 2^K share a cost'.

numba and not C++, because it needs no compiler on the user's machine; torch's own operations take far
longer, for they write every intermediate result to memory.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np

from quantkit.kernels.numba_words import fast, inlined

_NEVER = np.float32(1e30)
_LOCAL = threading.local()


def search(x: Any, values: Any, bits: int, first: Any, last: Any, threads: int) -> Any:
    """As `viterbi.search`, of numpy arrays.

    Args:
        x: float32 [paths, steps].
        values: float32 [2^L].
        bits: K.
        first, last: int64 [paths], negative for any.
        threads: that search, a path each.

    Returns:
        int32 [paths, steps] states.
    """
    states = np.empty(x.shape, dtype=np.int32)
    sequence = _sequence(bits, len(values) >> bits)

    def run(i: int) -> None:
        spread, choice = _scratch(len(values), len(values) >> bits, x.shape[1])
        sequence(x[i], values, int(first[i]), int(last[i]), states[i], spread, choice)

    if len(x) == 1 or threads == 1:
        for i in range(len(x)):
            run(i)
    else:
        list(_pool(threads).map(run, range(len(x))))
    return states


class ColumnInParts:
    """Finds columns' rings part by part, with the feedback of `quantizers.row_feedback` between parts.

    Args:
        values: float32 [2^L].
        bits: K.
        places: of a ring.
        order: int64 [rows], the rows of one part after the other's.
        bounds: int64 [parts + 1], where parts begin in it.
        runs: int64 [runs, 5], in the order of parts: the part, the first place, how many, and how many places before
            and behind are looked at. In the first part they find nothing beside them, in later ones the state before
            them, in the last one that behind them too.
        onward: of each part, [its rows, rows after it]: what an error there moves each of these by.
    """

    def __init__(
        self, values: Any, bits: int, places: int, order: Any, bounds: Any, runs: Any, onward: Sequence[Any]
    ) -> None:
        self._values, self._places, self._order, self._bounds, self._runs = values, places, order, bounds, runs
        self._onward = np.concatenate([np.ascontiguousarray(part).reshape(-1) for part in onward])
        self._longest = int((runs[:, 2] + runs[:, 3] + runs[:, 4]).max())
        self._column = _column(bits, len(values) >> bits)
        self._count = len(values) >> bits

    def __call__(self, column: Any, step: float) -> tuple[Any, Any]:
        """(the column as it is rounded, int32 [places] states) for a column [rows] in units of its step."""
        found, states = np.empty_like(column), np.empty(self._places, dtype=np.int32)
        spread, choice = _scratch(len(self._values), self._count, self._longest)
        self._column(
            column.copy(), np.float32(step), self._values, self._order, self._bounds, self._runs,
            self._onward.astype(column.dtype, copy=False), found, states, spread, choice,
        )  # fmt: skip
        return found, states


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _scratch(states: int, count: int, steps: int) -> tuple[Any, Any]:
    """The calling thread's own memory, the same in every call: fresh pages cost more than a search's step."""
    if not hasattr(_LOCAL, "spread") or len(_LOCAL.spread) < states or len(_LOCAL.choice) < steps * count:
        _LOCAL.spread = np.empty(states, dtype=np.float32)
        _LOCAL.choice = np.empty(steps * count, dtype=np.uint8)
    return _LOCAL.spread[:states], _LOCAL.choice[: steps * count].reshape(steps, count)


@inlined
def _few_ways(cost, spread, values, double, choice, count, bits):
    """A step for K <= 3.

    Replaces cost [count] by that of one number more, 2 x in `double`; choice [count]: the best way into each.
    """
    ways = 1 << bits
    for u in range(count):
        for n in range(ways):
            spread[u * ways + n] = cost[u]
    for u in range(count):
        best, chosen = spread[u] + values[u] * (values[u] - double), np.int32(0)
        for t in range(1, ways):
            s = t * count + u
            found = spread[s] + values[s] * (values[s] - double)
            chosen = np.int32(t) if found < best else chosen
            best = found if found < best else best
        cost[u], choice[u] = best, np.uint8(chosen)


@inlined
def _many_ways(cost, spread, values, double, choice, count, bits):
    """As `_few_ways` for K >= 4 and L >= 2 K; costs before the step are in a part of `spread`.

    Two runs are gone through at a time, because shorter loops are unrolled instead.
    """
    ways = 1 << bits
    pair = min(2 * ways, count)
    block = min(max(pair, 128), count)
    before = spread[:count]
    before[:] = cost
    best, chosen = np.empty(block, dtype=np.float32), np.empty(block, dtype=np.int32)
    for start in range(0, count, block):
        best[:] = _NEVER
        chosen[:] = 0
        for t in range(ways):
            for run in range(0, block, pair):
                s = t * count + start + run
                one, other = before[s >> bits], before[min((s >> bits) + 1, count - 1)]
                own = values[s : s + pair]
                for n in range(pair):
                    found = (one if n < ways else other) + own[n] * (own[n] - double)
                    chosen[run + n] = np.int32(t) if found < best[run + n] else chosen[run + n]
                    best[run + n] = found if found < best[run + n] else best[run + n]
        for i in range(block):
            cost[start + i], choice[start + i] = best[i], np.uint8(chosen[i])


@inlined
def _path(x, values, first, last, states, spread, choice, bits, count):
    """Writes the nearest path's states of x [steps]; spread [2^L] and choice [steps, count] are scratch memory."""
    cost = np.empty(count, dtype=np.float32)
    cost[:] = _NEVER if first >= 0 else np.float32(0)
    if first >= 0:
        cost[first] = 0
    for i in range(len(x)):
        if bits <= 3:
            _few_ways(cost, spread, values, np.float32(2) * x[i], choice[i], count, bits)
        else:
            _many_ways(cost, spread, values, np.float32(2) * x[i], choice[i], count, bits)
        if i % 64 == 63:  # or sums would outgrow their precision
            cost -= cost.min()
    u = np.int64(np.argmin(cost)) if last < 0 else last
    for i in range(len(x) - 1, -1, -1):
        state = np.int64(choice[i, u]) * count + u
        states[i] = state
        u = state >> bits


@lru_cache
def _sequence(bits: int, count: int) -> Callable:
    """The compiled search over one sequence for K = bits and 2^(L-K) = count.

    Numbers are all that it and `_column` take from around them: by them numba finds what it has compiled before.
    """

    @fast
    def sequence(x, values, first, last, states, spread, choice):
        """See `_path`."""
        _path(x, values, first, last, states, spread, choice, bits, count)

    return sequence


@lru_cache
def _column(bits: int, count: int) -> Callable:
    """The compiled work of `ColumnInParts`."""
    mask = count - 1

    @fast
    def column(left, step, values, order, bounds, runs, onward, found, states, spread, choice):
        """Writes `found` [rows] and `states` [places]; `left` [rows] is what each row is to be by then."""
        rows, places, parts = len(left), len(states), len(bounds) - 1
        x, path = np.empty(len(choice), dtype=np.float32), np.empty(len(choice), dtype=np.int32)
        moved, used, run = np.empty_like(left), 0, 0
        for part in range(parts):
            while run < len(runs) and runs[run, 0] == part:
                start, length, before, beyond = runs[run, 1], runs[run, 2], runs[run, 3], runs[run, 4]
                steps = before + length + beyond
                for i in range(steps):  # paths run from high places to low ones
                    place = (start - before + i) % places
                    x[steps - 1 - i] = np.float32(left[place]) / step if place < rows else np.float32(0)
                above, below = np.int64(-1), np.int64(-1)
                if part > 0:
                    below = np.int64(states[(start - 1) % places]) >> bits
                if part == parts - 1:
                    above = np.int64(states[(start + length) % places]) & mask
                _path(x[:steps], values, above, below, path[:steps], spread, choice[:steps], bits, count)
                for i in range(length):
                    states[(start + i) % places] = path[steps - 1 - before - i]
                run += 1
            begin, end = bounds[part], bounds[part + 1]
            after = rows - end
            moved[:after] = 0
            for i in range(begin, end):
                row = order[i]
                found[row] = values[states[row]] * step
                error = left[row] - found[row]
                for j in range(after):
                    moved[j] += error * onward[used + j]
                used += after
            for j in range(after):
                left[order[end + j]] -= moved[j]

    return column
