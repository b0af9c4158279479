"""low_rank: any weight and a correction of low rank.

    W = base + up down        y = base x + up (down x)

Kernels add the correction in their epilogue (`quantkit.kernels.operators`). Factors are fp16, or integers of 8 bits
with a scale a rank: up[:, i] down[i, :] scales[i].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from quantkit.core.errors import QuantkitError
from quantkit.core.schema import TensorSpec, extent, unset
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.scaled import ScaledWeight


@dataclass(frozen=True, eq=False)
class LowRankWeight(QuantizedWeight, format="low_rank"):
    """A weight with a correction.

    Attributes:
        base: [out_features, in_features].
        up: fp16 or int8 [out_features, rank].
        down: like up [rank, in_features].
        scales: fp32 [rank] of int8 factors, else None.
    """

    base: QuantizedWeight
    up: Tensor
    down: Tensor
    scales: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.base.shape

    @property
    def label(self) -> str:
        """The base's, and the rank."""
        return f"{self.base.label} + rank {self.rank}"

    @property
    def rank(self) -> int:
        """Rank of the correction."""
        return extent(self.up, 1)

    @classmethod
    def layout(cls, base: QuantizedWeight, rank: int, int8: bool = False) -> LowRankWeight:
        """A correction of a base's layout, on the meta device."""
        sized = unset(0, rank)
        return cls(base, sized, sized, sized if int8 else None).laid_out()

    def schema(self) -> dict[str, TensorSpec]:
        """Both factors, and scales of those in 8 bits, which stay as they are in tuning."""
        out_features, in_features = self.shape
        stored = torch.float16 if self.scales is None else torch.int8
        return {
            "up": TensorSpec(stored, (out_features, self.rank), continuous=self.scales is None),
            "down": TensorSpec(stored, (self.rank, in_features), continuous=self.scales is None),
            "scales": TensorSpec(torch.float32, (self.rank,), optional=True),
        }

    def _check_fields(self) -> None:
        if self.rank < 1:
            raise self._refused("up", self.up, "at least one column")

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(up [out_features, rank], down [rank, in_features]); scales belong to down."""
        down = self.down.to(dtype)
        return self.up.to(dtype), down if self.scales is None else down * self.scales.to(dtype).unsqueeze(1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features]: base + up down in fp32, then cast."""
        up, down = self.factors()
        return (self.base.dequantize() + up @ down).to(dtype)

    @property
    def by_rows(self) -> bool:
        """True where the base reads single rows."""
        return self.base.by_rows

    def _rows(self, index: Tensor) -> Tensor:
        """Rows of the base, and of the correction."""
        up, down = self.factors()
        return self.base.rows(index) + up.index_select(0, index) @ down

    @property
    def cpu_slowdown(self) -> float:
        """The base's, and that of the factors, which are dense."""
        out_features, in_features = self.shape
        return self.base.cpu_slowdown + self.rank * (out_features + in_features) / (out_features * in_features)

    def _cut(self, dim: int, start: int, stop: int) -> QuantizedWeight:
        """Where the base can be; the factor of the other side is that of all parts."""
        up, down = (self.up[start:stop], self.down) if dim == 0 else (self.up, self.down[:, start:stop])
        return LowRankWeight(self.base.cut(dim, start, stop), up, down, self.scales)

    def prepare(self) -> None:
        """Prepares the base."""
        self.base.prepare()

    def matmul(
        self, x: Tensor, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None
    ) -> Tensor:
        """[..., in_features] -> [..., out_features]: the base's product with this correction, and one more if given."""
        own_up, own_down = self._factors_in(x.dtype)
        if up is not None and down is not None:
            own_up, own_down = torch.cat([own_up, up], dim=1), torch.cat([own_down, down])
        return self.base.matmul(x, bias, own_up, own_down)

    def _factors_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if dtype not in self._cast:
            with torch.inference_mode(False):  # they may be kept longer than the caller's mode
                self._cast[dtype] = self.factors(dtype)
        return self._cast[dtype]

    @cached_property
    def _cast(self) -> dict[torch.dtype, tuple[Tensor, Tensor]]:
        """Factors in the types of activations that were seen."""
        return {}


def plus(weight: QuantizedWeight, up: Tensor, down: Tensor) -> QuantizedWeight:
    """W + up down: one more correction, beside those that a weight has; nothing of it is rounded but the new factors.

    Args:
        weight: of any format. Factors in fp16 that lie outermost get more columns, and a factor of the layer stays in
            front.
        up, down: fp32 or fp64 [out_features, rank] and [rank, in_features].

    Raises:
        QuantkitError: NaN or Inf among the factors, or numbers that fp16 does not hold.
    """
    if isinstance(weight, ScaledWeight) and float(weight.factor):
        return replace(weight, base=plus(weight.base, up / weight.factor, down))
    up, down = stored_factors(up, down)
    if not all(bool(torch.isfinite(factor).all()) for factor in (up, down)):
        raise QuantkitError("a correction's factors hold NaN or Inf, or numbers too large for fp16; is it damaged?")
    if isinstance(weight, LowRankWeight) and weight.scales is None:
        up, down = torch.cat([weight.up, up], dim=1), torch.cat([weight.down, down])
        weight = weight.base
    return LowRankWeight(weight, up, down)


def stored_factors(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Factors in fp16, powers of two moved between them where one has larger numbers than the other.

    Args:
        up, down: fp32 or fp64 [out_features, rank] and [rank, in_features].
    """
    sizes = up.abs().amax(0), down.abs().amax(1)
    both = (sizes[0] > 0) & (sizes[1] > 0)
    shift = torch.where(both, (sizes[1] / sizes[0]).log2() / 2, 0.0).round()
    up, down = up * shift.exp2(), down * (-shift).exp2().unsqueeze(1)
    return up.half().contiguous(), down.half().contiguous()
