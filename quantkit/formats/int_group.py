"""int_group: n-bit integer codes, one scale and one zero point per group of input features.

    weight[o, i] = (code[o, i] - zero[g, o]) * scale[g, o],    g = i // group_size

Codes are packed densely (`quantkit.kernels.bitpack`). Asymmetric weights store zero points in fp16, so a grid may sit
anywhere; in fp32 where others' offsets are to be kept exactly: code * scale + offset. Symmetric ones store none and use
zero = (2^bits - 1) / 2: the levels are then +-1/2, +-3/2, ... steps and no code is spent on 0, which is best at 2 bits.
A grid around a whole number, zero = 2^(bits - 1), has one level more on one side; a scale's sign says on which. Other
programs' formats have no others.
The last group of a row may be shorter than the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from quantkit.core.schema import TensorSpec, extent, unset
from quantkit.core.weight import QuantizedWeight
from quantkit.kernels import int_group_layout, plans
from quantkit.kernels.bitpack import TILE, pack, planes, row_words, unpack
from quantkit.kernels.cpu import has_numba
from quantkit.kernels.int_group_matmul import (
    Problem,
    int_group_arranged_matmul,
    int_group_experts,
    int_group_matmul,
    launch,
    launch_arranged,
    launch_experts,
    problem_of,
    problem_of_expert,
    unpacked,
)
from quantkit.kernels.launching import prepare, properties
from quantkit.kernels.tuning import Config

_PASS = {8: 1.7, 4: 0.7, 2: 0.55, 1: 0.35}
"""`cpu_slowdown` of a plane of codes by its width."""
_DECODED = 2.0
"""That of codes that have to be put into the order of columns first."""


@dataclass(frozen=True, eq=False)
class IntGroupWeight(QuantizedWeight, format="int_group"):
    """Group-wise integer weight.

    Attributes:
        codes: int32 [out_features, row_words(in_features, bits)].
        scales: fp16 [groups, out_features], groups = ceil(in_features / group_size); a kernel that walks along a row
            finds the scales of its rows side by side.
        bits: 1..8.
        group_size: input features that share a scale.
        in_features: width of the weight.
        zeros: fp16 or fp32 [groups, out_features] in units of codes; None for a symmetric grid around no code; fp16
            [1], which is not stored, for one around 2^(bits - 1).
        grid: "int" for such a one; it follows from zeros of one number, and they from it.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int
    in_features: int
    zeros: Tensor | None = None
    grid: Literal["int"] | None = None

    def __post_init__(self) -> None:
        if self.grid is None and isinstance(self.zeros, Tensor) and tuple(self.zeros.shape) == (1,):
            object.__setattr__(self, "grid", "int")
        if self.grid == "int" and isinstance(self.codes, Tensor) and isinstance(self.bits, int):
            zeros = torch.full((1,), 2.0 ** (min(self.bits, 9) - 1), dtype=torch.float16, device=self.codes.device)
            object.__setattr__(self, "zeros", zeros)

    def tensors(self) -> dict[str, Tensor]:
        """See `QuantizedWeight`: a zero that all groups have follows from the bits."""
        found = super().tensors()
        if self.grid == "int":
            found.pop("zeros", None)
        return found

    @classmethod
    def pack(cls, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> IntGroupWeight:
        """Packs plain codes.

        Args:
            codes: uint8 [out_features, in_features].
            scales: fp16 [groups, out_features].
            zeros: as in the class.
        """
        return cls(pack(codes, bits), scales, bits, group_size, codes.shape[1], zeros)

    @classmethod
    def layout(
        cls,
        out_features: int,
        in_features: int,
        bits: int,
        group_size: int,
        zero: int = int_group_layout.BETWEEN,
        zeros_dtype: torch.dtype = torch.float16,
    ) -> IntGroupWeight:
        """A weight of this shape on the meta device; `zero` is one of `kernels.int_group_layout`'s."""
        stored = unset(1, out_features).to(zeros_dtype)
        zeros = {int_group_layout.BETWEEN: None, int_group_layout.STORED: stored}.get(zero, unset(1))
        sized = unset(out_features)
        return cls(sized, sized, bits, group_size, in_features, zeros).laid_out()

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return extent(self.codes, 0), self.in_features

    def schema(self) -> dict[str, TensorSpec]:
        """Codes of each row, and scales of each group, mostly zeros too where the grid has any."""
        groups = TensorSpec(torch.float16, (-(-self.in_features // self.group_size), self.shape[0]), continuous=True)
        codes = TensorSpec(torch.int32, (self.shape[0], row_words(self.in_features, self.bits)))
        zeros = replace(groups, dtype=(torch.float16, torch.float32), optional=True)
        return {"codes": codes, "scales": groups, "zeros": zeros}

    @property
    def zero(self) -> int:
        """Where zero is: one of `kernels.int_group_layout`'s."""
        return int_group_layout.zero_of(self.zeros)

    def _check_fields(self) -> None:
        if not 1 <= self.bits <= 8 or self.group_size < 1:
            raise self._refused("(bits, group_size)", (self.bits, self.group_size), "1 to 8 bits and at least 1 column")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features]: (code - zero) * scale in fp32, then cast."""
        weight = unpacked(self.codes, self.scales, self.zeros, self.bits, self.group_size, self.in_features)
        return weight.to(dtype)

    @property
    def cpu_slowdown(self) -> float:
        """Adds up the planes of a code, each of which is a pass over the row."""
        if not has_numba():
            return super().cpu_slowdown
        regular = self.group_size in (32, 64) or self.group_size % 128 == 0 or self.group_size >= self.in_features
        return sum(_PASS[width] for width in planes(self.bits)) if regular else _DECODED

    @property
    def by_rows(self) -> bool:
        """Yes: a row has words and scales of its own."""
        return True

    def _rows(self, index: Tensor) -> Tensor:
        """Reads the words and scales of these rows alone."""
        codes, scales = self.codes.index_select(0, index), self.scales.index_select(1, index)
        zeros = self.zeros.index_select(1, index) if self.zeros is not None and self.zeros.dim() == 2 else self.zeros
        return unpacked(codes, scales, zeros, self.bits, self.group_size, self.in_features)

    def prepared(self) -> QuantizedWeight:
        """On a GPU that runs the kernels tile after tile, where the shape allows."""
        if not plans.on_gpu(self.codes) or properties(self.codes.device)[0] < 80:
            return self
        wide = self.zeros is not None and self.zeros.dtype == torch.float32  # of which the stream has no place
        if wide or not int_group_layout.prefers(self.bits, self.in_features, self.group_size):
            return self
        stream = int_group_layout.arranged(self.codes, self.scales, self.zeros, self.bits, self.group_size)
        return ArrangedIntGroupWeight(stream, self.bits, self.group_size, self.zero, *self.shape)

    def prepare(self) -> None:
        """Allocates what launches on the codes' GPU share."""
        prepare(self.codes.device)

    def matmul(
        self, x: Tensor, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None
    ) -> Tensor:
        """[..., in_features] -> [..., out_features], fused; see `quantkit.kernels.int_group_matmul`."""
        if plans.direct(x, bias, up, down):
            return self._planned(x, bias, up, down)
        y: Tensor = int_group_matmul(x, self.codes, self.scales, self.zeros, self.bits, self.group_size, bias, up, down)
        return y

    def chosen(self, x: Tensor, experts: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """See `kernels.experts`."""
        N = self.codes.shape[1]
        if not problem_of_expert(x, N, self.bits, self.group_size, False).decodes:
            return None
        product = launch_experts if plans.launches("int_group_experts", x) else int_group_experts
        zeros = self.zeros if self.zero == int_group_layout.STORED else None
        y: Tensor = product(x, experts, self.codes, self.scales, zeros, self.bits, self.group_size, N, self.zero, bias)
        return y

    def launch(self, x: Tensor, config: Config) -> Tensor:
        """x [..., in_features] -> [..., out_features] by the kernel for few rows, with given launch sizes."""
        return launch(x, self.codes, self.scales, self.zeros, self.bits, self.group_size, config=config)

    def problem(self, x: Tensor) -> Problem:
        """What launch sizes are chosen for, with x [..., in_features]."""
        return problem_of(x, self.shape[0], self.bits, self.group_size)

    @cached_property
    def _planned(self) -> Callable[..., Tensor]:
        return plans.Planned(int_group_matmul, launch, self.codes, self.scales, self.zeros, self.bits, self.group_size)

    @classmethod
    def concatenated(cls, weights: Sequence[QuantizedWeight]) -> IntGroupWeight | None:
        """One weight with the outputs of all, where bits, groups and zeros are alike."""
        parts = [weight for weight in weights if isinstance(weight, IntGroupWeight)]
        first = parts[0]
        kinds = {None if part.zeros is None else part.zeros.dtype for part in parts}
        if len(kinds) > 1 or len({(part.bits, part.group_size, part.in_features, part.zero) for part in parts}) > 1:
            return None
        codes = torch.cat([part.codes for part in parts])
        scales = torch.cat([part.scales for part in parts], dim=1)
        stored = [part.zeros for part in parts if part.zeros is not None]
        zeros = torch.cat(stored, dim=1) if first.zero == int_group_layout.STORED else first.zeros
        return cls(codes, scales, first.bits, first.group_size, first.in_features, zeros)

    def split(self, sizes: Sequence[int]) -> list[QuantizedWeight]:
        """Views of `sizes` outputs each."""
        codes, scales = torch.split(self.codes, list(sizes)), torch.split(self.scales, list(sizes), dim=1)
        zeros: Sequence[Tensor | None] = [self.zeros] * len(sizes)
        if self.zeros is not None and self.zero == int_group_layout.STORED:
            zeros = torch.split(self.zeros, list(sizes), dim=1)
        return [
            IntGroupWeight(c, s, self.bits, self.group_size, self.in_features, z)
            for c, s, z in zip(codes, scales, zeros, strict=True)
        ]

    def _cut(self, dim: int, start: int, stop: int) -> QuantizedWeight:
        """Outputs at any border, inputs between groups or within one."""
        if dim == 0:
            codes, groups, own = self.codes[start:stop], slice(None), slice(start, stop)
        else:
            within = start // self.group_size == (stop - 1) // self.group_size
            if not within:
                self._cut_at(dim, start, stop, self.group_size, "groups")
            codes = pack(unpack(self.codes, self.bits, self.in_features)[:, start:stop], self.bits)
            groups, own = slice(start // self.group_size, -(-stop // self.group_size)), slice(None)
        zeros = self.zeros[groups, own] if self.zeros is not None and self.zeros.dim() == 2 else self.zeros
        in_features = self.in_features if dim == 0 else stop - start
        return replace(self, codes=codes, scales=self.scales[groups, own], zeros=zeros, in_features=in_features)


@dataclass(frozen=True, eq=False)
class ArrangedIntGroupWeight(QuantizedWeight, format="int_group_arranged"):
    """An IntGroupWeight as it is held on a GPU, tile after tile; files do not have it.

    Attributes:
        stream: int32 [blocks of rows, tiles, words], see `quantkit.kernels.int_group_layout`.
        bits, group_size, out_features, in_features: of the weight.
        zero: where it is; one of `kernels.int_group_layout`'s.
    """

    stream: Tensor
    bits: int
    group_size: int
    zero: int
    out_features: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def label(self) -> str:
        """The label of the stored form."""
        return IntGroupWeight.format

    def schema(self) -> dict[str, TensorSpec]:
        """The stream of codes, scales and zeros."""
        tiles = -(-self.out_features // int_group_layout.ROWS), self.in_features // TILE
        words = int_group_layout.words_of_block(self.bits, self.group_size, self.zero)
        return {"stream": TensorSpec(torch.int32, (*tiles, words))}

    def _check_fields(self) -> None:
        form = self.bits, self.group_size
        if not 1 <= self.bits <= 8 or self.group_size < 1 or not int_group_layout.arranges(self.in_features, form[1]):
            raise self._refused("(bits, group_size)", form, "1 to 8 bits and groups that fit tiles")

    def stored(self) -> IntGroupWeight:
        """The checkpoint's bytes."""
        return self._of_rows(None)

    def _of_rows(self, index: Tensor | None) -> IntGroupWeight:
        form = self.bits, self.group_size, self.zero, self.out_features
        codes, scales, zeros = int_group_layout.restored(self.stream, *form, index)
        return IntGroupWeight(codes, scales, self.bits, self.group_size, self.in_features, zeros)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features]: (code - zero) * scale in fp32, then cast."""
        return self.stored().dequantize(dtype)

    @property
    def by_rows(self) -> bool:
        """Yes: a row has words and scales of its own."""
        return True

    def _rows(self, index: Tensor) -> Tensor:
        """Reads the words and scales of these rows alone."""
        return self._of_rows(index.long()).dequantize()

    def prepare(self) -> None:
        """Allocates what launches on the stream's GPU share."""
        prepare(self.stream.device)

    def matmul(
        self, x: Tensor, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None
    ) -> Tensor:
        """[..., in_features] -> [..., out_features], fused; see `quantkit.kernels.int_group_matmul`."""
        if plans.direct(x, bias, up, down):
            return self._planned(x, bias, up, down)
        y: Tensor = int_group_arranged_matmul(x, self.stream, *self._form, bias, up, down)
        return y

    def chosen(self, x: Tensor, experts: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """See `kernels.experts`."""
        if not problem_of_expert(x, self.out_features, self.bits, self.group_size, True).decodes:
            return None
        product = launch_experts if plans.launches("int_group_experts", x) else int_group_experts
        form = self.bits, self.group_size, self.out_features, self.zero
        y: Tensor = product(x, experts, self.stream, None, None, *form, bias)
        return y

    def launch(self, x: Tensor, config: Config) -> Tensor:
        """As `IntGroupWeight.launch`: x [..., in_features] -> [..., out_features]."""
        return launch_arranged(x, self.stream, *self._form, config=config)

    def problem(self, x: Tensor) -> Problem:
        """As `IntGroupWeight.problem`: what launch sizes are chosen for, with x [..., in_features]."""
        return problem_of(x, self.out_features, self.bits, self.group_size, arranged=True)

    @property
    def _form(self) -> tuple[int, int, int, int]:
        return self.bits, self.group_size, self.zero, self.out_features

    @cached_property
    def _planned(self) -> Callable[..., Tensor]:
        return plans.Planned(int_group_arranged_matmul, launch_arranged, self.stream, *self._form)

    def divides(self, sizes: Sequence[int]) -> bool:
        """True where parts are whole blocks of rows, but for the last."""
        return all(size % int_group_layout.ROWS == 0 for size in sizes[:-1])

    def split(self, sizes: Sequence[int]) -> list[QuantizedWeight]:
        """Views of `sizes` outputs each, which `divides` allows."""
        streams = torch.split(self.stream, [-(-size // int_group_layout.ROWS) for size in sizes])
        form = self.bits, self.group_size, self.zero
        return [
            ArrangedIntGroupWeight(stream, *form, size, self.in_features)
            for stream, size in zip(streams, sizes, strict=True)
        ]
