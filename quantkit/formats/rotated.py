"""rotated: any weight behind a random-sign Hadamard rotation of its inputs, and of its outputs if asked for.

    W = R_out^T W' R_in        y = R_out^T (W' (R_in x))

`base` stores W'. Both rotations are orthogonal, cost O(n log n) a row of x, and store one bit a feature
(`quantkit.kernels.hadamard`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quantkit.core.schema import TensorSpec, unset
from quantkit.core.weight import QuantizedWeight, corrected
from quantkit.kernels import plans
from quantkit.kernels.hadamard import factors, launch, rotate


@dataclass(frozen=True, eq=False)
class RotatedWeight(QuantizedWeight, format="rotated"):
    """A weight in a rotated basis.

    Attributes:
        base: W', [out_features, in_features].
        in_signs: uint8 [ceil(in_features / 8)].
        out_signs: uint8 [ceil(out_features / 8)], or None where outputs are not rotated.
        out_parts: output features of parts that are rotated each by itself, their signs one after the other; None for
            one part.
    """

    base: QuantizedWeight
    in_signs: Tensor
    out_signs: Tensor | None = None
    out_parts: list[int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.base.shape

    @classmethod
    def layout(cls, base: QuantizedWeight, outputs: bool) -> RotatedWeight:
        """A rotation of a base's layout, on the meta device; of its outputs too if asked for."""
        return cls(base, unset(), unset() if outputs else None).laid_out()

    def schema(self) -> dict[str, TensorSpec]:
        """A sign for each feature."""
        outputs = sum(map(_sign_bytes, self._parts()))
        return {
            "in_signs": TensorSpec(torch.uint8, (_sign_bytes(self.shape[1]),)),
            "out_signs": TensorSpec(torch.uint8, (outputs,), optional=True),
        }

    def _check_fields(self) -> None:
        parts = self._parts()
        if sum(parts) != self.shape[0] or min(parts) < 1:
            raise self._refused("out_parts", parts, f"parts of {self.shape[0]} output features")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features]: R_out^T W' R_in in fp32, then cast."""
        weight = rotate(self.base.dequantize(), self.in_signs, True)
        return self.outputs_back(weight.T).T.to(dtype)

    @property
    def by_rows(self) -> bool:
        """True where the base reads single rows, but not where outputs are rotated: a row then depends on all."""
        return self.out_signs is None and self.base.by_rows

    def _rows(self, index: Tensor) -> Tensor:
        """Rows of the base rotated back, or all rows where outputs are rotated too."""
        return (
            super()._rows(index) if self.out_signs is not None else rotate(self.base.rows(index), self.in_signs, True)
        )

    @property
    def cpu_slowdown(self) -> float:
        """The base's, and as much as some hundred more rows for either rotation."""
        out_features, in_features = self.shape
        return self.base.cpu_slowdown + 100 / out_features + (0 if self.out_signs is None else 100 / in_features)

    def _cut(self, dim: int, start: int, stop: int) -> QuantizedWeight:
        """Where the base can be: a side that is rotated too, between whole blocks of the rotation."""
        signs, size = (self.out_signs, self.shape[0]) if dim == 0 else (self.in_signs, self.shape[1])
        if signs is None:
            return RotatedWeight(self.base.cut(dim, start, stop), self.in_signs)
        block = factors(size).size
        if self.out_parts is not None or start % 8 or block != factors(stop - start).size:
            raise self._uncut(dim, f"mixes all of a block of {block}")
        self._cut_at(dim, start, stop, block, "blocks of the rotation")
        own = signs[start // 8 : -(-stop // 8)]
        in_signs, out_signs = (self.in_signs, own) if dim == 0 else (own, self.out_signs)
        return RotatedWeight(self.base.cut(dim, start, stop), in_signs, out_signs)

    def prepare(self) -> None:
        """Prepares the base."""
        self.base.prepare()

    def matmul(
        self, x: Tensor, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None
    ) -> Tensor:
        """[..., in_features] -> [..., out_features]: rotates x, multiplies by the base, rotates back."""
        rotated = self._rotation(x) if plans.direct(x) else rotate(x, self.in_signs, False)
        if self.out_signs is None:
            return corrected(self.base.matmul(rotated, bias), x, up, down)
        y = self.outputs_back(self.base.matmul(rotated))
        return corrected(y if bias is None else y + bias.to(y.dtype), x, up, down)

    def chosen(self, x: Tensor, experts: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """Of a stack whose weights are rotated alike, as those of one run are: rotates once for all."""
        if self.out_parts is not None or not self._alike:
            return None
        y = self.base.chosen(rotate(x, self.in_signs[0], False), experts)
        if y is not None and self.out_signs is not None:
            y = rotate(y, self.out_signs[0], True)
        return y if y is None or bias is None else y + bias.to(y.dtype)[experts.long().clamp(0, len(bias) - 1)]

    @cached_property
    def _alike(self) -> bool:
        """Whether all weights of a stack have the same signs."""
        signs = [self.in_signs] if self.out_signs is None else [self.in_signs, self.out_signs]
        return all(bool((own == own[0]).all()) for own in signs)

    @cached_property
    def _rotation(self) -> plans.Planned:
        return plans.Planned(rotate, launch, self.in_signs, False, product=False)

    @cached_property
    def _rotations_back(self) -> list[plans.Planned]:
        own = [] if self.out_signs is None else _signs_of(self.out_signs, self._parts())
        return [plans.Planned(rotate, launch, signs, True, product=False) for signs in own]

    @classmethod
    def concatenated(cls, weights: Sequence[QuantizedWeight]) -> RotatedWeight | None:
        """One weight with the outputs of all, where their inputs are rotated alike and the bases go together."""
        parts = [weight for weight in weights if isinstance(weight, RotatedWeight)]
        first = parts[0]
        base = QuantizedWeight.side_by_side([part.base for part in parts])
        alike = all(torch.equal(part.in_signs, first.in_signs) for part in parts)
        if base is None or not alike or len({part.out_signs is None for part in parts}) > 1:
            return None
        if first.out_signs is None:
            return cls(base, first.in_signs)
        signs = torch.cat([part.out_signs for part in parts if part.out_signs is not None])
        return cls(base, first.in_signs, signs, [size for part in parts for size in part._parts()])

    def split(self, sizes: Sequence[int]) -> list[QuantizedWeight]:
        """Views of `sizes` outputs each; the parts that were put side by side."""
        bases = self.base.split(sizes)
        if self.out_signs is None:
            return [RotatedWeight(base, self.in_signs) for base in bases]
        signs = _signs_of(self.out_signs, sizes)
        return [RotatedWeight(base, self.in_signs, own) for base, own in zip(bases, signs, strict=True)]

    def outputs_back(self, y: Tensor) -> Tensor:
        """R_out^T y over the last dimension of y [..., out_features]."""
        if self.out_signs is None:
            return y
        parts = torch.split(y, self._parts(), -1)
        if plans.direct(y):
            back = [rotation(part) for rotation, part in zip(self._rotations_back, parts, strict=True)]
        else:
            signs = _signs_of(self.out_signs, self._parts())
            back = [rotate(part, own, True) for part, own in zip(parts, signs, strict=True)]
        return back[0] if len(back) == 1 else torch.cat(back, dim=-1)

    def _parts(self) -> list[int]:
        return [self.shape[0]] if self.out_parts is None else self.out_parts


def _signs_of(signs: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """The signs of parts with so many output features."""
    return torch.split(signs, [_sign_bytes(size) for size in sizes])


def _sign_bytes(features: int) -> int:
    return -(-features // 8)
