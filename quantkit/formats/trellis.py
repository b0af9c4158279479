"""trellis: weights as windows of rings of bits, their values computed (`quantkit.kernels.trellis` has the code).

    W[n, k] = value(state[n, k]) * step(scales[k]) * scale

A ring goes along the outputs of one column, or of `width` neighbouring ones: then in tiles of width x width, row tile
after row tile, column after column within a tile (QTIP's order; no kernel, such weights are multiplied dequantized).
Weights over the same inputs can be put side by side, each part with its own rings, steps and scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from quantkit.core.schema import TensorSpec, extent, unset
from quantkit.core.weight import QuantizedWeight
from quantkit.kernels import launching, plans, trellis
from quantkit.kernels.cpu import has_numba
from quantkit.kernels.trellis_matmul import BLOCK_N, launch, launch_experts, trellis_experts, trellis_matmul, unpacked

LARGEST_WIDTH = 256


@dataclass(frozen=True, eq=False)
class TrellisWeight(QuantizedWeight, format="trellis"):
    """A trellis-coded weight.

    Attributes:
        codes: int32 [words, rings], see `quantkit.kernels.trellis`; those of all parts, one after the other.
        scales: uint8 [parts, in_features], steps of the columns.
        scale: fp32 [parts].
        bits: K, of a weight.
        state_bits: L, of the window that a weight is computed from.
        parts: rows of the weights that lie side by side; mostly one.
        width: columns that a ring goes through.
    """

    codes: Tensor
    scales: Tensor
    scale: Tensor
    bits: int
    state_bits: int
    parts: list[int]
    width: int = 1

    @classmethod
    def layout(cls, parts: list[int], in_features: int, bits: int, state_bits: int, width: int = 1) -> TrellisWeight:
        """The layout for a shape, on the meta device."""
        return cls(unset(), unset(0, in_features), unset(), bits, state_bits, parts, width).laid_out()

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return sum(self.parts), extent(self.scales, 1)

    @property
    def label(self) -> str:
        """The format's name, L and K."""
        return f"trellis L={self.state_bits} K={self.bits}{f' width {self.width}' if self.width > 1 else ''}"

    def schema(self) -> dict[str, TensorSpec]:
        """Words of rings, steps of columns, and a scale a part."""
        words = sum(trellis.lines([_places(part, self.width) for part in self.parts], self.bits))
        return {
            "codes": TensorSpec(torch.int32, (words, -(-self.shape[1] // self.width))),
            "scales": TensorSpec(torch.uint8, (len(self.parts), self.shape[1])),
            "scale": TensorSpec(torch.float32, (len(self.parts),), continuous=True),
        }

    def _check_fields(self) -> None:
        form, (low, high) = (self.bits, self.state_bits, self.width), trellis.STATE_BITS
        known = 1 <= self.bits <= 8 and 1 <= self.width <= LARGEST_WIDTH
        if not known or not max(low, 2 * self.bits) <= self.state_bits <= high:
            wanted = f"1 to 8 bits, states of twice as many and {low} to {high}, and widths to {LARGEST_WIDTH}"
            raise self._refused("(bits, state_bits, width)", form, wanted)
        aligned = self.width == 1 and not any(part % BLOCK_N for part in self.parts[:-1])
        if min(self.parts, default=0) < 1 or (len(self.parts) > 1 and not aligned):
            raise self._refused("parts", self.parts, f"multiples of {BLOCK_N} rows side by side, but for the last")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features]: value * step * scale in fp32, then cast."""
        form = self.bits, self.state_bits
        if self.width == 1:
            return unpacked(self.codes, self.scales, self.scale, *form, self.parts, self.shape[1]).to(dtype)
        out_features, in_features = self.shape
        states = trellis.states(self.codes, *form)[: _places(out_features, self.width)]
        values = columns_of(trellis.table(self.state_bits, states.device)[states.long()], self.width)
        return (values[:out_features, :in_features] * trellis.step(self.scales) * self.scale).to(dtype)

    def matmul(
        self, x: Tensor, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None
    ) -> Tensor:
        """[..., in_features] -> [..., out_features] by the fused kernel, where rings go along one column."""
        if self.width > 1:
            return super().matmul(x, bias, up, down)
        if plans.direct(x, bias, up, down):
            return self._planned(x, bias, up, down)
        form = self.bits, self.state_bits, self.parts
        y: Tensor = trellis_matmul(x, self.codes, self.scales, self.scale, *form, bias, up, down)
        return y

    def chosen(self, x: Tensor, experts: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """See `kernels.experts`."""
        if self.width > 1 or len(self.parts) > 1:
            return None
        product = launch_experts if plans.launches("trellis_experts", x) else trellis_experts
        form = self.bits, self.state_bits, self.parts[0]
        y: Tensor = product(x, experts, self.codes, self.scales, self.scale, *form, bias)
        return y

    @property
    def cpu_slowdown(self) -> float:
        """The same for all bits: a weight is computed from its window."""
        return 1.2 if has_numba() and self.width == 1 else super().cpu_slowdown

    @cached_property
    def _planned(self) -> Callable[..., Tensor]:
        form = self.bits, self.state_bits, self.parts
        return plans.Planned(trellis_matmul, launch, self.codes, self.scales, self.scale, *form)

    def prepare(self) -> None:
        """Allocates what launches on a GPU share, and moves steps to where a word begins, as the kernel reads them."""
        if not self.scales.is_meta and self.scales.data_ptr() % 4:
            self.scales.data = self.scales.clone()  # of the module's buffer too, which this is
        if self.codes.is_cuda:
            launching.prepare(self.codes.device)

    def _cut(self, dim: int, start: int, stop: int) -> QuantizedWeight:
        """Inputs between rings; a ring goes through all outputs and cannot be opened."""
        if dim == 0:
            raise self._uncut(dim, "keeps the ring of a column together, which goes through all of them")
        first, last = self._cut_at(dim, start, stop, self.width, "tiles")
        return replace(self, codes=self.codes[:, first:last], scales=self.scales[:, start:stop])

    @classmethod
    def concatenated(cls, weights: Sequence[QuantizedWeight]) -> TrellisWeight | None:
        """One weight with the outputs of all, where bits and windows are alike and parts fill the kernel's tiles."""
        alike = [weight for weight in weights if isinstance(weight, TrellisWeight)]
        first, parts = alike[0], [part for weight in alike for part in weight.parts]
        forms = {(weight.bits, weight.state_bits, weight.shape[1], weight.width) for weight in alike}
        if len(forms) > 1 or first.width > 1 or any(part % BLOCK_N for part in parts[:-1]):
            return None
        codes, scales, scale = (
            torch.cat([weight.tensors()[name] for weight in alike]) for name in ("codes", "scales", "scale")
        )
        return cls(codes, scales, scale, first.bits, first.state_bits, parts)

    def split(self, sizes: Sequence[int]) -> list[QuantizedWeight]:
        """Views of the parts that were put side by side.

        Raises:
            ValueError: `sizes` are not theirs.
        """
        if list(sizes) != self.parts:
            raise ValueError(f"rings of {self.parts} outputs do not split into {list(sizes)}")
        codes, scales = torch.split(self.codes, trellis.lines(sizes, self.bits)), torch.split(self.scales, 1)
        return [
            TrellisWeight(own, steps, scale, self.bits, self.state_bits, [size])
            for own, steps, scale, size in zip(codes, scales, torch.split(self.scale, 1), sizes, strict=True)
        ]


def rings_of(columns: Tensor, width: int) -> Tensor:
    """Columns [rows, columns] in the order of rings, [places, rings]; zeros fill up."""
    rows, count = columns.shape
    padded = torch.nn.functional.pad(columns, (0, -count % width, 0, -rows % width))
    tiles = padded.view(len(padded) // width, width, -1, width)  # row tile, row, block of columns, column
    return tiles.permute(0, 3, 1, 2).flatten(0, 2)


def columns_of(rings: Tensor, width: int) -> Tensor:
    """The inverse of `rings_of`, with what fills up: [places, rings] -> [rows, columns]."""
    tiles = rings.view(-1, width, width, rings.shape[1])
    return tiles.permute(0, 2, 3, 1).flatten(2, 3).flatten(0, 1)


def _places(out_features: int, width: int) -> int:
    return -(-out_features // width) * width * width
