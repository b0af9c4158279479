"""Feedback among rows: a column is rounded as predictions feel it, some rows making good what others lost.

Columns' error feedback (`quantizers.feedback`) minimises tr(E H_I E^T), which adds up over rows as though each output
mattered by itself. With the outputs' side of the curvature the loss is tr(H_O E H_I E^T). H_O cancels in the feedback
from column to column, and is left as the metric of a column's own rounding:

    min over q of (w - q)^T H_O (w - q)

With H_O^-1 = U^T U, U upper triangular, rows B that are rounded first move the rows R after them to

    w_R - U_BR^T U_BB^-T (w_B - q_B)

where the loss is least for the errors made so far (YAQA, arXiv 2505.22988, section 3). Rows are taken some at a time,
so that a column costs a few steps. Which go together and in which order is free: those that predictions feel most come
first, since later ones can make their errors good but not the other way round. Codes that run along a column need rows
side by side instead: there a part is made of runs of rows, each right behind one of the part before it, which can be
worked on at once. In a rotated basis, where all rows are felt alike, that loses nothing.
"""

from collections.abc import Callable
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from quantkit.core.stats import LayerStats

PARTS, LEAST_ROWS = 16, 32
"""Parts into which a column is divided, and the rows of a part at least."""


class RowFeedback:
    """Rounds columns part by part; at once where nothing is known of the outputs.

    Args:
        out_features: rows.
        stats: of the layer, which may know H_O; None for none.
        run: rows of a run, about; None where any rows may go together.

    Attributes:
        rows: of each part, int64; a slice where one part has all.
        runs: of each part, as (first row, row after the last); empty without `run`.
    """

    def __init__(self, out_features: int, stats: LayerStats | None, run: int | None = None) -> None:
        outputs = None if stats is None else stats.outputs
        self.rows: list[Tensor | slice] = [slice(None)]
        self.runs: list[list[tuple[int, int]]] = []
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []  # rows after a part, U_BB, U_BB^-1 U_BR
        if stats is None or outputs is None:
            return
        count, felt = min(PARTS, max(1, out_features // LEAST_ROWS)), outputs.diagonal()
        order = felt.argsort(descending=True, stable=True)
        sizes = [len(part) for part in order.tensor_split(count)]
        if count > 1 and run is not None:
            runs = count * max(1, round(out_features / (count * run)))
            spans = list(pairwise(out_features * i // runs for i in range(runs + 1)))
            self.runs = [spans[part::count] for part in range(count)]
            order = torch.cat([torch.arange(*span, device=order.device) for part in self.runs for span in part])
            sizes = [sum(stop - start for start, stop in part) for part in self.runs]
        if count > 1:
            self.rows = list(order.split(sizes))
        factor = stats.outputs_factor(order)
        for start, stop in pairwise(accumulate(sizes, initial=0)):
            own = factor[start:stop, start:stop]
            onward = torch.linalg.solve_triangular(own, factor[start:stop, stop:], upper=True)
            self._steps.append((order[stop:], own, onward))

    def round(self, column: Tensor, rounded: Callable[[Tensor, int], Tensor]) -> Tensor:
        """A column as it is rounded, [out_features].

        Args:
            column: as it is to be.
            rounded: given all rows as they are to be by now, and the number of a part, it gives that part's rows as
                they are rounded.
        """
        if len(self.rows) == 1:
            return rounded(column, 0)
        left, found = column.clone(), torch.empty_like(column)
        for part, (after, _, onward) in enumerate(self._steps):
            here = self.rows[part]
            found[here] = rounded(left, part)
            left[after] -= onward.T.to(left) @ (left[here] - found[here])
        return found

    @property
    def onward(self) -> list[Tensor]:
        """Of each part, by what an error there moves the rows after it: [its rows, rows after it]."""
        return [onward for _, _, onward in self._steps]

    def unexplained(self) -> float:
        """tr(H_O), damped, with each part of the rows as those after it leave it."""
        return sum(float(torch.linalg.inv(own).square().sum()) for _, own, _ in self._steps)
