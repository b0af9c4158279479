"""Trellis-coded quantization under error feedback (QTIP, arXiv 2406.11235, with the sequences along the outputs).

A sequence of weights becomes a path through a trellis of 2^L states, found exactly by Viterbi's algorithm
(`quantkit.kernels.viterbi`); a weight's value is computed from its state (`quantkit.kernels.trellis`). At 2, 3 and 4
bits the mean squared error of Gaussian weights is 10%, 13% and 18% above the bound of rate-distortion theory, where
integer grids are 88% to 145% above it.

Axis. The paper runs sequences through tiles of 16 x 16 and rounds 16 columns together, without feedback among them.
Here they run along the outputs by default: a column is one sequence, the feedback from column to column stays whole,
and the plain nearest path is the best one. `axis="in"` is the paper's order.

Order. Columns come in the order in which feedback loses least; nothing of it is stored.

Scales. The feedback makes later columns larger than they were, so each is given the step nearest to its own root mean
square when its turn comes: a byte a column.

Rotate first (`Hadamard`): the code is made for Gaussian numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from quantkit.core.protocols import Needs
from quantkit.core.stats import LayerStats
from quantkit.formats.trellis import TrellisWeight, columns_of, rings_of
from quantkit.kernels import trellis
from quantkit.kernels.viterbi import between, encode, has_numba
from quantkit.quantizers.feedback import check_feedback, error_feedback, required
from quantkit.quantizers.row_feedback import RowFeedback

Axis = Literal["out", "in"]
Order = Literal["least", "none"]
TILE = 16
"""Columns and rows of a tile of `axis="in"`."""
SPREAD = (0.0, 0.88, 1.02, 1.06, 1.1, 1.2, 1.26, 1.32, 1.4)
"""By K: the root mean square of all values that suits numbers of root mean square 1 (`evals/trellis_codes.py`)."""
RUN, AHEAD = 96, 32
"""Rows of a run of a column's part, about, and those beside it that are looked at, so that theirs can go on from it."""
_HEADROOM = 4.0  # a step of 1, over what the largest column needs: the feedback adds to columns


