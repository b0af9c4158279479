"""Hadamard: quantize in a rotated basis, where weights are nearly Gaussian and no input stands out.

    W' = R_out W R_in^T,    H' = R_in H R_in^T,    tr((W - Q) H (W - Q)^T) = tr((W' - Q') H' (W' - Q')^T)

with R = B diag(random signs) and B a (block-diagonal) Hadamard matrix (QuIP#, arXiv 2402.04396, section 3;
`quantkit.kernels.hadamard`). The loss does not change, so any method works inside; outliers are spread over all
features, which codes for Gaussian weights rely on.

Signs follow from the seed and the number of features alone, so that layers fed by the same tensor share the rotation
of their statistics.
"""

from dataclasses import dataclass

from torch import Tensor

from quantkit.core.protocols import Needs, Quantizer
from quantkit.core.stats import LayerStats
from quantkit.formats.rotated import RotatedWeight
from quantkit.kernels.hadamard import random_signs, rotate


@dataclass(frozen=True)
class Hadamard:
    """Rotates, hands on to `inner`, and stores the signs.

    Attributes:
        inner: any quantizer.
        outputs: rotate output features too.
        seed: of the signs.
    """

    inner: Quantizer
    outputs: bool = True
    seed: int = 0

    @property
    def needs(self) -> Needs:
        """What the inner method needs."""
        return self.inner.needs

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> RotatedWeight:
        """Quantizes fp32 or fp64 [out_features, in_features] in the rotated basis."""
        out_features, in_features = weight.shape
        in_signs = random_signs(in_features, self.seed).to(weight.device)
        rotated = rotate(weight, in_signs)
        out_signs = None
        if self.outputs:
            out_signs = random_signs(out_features, self.seed + 1).to(weight.device)
            rotated = rotate(rotated.T.contiguous(), out_signs).T.contiguous()
        if stats is not None:
            stats = stats.changed(("hadamard", self.seed), lambda moment: rotate(moment, in_signs))
            if out_signs is not None:
                stats = stats.changed_outputs(lambda moment: rotate(moment.contiguous(), out_signs))
        return RotatedWeight(self.inner.quantize(rotated, stats), in_signs, out_signs)

    def layout(self, out_features: int, in_features: int) -> RotatedWeight:
        """The inner method's layout, and a bit a feature."""
        return RotatedWeight.layout(self.inner.layout(out_features, in_features), self.outputs)
