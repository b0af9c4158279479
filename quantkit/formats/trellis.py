"""trellis: weights as windows of rings of bits, their values computed (`quantkit.kernels.trellis` has the code).

    W[n, k] = value(state[n, k]) * step(scales[k]) * scale

A ring goes along the outputs of one column, or of `width` neighbouring ones: then in tiles of width x width, row tile
after row tile, column after column within a tile (QTIP's order; no kernel, such weights are multiplied dequantized).
Weights over the same inputs can be put side by side, each part with its own rings, steps and scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quantkit.core.weight import QuantizedWeight
from quantkit.kernels import launching, plans, trellis
from quantkit.kernels.cpu import has_numba
from quantkit.kernels.trellis_matmul import BLOCK_N, launch, trellis_matmul, unpacked


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
        words = sum(trellis.lines([_places(part, width) for part in parts], bits))
        codes = torch.empty(words, -(-in_features // width), dtype=torch.int32, device="meta")
        scales = torch.empty(len(parts), in_features, dtype=torch.uint8, device="meta")
        scale = torch.empty(len(parts), dtype=torch.float32, device="meta")  # whatever the default type is
        return cls(codes, scales, scale, bits, state_bits, parts, width)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return sum(self.parts), self.scales.shape[-1]

    @property
    def label(self) -> str:
        """The format, L and K."""
        return f"trellis L={self.state_bits} K={self.bits}{f' width {self.width}' if self.width > 1 else ''}"

    def validate(self) -> None:
        """Checks shapes and that the scale is finite; any bits are valid codes."""
        low, high = trellis.STATE_BITS
        form = self.bits, self.state_bits, self.width
        known = all(type(number) is int for number in form) and 1 <= self.bits <= 8 and 1 <= self.width <= 256
        if not known or not max(low, 2 * self.bits) <= self.state_bits <= high:
            raise ValueError(
                f"bits={self.bits}, state_bits={self.state_bits}, width={self.width}: trellis codes take 1 to 8 bits "
                f"and windows of twice as many to {high}"
            )
        parts = self.parts if isinstance(self.parts, list) else []
        whole = all(type(part) is int and part > 0 for part in parts)
        if not parts or not whole or (len(parts) > 1 and (self.width > 1 or any(p % BLOCK_N for p in parts[:-1]))):
            raise ValueError(f"parts={self.parts}: weights side by side have multiples of {BLOCK_N} rows, but the last")
        if self.scales.dim() != 2:
            raise ValueError(f"scales have {self.scales.dim()} dimensions; trellis codes take [parts, in_features]")
        wanted = TrellisWeight.layout(self.parts, self.shape[1], self.bits, self.state_bits, self.width).tensors()
        for name, tensor in self.tensors().items():
            if tensor.dtype != wanted[name].dtype or tensor.shape != wanted[name].shape:
                raise ValueError(
                    f"{name} are {tensor.dtype} {list(tensor.shape)}; {list(self.shape)} weights at {self.bits} bits "
                    f"take {wanted[name].dtype} {list(wanted[name].shape)}"
                )
        if not self.scale.is_meta and not bool(torch.isfinite(self.scale).all()):
            raise ValueError("scale holds NaN or Inf")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """value * step * scale in fp32, then cast."""
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
        """The fused kernel, where rings go along one column."""
        if self.width > 1:
            return super().matmul(x, bias, up, down)
        if plans.direct(x, bias, up, down):
            return self._planned(x, bias, up, down)
        form = self.bits, self.state_bits, self.parts
        return trellis_matmul(x, self.codes, self.scales, self.scale, *form, bias, up, down)

    @property
    def cpu_slowdown(self) -> float:
        """The same for all bits: a weight is computed from its window."""
        return 1.2 if has_numba() and self.width == 1 else super().cpu_slowdown

    @cached_property
    def _planned(self) -> plans.Planned:
        form = self.bits, self.state_bits, self.parts
        return plans.Planned(trellis_matmul, launch, self.codes, self.scales, self.scale, *form)

    def prepare(self) -> None:
        """Allocates what launches on a GPU share, and moves steps to where a word begins, as the kernel reads them."""
        if not self.scales.is_meta and self.scales.data_ptr() % 4:
            self.scales.data = self.scales.clone()  # of the module's buffer too, which this is
        if self.codes.is_cuda:
            launching.prepare(self.codes.device)

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
        """Views of the parts that were put side by side."""
        if list(sizes) != self.parts:
            raise ValueError(f"rings of {self.parts} outputs do not split into {list(sizes)}")
        codes = self.codes.split(trellis.lines(sizes, self.bits))
        return [
            TrellisWeight(own, scales, scale, self.bits, self.state_bits, [size])
            for own, scales, scale, size in zip(codes, self.scales.split(1), self.scale.split(1), sizes, strict=True)
        ]


def rings_of(columns: Tensor, width: int) -> Tensor:
    """Columns [rows, columns] in the order of rings, [places, rings]; zeros fill up."""
    rows, count = columns.shape
    padded = torch.nn.functional.pad(columns, (0, -count % width, 0, -rows % width))
    tiles = padded.view(len(padded) // width, width, -1, width)  # row tile, row, block of columns, column
    return tiles.permute(0, 3, 1, 2).flatten(0, 2)


def columns_of(rings: Tensor, width: int) -> Tensor:
    """The inverse of `rings_of`, with what fills up."""
    tiles = rings.view(-1, width, width, rings.shape[1])
    return tiles.permute(0, 2, 3, 1).flatten(2, 3).flatten(0, 1)


def _places(out_features: int, width: int) -> int:
    return -(-out_features // width) * width * width
