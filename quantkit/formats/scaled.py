"""scaled: any weight times one number, for layers whose weights are too small or too large for fp16.

    W = factor * base        y = factor * (base x)

Most formats keep scales, levels or codebooks in fp16, which has no numbers above 65504 and few digits below 2^-14. Such
a layer is packed divided by a power of two, which rounds nothing (`quantkit.quantizers.factor`); a factor of 0 is that
of a layer of zeros, for which most codes have no word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.schema import TensorSpec
from quantkit.core.weight import QuantizedWeight, corrected


@dataclass(frozen=True, eq=False)
class ScaledWeight(QuantizedWeight, format="scaled"):
    """A weight times a factor.

    Attributes:
        base: [out_features, in_features].
        factor: fp32 [1].
    """

    base: QuantizedWeight
    factor: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.base.shape

    def schema(self) -> dict[str, TensorSpec]:
        """The factor, which tuning leaves alone: what is inside moves."""
        return {"factor": TensorSpec(torch.float32, (1,))}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features]: factor * base in fp32, then cast."""
        return (self.base.dequantize() * self.factor).to(dtype)

    @property
    def by_rows(self) -> bool:
        """True where the base reads single rows."""
        return self.base.by_rows

    def _rows(self, index: Tensor) -> Tensor:
        """Rows of the base, times the factor."""
        return self.base.rows(index) * self.factor

    @property
    def cpu_slowdown(self) -> float:
        """The base's: a product more an output is little beside the weights."""
        return self.base.cpu_slowdown

    def _cut(self, dim: int, start: int, stop: int) -> QuantizedWeight:
        """Where the base can be."""
        return ScaledWeight(self.base.cut(dim, start, stop), self.factor)

    def prepare(self) -> None:
        """Prepares the base."""
        self.base.prepare()

    def matmul(
        self, x: Tensor, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None
    ) -> Tensor:
        """[..., in_features] -> [..., out_features]: the base's product, times the factor in fp32."""
        y = (self.base.matmul(x).float() * self.factor).to(x.dtype)
        return corrected(y if bias is None else y + bias.to(y.dtype), x, up, down)