@dataclass(frozen=True)
class Trellis:
    """Settings of trellis-coded quantization.

    Attributes:
        bits: K, 1 to 8. A fraction is an average over layers: a recipe gives them the whole numbers around it.
        state_bits: L, 8 to 16 and at least 2 K; each bit more doubles the time of the search.
        axis: of the sequences, see the module's text.
        order: of the columns: in which feedback loses least ("least", `linalg.elimination_order`), or theirs ("none").
        damp: added to diag(H), as a fraction of its mean.
        block_size: columns between deferred updates; changes speed, not codes.
    """

    needs: ClassVar[Needs] = Needs.HESSIAN
    wants_rotation: ClassVar[bool] = True
    wants_fisher: ClassVar[bool] = True
    whole_bits: ClassVar[bool] = True  # of a layer; a recipe divides fractions over layers

    bits: float = 2
    state_bits: int = 16
    axis: Axis = "out"
    order: Order = "least"
    damp: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        if self.axis not in get_args(Axis):
            raise ValueError(f"axis={self.axis!r}: sequences run along the outputs ('out') or the inputs ('in')")
        if self.order not in get_args(Order):
            raise ValueError(f"order={self.order!r}: known orders are {', '.join(get_args(Order))}")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: trellis codes take 1 to 8 bits a weight")
        low, high = trellis.STATE_BITS
        least = max(low, 2 * -(-self.bits // 1))
        if type(self.state_bits) is not int or not least <= self.state_bits <= high:
            raise ValueError(f"state_bits={self.state_bits}: with {self.bits} bits a weight use {least:g} to {high}")
        check_feedback(self.damp, self.block_size)

    @property
    def width(self) -> int:
        """Columns that a sequence goes through."""
        return 1 if self.axis == "out" else TILE

    def layout(self, out_features: int, in_features: int) -> TrellisWeight:
        """The packed weight's layout for a shape, on the meta device.

        Raises:
            ValueError: the bits are a fraction.
        """
        return TrellisWeight.layout([out_features], in_features, self._whole(), self.state_bits, self.width)

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> TrellisWeight:
        """Quantizes fp32 or fp64 [out_features, in_features].

        Raises:
            CalibrationError: the Hessian does not factor.
            ValueError: there are no statistics, or the bits are a fraction.
        """
        stats = required(stats, self)
        rows = RowFeedback(len(weight), stats if self.axis == "out" else None, RUN)
        rounding = _Paths(self._whole(), self.state_bits, self.width, weight, rows)
        order = stats.order(self.damp) if self.axis == "out" and self.order == "least" else None
        factor = stats.inverse_factor(self.damp, order).to(weight.dtype)
        ordered = weight if order is None else weight[:, order]
        error_feedback(ordered, factor, rounding, -(-self.block_size // self.width) * self.width)
        return rounding.packed(None if order is None else order.argsort())

    def _whole(self) -> int:
        if self.bits != int(self.bits):
            raise ValueError(f"bits={self.bits}: a layer has whole bits; fractions are averages over layers")
        return int(self.bits)


@dataclass(frozen=True)
class _Runs:
    """Runs of one length in a ring, which are searched side by side.

    Attributes:
        own: int64 [runs, length], their places.
        seen: int64 [runs, n], places that are looked at, theirs and those beside them.
        inside: where theirs are in these.
        below, above: int64 [runs], the places before and behind them, which are found by then; None where they aren't.
    """

    own: Tensor
    seen: Tensor
    inside: slice
    below: Tensor | None
    above: Tensor | None


def _runs(rows: RowFeedback, out_features: int, device: torch.device) -> list[list[_Runs]]:
    """Runs of each part: the first part's find nothing beside them, later ones' the end of the run before them, the
    last part's both ends."""
    places, found = trellis.ring_length(out_features), []
    for number, part in enumerate(rows.runs):
        spans = [(start, places if stop == out_features else stop) for start, stop in part]  # all places have an owner
        is_first, is_last = number == 0, number == len(rows.runs) - 1
        before, beyond = AHEAD if is_first else 0, 0 if is_last else AHEAD
        own = []
        for length in sorted({stop - start for start, stop in spans}):
            first = torch.tensor([start for start, stop in spans if stop - start == length], device=device)
            around = torch.arange(-before, length + beyond, device=device)
            seen = (first.unsqueeze(1) + around) % places
            inside = slice(before, before + length)
            own.append(
                _Runs(
                    seen[:, inside], seen, inside, None if is_first else first - 1,
                    (first + length) % places if is_last else None,
                )
            )  # fmt: skip
        found.append(own)
    return found


def _compiled(rows: RowFeedback, values: Tensor, bits: int, weight: Tensor) -> Callable | None:
    """What finds a column's ring in one compiled call on a CPU, part by part; None elsewhere, or without numba."""
    if not weight.is_cpu or not has_numba():
        return None
    from quantkit.kernels.viterbi_numba import ColumnInParts

    places, last = trellis.ring_length(len(weight)), len(rows.runs) - 1
    runs = [
        (part, start, (places if stop == len(weight) else stop) - start, AHEAD * (part == 0), AHEAD * (part < last))
        for part, spans in enumerate(rows.runs)
        for start, stop in spans
    ]
    order = torch.cat([torch.arange(*span) for spans in rows.runs for span in spans])
    bounds = torch.tensor([0, *accumulate(sum(stop - start for start, stop in spans) for spans in rows.runs)])
    onward = [part.to(weight.dtype).numpy() for part in rows.onward]
    return ColumnInParts(
        values.numpy(), bits, places, order.numpy(), bounds.numpy(), torch.tensor(runs).numpy(), onward
    )


class _Paths:
    """Rounds `width` columns at a time to the nearest path through them."""

    def __init__(self, bits: int, state_bits: int, width: int, weight: Tensor, rows: RowFeedback) -> None:
        out_features, in_features = weight.shape
        self._rows = rows
        self.width, self._bits, self._state_bits, self._out_features = width, bits, state_bits, out_features
        unit = SPREAD[bits] / trellis.deviation(state_bits)
        self._values = trellis.table(state_bits, weight.device) * unit
        largest = weight.square().mean(0).amax().sqrt().float()
        self._unit = _HEADROOM * largest.clamp_min(1e-30)  # steps are in units of it
        self._scale = (self._unit * unit).view(1)
        self._scales = torch.empty(in_features, dtype=torch.uint8, device=weight.device)
        self._codes: list[Tensor] = []
        self._runs = _runs(rows, out_features, weight.device)
        self._compiled = _compiled(rows, self._values, bits, weight) if self._runs else None

    def group_size(self) -> int:
        return self.width

    def open(self, start: int, columns: Tensor) -> None:
        """Columns need no preparation."""

    def round(self, index: int, column: Tensor) -> Tensor:
        """The nearest rings of steps that the columns themselves give."""
        columns = column.view(-1, self._out_features)
        codes = trellis.nearest_step(columns.float().square().mean(1).sqrt() / self._unit)
        self._scales[index : index + len(columns)] = codes
        steps = (trellis.step(codes) * self._unit).unsqueeze(1)
        if self._runs:
            return self._in_parts(column, steps[0])
        rings = rings_of((columns.float() / steps).T, self.width)
        words = trellis.pack_rings(encode(rings.T, self._values, self._bits), self._bits)
        self._codes.append(words)
        states = trellis.states(words, self._bits, self._state_bits)[: len(rings)]
        rounded = columns_of(self._values[states.long()], self.width)
        return (rounded[: self._out_features, : len(columns)].T * steps).to(column.dtype).view_as(column)

    def _in_parts(self, column: Tensor, step: Tensor) -> Tensor:
        """A column whose ring is found part by part, the runs of a part side by side."""
        if self._compiled is not None:
            result, states = (torch.from_numpy(part) for part in self._compiled(column.numpy(), float(step)))
            self._take(states)
            return result
        places, mask = trellis.ring_length(self._out_features), (len(self._values) >> self._bits) - 1
        states = torch.empty(places, dtype=torch.int64, device=column.device)

        def rounded(rows: Tensor, part: int) -> Tensor:
            x = torch.nn.functional.pad(rows.float() / step, (0, places - len(rows)))
            for run in self._runs[part]:
                below = None if run.below is None else states[run.below] >> self._bits
                above = None if run.above is None else states[run.above] & mask
                found = between(x[run.seen], self._values, self._bits, above, below)
                states[run.own] = found[:, run.inside].long()
            return (self._values[states[self._rows.rows[part]]] * step).to(rows.dtype)

        result = self._rows.round(column, rounded)
        self._take(states)
        return result

    def _take(self, states: Tensor) -> None:
        """Keeps a ring's codes."""
        symbols = (states & (1 << self._bits) - 1).to(torch.uint8)
        self._codes.append(trellis.pack_rings(symbols.unsqueeze(1), self._bits))

    def packed(self, inverse: Tensor | None) -> TrellisWeight:
        """The weight; `inverse` int64 [in_features] puts columns back in order, None where they came in it."""
        codes, scales = torch.cat(self._codes, dim=1), self._scales
        if inverse is not None:
            codes, scales = codes[:, inverse], scales[inverse]
        bits, state_bits = self._bits, self._state_bits
        return TrellisWeight(codes, scales[None], self._scale, bits, state_bits, [self._out_features], self.width)
