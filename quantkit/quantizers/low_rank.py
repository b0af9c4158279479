"""LowRank: what rounding lost, given back as a product of two thin matrices.

With E = W - Q the correction B A of rank r that minimises tr((E - BA) H (E - BA)^T) keeps the leading eigenvectors U of
E H E^T:

    B = U_r,    A = U_r^T E,    and what is left is the sum of the other eigenvalues.

That is the solution of QERA (arXiv 2410.06040, theorem 1) and EoRA (arXiv 2410.21271) without a root or an inverse of
H.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.protocols import Needs, Quantizer
from quantkit.core.stats import LayerStats
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.low_rank import LowRankWeight


@dataclass(frozen=True)
class LowRank:
    """Quantizes with `inner` and adds the best correction.

    Attributes:
        inner: any quantizer.
        rank: of the correction; less in layers that have not so many features.
        adapter_bits: of the stored factors: 16 (fp16) or 8 (integers, a scale a rank).
    """

    inner: Quantizer
    rank: int = 16
    adapter_bits: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank={self.rank}: a correction has a whole rank of at least 1")
        if self.adapter_bits not in (8, 16):
            raise ValueError(f"adapter_bits={self.adapter_bits}: factors are stored in 16 or 8 bits")

    @property
    def needs(self) -> Needs:
        """The Hessian of the layer's inputs, or more where the inner method reads more."""
        return max(self.inner.needs, Needs.HESSIAN)

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> LowRankWeight:
        """Quantizes fp32 or fp64 [out_features, in_features].

        Raises:
            ValueError: there are no statistics.
        """
        if stats is None:
            raise ValueError("a correction reads the Hessian of the layer's inputs; RTN without one works without")
        base = self.inner.quantize(weight, stats)
        return self.corrected(base, weight - base.dequantize().to(weight), stats.hessian)

    def layout(self, out_features: int, in_features: int) -> LowRankWeight:
        """The inner method's layout, and both factors."""
        rank = min(self.rank, out_features, in_features)
        return LowRankWeight.layout(self.inner.layout(out_features, in_features), rank, self.adapter_bits == 8)

    def corrected(self, base: QuantizedWeight, error: Tensor, hessian: Tensor) -> LowRankWeight:
        """A packed weight with its best correction.

        Args:
            base: Q.
            error: E, fp32 or fp64 [out_features, in_features].
            hessian: H, [in_features, in_features], the metric in which the correction is the best.

        Returns:
            The weight [out_features, in_features], its factors in fp16 or int8 as `adapter_bits` says.
        """
        error = error.double()
        vectors = leading_vectors(error, hessian.double(), min(self.rank, *error.shape))
        # `down` is the best for `up` as it is stored, whatever the metric
        if self.adapter_bits == 16:
            up = vectors.half()
            down = torch.linalg.lstsq(up.double(), error).solution
            size = down.abs().amax(1).clamp_min(1e-30)
            balance = torch.exp2((size.log2() / 2).round())  # a power of two: `up` stays what it is
            up, down = (up.double() * balance).half(), (down / balance.unsqueeze(1)).half()
            return LowRankWeight(base, up.contiguous(), down.contiguous())
        widest = vectors.abs().amax(0).clamp_min(1e-30)
        up = (127 * vectors / widest).round().to(torch.int8)
        down = torch.linalg.lstsq(up.double(), error).solution
        scales = (down.abs().amax(1) / 127).float().clamp_min(1e-30)
        codes = (down / scales.double().unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
        return LowRankWeight(base, up.contiguous(), codes.contiguous(), scales)


def leading_vectors(error: Tensor, hessian: Tensor, rank: int) -> Tensor:
    """The eigenvectors of E H E^T with the largest eigenvalues, fp64 [out_features, rank].

    Args:
        error: E, fp64 [out_features, in_features].
        hessian: H, fp64 [in_features, in_features].
        rank: how many.
    """
    gram, half = smaller_gram(error, hessian)
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    return vectors if half is None else torch.linalg.qr(half @ vectors).Q


def smaller_gram(error: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor | None]:
    """The smaller of two symmetric matrices with the same nonzero eigenvalues.

    Args:
        error: E, fp64 [out_features, in_features].
        hessian: H, fp64 [in_features, in_features].

    Returns:
        (E H E^T, None), or where that is the larger one, with H = R R^T, (R^T E^T E R, E R): leading eigenvectors V of
        the one are E R V, normalised, of the other.
    """
    half = None
    if error.shape[0] <= error.shape[1]:
        gram = error @ hessian @ error.T
    else:
        values, vectors = torch.linalg.eigh(hessian)
        half = error @ (vectors * values.clamp_min(0).sqrt())
        gram = half.T @ half
    return (gram + gram.T) / 2, half
