"""trellis: weights as windows of rings of bits, their values computed (`quantkit.kernels.trellis` has the code).

    W[n, k] = value(state[n, k]) * step(scales[k]) * scale,    step(c) = (16 + c % 16) / 16 * 2^(c // 16 - 15)

A ring goes along the outputs of one column, or of `width` neighbouring ones: then in tiles of width x width, row tile
after row tile, column after column within a tile (QTIP's order; no kernel, such weights are multiplied dequantized).
Steps have five significant bits, so that a product with a number of fp16 or bf16 is exact in two bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quantkit.kernels import launching, trellis
from quantkit.kernels.trellis_matmul import trellis_matmul
from quantkit.weight import QuantizedWeight, corrected


@dataclass(frozen=True, eq=False)
class TrellisWeight(QuantizedWeight, format="trellis"):
    """A trellis-coded weight.

    Attributes:
        codes: int32 [words, rings], see `quantkit.kernels.trellis`.
        scales: uint8 [in_features], steps of the columns.
        scale: fp32 [1].
        bits: K, of a weight.
        state_bits: L, of the window that a weight is computed from.
        out_features: rows of the weight.
        width: columns that a ring goes through.
    """

    codes: Tensor
    scales: Tensor
    scale: Tensor
    bits: int
    state_bits: int
    out_features: int
    width: int = 1

    @classmethod
    def layout(cls, out_features: int, in_features: int, bits: int, state_bits: int, width: int = 1) -> TrellisWeight:
        """The layout for a shape, on the meta device."""
        words = trellis.ring_length(_places(out_features, width)) * bits // 32
        codes = torch.empty(words, -(-in_features // width), dtype=torch.int32, device="meta")
        scales = torch.empty(in_features, dtype=torch.uint8, device="meta")
        return cls(codes, scales, torch.empty(1, device="meta"), bits, state_bits, out_features, width)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, len(self.scales)

    @property
    def label(self) -> str:
        """The format, L and K."""
        return f"trellis L={self.state_bits} K={self.bits}{f' width {self.width}' if self.width > 1 else ''}"

    def validate(self) -> None:
        """Checks shapes and that the scale is finite; any bits are valid codes."""
        low, high = trellis.STATE_BITS
        known = self.bits in range(1, 9) and self.state_bits in range(max(low, 2 * self.bits), high + 1)
        if not known or self.width not in range(1, 257) or self.out_features < 1:
            raise ValueError(
                f"bits={self.bits}, state_bits={self.state_bits}, width={self.width}, out_features="
                f"{self.out_features}: trellis codes take 1 to 8 bits and windows of twice as many to {high}"
            )
        wanted = TrellisWeight.layout(*self.shape, self.bits, self.state_bits, self.width).tensors()
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
        places = _places(self.out_features, self.width)
        states = trellis.states(self.codes, self.bits, self.state_bits)[:places]
        values = trellis.table(self.state_bits, states.device)[states.long()]
        values = columns_of(values, self.width)[: self.out_features, : len(self.scales)]
        return (values * step(self.scales) * self.scale).to(dtype)

    def matmul(
        self, x: Tensor, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None
    ) -> Tensor:
        """The fused kernel, where rings go along one column; steps go into x, which rounds it once in its own type."""
        if self.width > 1:
            return super().matmul(x, bias, up, down)
        scaled = x * self._steps(x.dtype)
        y = trellis_matmul(scaled, self.codes, self.scale, self.bits, self.state_bits, self.out_features, bias)
        return corrected(y, x, up, down)

    def prepare(self) -> None:
        """Allocates what launches on a GPU share, and makes the steps."""
        if self.codes.is_cuda:
            launching.prepare(self.codes.device)
            self._steps(torch.bfloat16)

    def _steps(self, dtype: torch.dtype) -> Tensor:
        """Steps of the columns, made once a type."""
        if dtype not in self._made:
            self._made[dtype] = step(self.scales).to(dtype)
        return self._made[dtype]

    @cached_property
    def _made(self) -> dict[torch.dtype, Tensor]:
        return {}


def step(scales: Tensor) -> Tensor:
    """fp32 steps of codes uint8."""
    scales = scales.int()
    return torch.ldexp(1 + (scales & 15) / 16, (scales >> 4) - 15)


def nearest_step(wanted: Tensor) -> Tensor:
    """uint8 codes of the steps that are nearest to fp32 numbers, in their ratio."""
    steps = step(torch.arange(256, device=wanted.device))
    return torch.bucketize(wanted, (steps[1:] * steps[:-1]).sqrt()).to(torch.uint8)


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
