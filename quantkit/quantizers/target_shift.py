"""Target shift: quantize towards the weight that undoes what the quantized prefix did to the inputs.

A layer behind quantized layers sees x_q instead of x. The least-squares target is then not W but

    W* = W ((1 - a) I + a (C + lambda I)(H + lambda I)^-1),    C = E[x x_q^T],  H = E[x_q x_q^T]

because E |Q x_q - W x|^2 = tr((Q - W*) H (Q - W*)^T) + a constant (with a = 1, lambda = 0). The
shrink a < 1 guards against the sampling error of C. Any quantizer works on the shifted target; GPTAQ
(arXiv 2504.02692) is the first-order relative.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quantkit.core.protocols import Needs, Quantizer
from quantkit.core.stats import LayerStats
from quantkit.core.weight import QuantizedWeight


@dataclass(frozen=True)
class TargetShift:
    """Hands `inner` the shifted target; stores nothing of its own.

    Attributes:
        inner: any quantizer.
        amount: a, from 0 (no shift) to 1 (least squares).
        damp: lambda as a fraction of mean(diag H).
    """

    needs: ClassVar[Needs] = Needs.CROSS

    inner: Quantizer
    amount: float
    damp: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.amount <= 1:
            raise ValueError(f"target shift {self.amount}: use 0 (off) to 1 (least squares)")

    def target(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """W* = W + a W (C - H)(H + lambda I)^-1, [out_features, in_features] as `weight`, in its dtype.

        Raises:
            ValueError: the statistics hold no cross moment.
        """
        if stats.cross is None:
            raise ValueError("the target shift reads the cross moment C; the statistics hold none")
        factor = stats.inverse_factor(self.damp)
        step = weight.to(factor.dtype) @ (stats.cross - stats.hessian) @ factor.T @ factor
        return weight + (self.amount * step).to(weight.dtype)

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> QuantizedWeight:
        """Quantizes W*, for fp32 or fp64 [out_features, in_features], with the inner method.

        Raises:
            ValueError: there are no statistics.
        """
        if stats is None:
            raise ValueError("the target shift reads the statistics of both streams")
        return self.inner.quantize(self.target(weight, stats), stats)

    def layout(self, out_features: int, in_features: int) -> QuantizedWeight:
        """The inner method's layout."""
        return self.inner.layout(out_features, in_features)


def aimed(quantizer: Quantizer, weight: Tensor, stats: LayerStats | None) -> tuple[Tensor, Quantizer]:
    """(the weight that a quantizer rounds, fp32 [out_features, in_features], and what rounds it).

    Where the two streams have no tokens in common, as of experts that route alone, the target stays.
    """
    if isinstance(quantizer, TargetShift) and stats is not None:
        return weight if stats.cross is None else quantizer.target(weight, stats), quantizer.inner
    return weight, quantizer


def unshifted(quantizer: Quantizer) -> Quantizer:
    """What rounds, without the shift of its target."""
    return quantizer.inner if isinstance(quantizer, TargetShift) else quantizer
