"""Feedback among rows: a column is rounded as predictions feel it, some rows making good what others lost.

Columns' error feedback (`quantizers.feedback`) minimises tr(E H_I E^T), which adds up over rows as though each output
mattered by itself. With the outputs' side of the curvature the loss is tr(H_O E H_I E^T). H_O cancels in the feedback
from column to column, and is left as the metric of a column's own rounding:

    min over q of (w - q)^T H_O (w - q)

With H_O^-1 = U^T U, U upper triangular, rows B that are rounded first move the rows R after them to

    w_R - U_BR^T U_BB^-T (w_B - q_B)

where the loss is least for the errors made so far (YAQA, arXiv 2505.22988, section 3). Rows are taken some at a time,
so that a column costs a few steps.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

PARTS, LEAST_ROWS = 8, 32
"""Parts into which a column is divided, and the rows of a part at least."""


class RowFeedback:
    """Rounds columns part by part; at once where nothing is known of the outputs.

    Args:
        out_features: rows.
        factor: U, [out_features, out_features], or None.

    Attributes:
        parts: (first row, row after the last) of each.
    """

    def __init__(self, out_features: int, factor: Tensor | None) -> None:
        count = 1 if factor is None else min(PARTS, max(1, out_features // LEAST_ROWS))
        self.parts = list(pairwise(out_features * i // count for i in range(count + 1)))
        self._onward = [
            torch.linalg.solve_triangular(factor[start:stop, start:stop], factor[start:stop, stop:], upper=True)
            for start, stop in self.parts[:-1]
            if factor is not None
        ]

    def round(self, column: Tensor, rounded: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        """A column as it is rounded, [out_features].

        Args:
            column: as it is to be.
            rounded: given all rows as they are to be by now and a part's (first row, row after the last), it gives that
                part as it is rounded.
        """
        if len(self.parts) == 1:
            return rounded(column, *self.parts[0])
        left, found = column.clone(), []
        for index, (start, stop) in enumerate(self.parts):
            found.append(rounded(left, start, stop))
            if stop < len(left):
                onward = self._onward[index]
                left[stop:].addmv_(onward.T.to(left), left[start:stop] - found[-1], alpha=-1)
        return torch.cat(found)
