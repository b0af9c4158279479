"""Unstructured sparsity: the weights that matter least become zero, and the others make up for it.

The one feedback loop with zero as the grid (SparseGPT, arXiv 2301.00774, algorithm 1): of `block_size` columns at a
time, with all feedback so far applied, the entries with least w^2 / U_jj^2 go.

The format is dense, with zeros: a pruned layer takes no fewer bytes and runs no faster. What a search over sparsities
trades is the number of weights that are left.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.core.protocols import Needs
from quantkit.core.stats import LayerStats
from quantkit.formats.dense import DenseWeight
from quantkit.quantizers.feedback import check_feedback, error_feedback, required


@dataclass(frozen=True)
class Sparse:
    """Sets a fraction of a layer's weights to zero.

    Attributes:
        sparsity: the fraction, 0 to below 1.
        damp: added to diag(H), as a fraction of its mean.
        block_size: columns whose entries are chosen together.
        dtype: of what is stored.
    """

    needs: ClassVar[Needs] = Needs.HESSIAN

    sparsity: float
    damp: float = 0.01
    block_size: int = 128
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity}: a fraction of weights, from 0 to below 1")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype={self.dtype!r}: use bfloat16, float16 or float32")
        check_feedback(self.damp, self.block_size)

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> DenseWeight:
        """Prunes fp32 or fp64 [out_features, in_features].

        Raises:
            CalibrationError: the Hessian does not factor.
            ValueError: there are no statistics.
        """
        factor = required(stats, self).inverse_factor(self.damp).to(weight.dtype)
        pruning = _Pruning(self, factor.diagonal(), weight.shape)
        error_feedback(weight, factor, pruning, self.block_size)
        return DenseWeight(pruning.kept.T.contiguous().to(getattr(torch, self.dtype)))

    def layout(self, out_features: int, in_features: int) -> DenseWeight:
        """The packed weight's layout for a shape, on the meta device."""
        return DenseWeight(torch.empty(out_features, in_features, dtype=getattr(torch, self.dtype), device="meta"))


class _Pruning:
    """Rounds a column to zero where its block's mask says so."""

    width = 1

    def __init__(self, settings: Sparse, diagonal: Tensor, shape: torch.Size) -> None:
        self._settings, self._diagonal = settings, diagonal
        self.kept = torch.empty(shape[1], shape[0], dtype=diagonal.dtype, device=diagonal.device)
        self._mask = torch.empty(shape[1], shape[0], dtype=torch.bool, device=diagonal.device)

    def group_size(self) -> int:
        return self._settings.block_size

    def open(self, start: int, columns: Tensor) -> None:
        stop = start + len(columns)
        self._mask[start:stop] = _least(columns.abs() / self._diagonal[start:stop, None], self._settings.sparsity)

    def round(self, index: int, column: Tensor) -> Tensor:
        self.kept[index] = torch.where(self._mask[index], torch.zeros_like(column), column)
        return self.kept[index]


def _least(values: Tensor, fraction: float) -> Tensor:
    """A mask of the entries that are among the least `fraction` of all."""
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[values.flatten().argsort(stable=True)[: round(fraction * values.numel())]] = True
    return mask.view_as(values)
