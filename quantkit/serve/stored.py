"""Layers of a packed checkpoint on their way into an engine's, which gets their tensors one at a time.

An engine may hold as one layer what the checkpoint has as several (q, k, v; gate, up), some of them packed in different
ways, or not at all. `Stored` collects the tensors of one, `joined` lays what can be put side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import CheckpointError
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.dense import DenseWeight


@dataclass
class Stored:
    """A layer of the checkpoint.

    Attributes:
        name: its name there.
        metadata: of its packed weight; None where it is dense and has one tensor, `weight`.
        found: the tensors that have come so far, by their local names ("base.codes").
    """

    name: str
    metadata: Mapping[str, Any] | None
    found: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def layout(self) -> QuantizedWeight | None:
        """The packed weight on the meta device; None of a dense one, whose shape nobody tells beforehand."""
        return None if self.metadata is None else QuantizedWeight.empty(self.metadata)

    def wanted(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The dtypes of all its tensors by local name; `dtype` for that of a dense layer."""
        state = {} if self.layout is None else self.layout.state()
        return {key: tensor.dtype for key, tensor in state.items()} or {"weight": dtype}

    def weight(self, dtype: torch.dtype) -> QuantizedWeight:
        """The weight, checked, of the tensors that have come; one in `dtype` for a dense layer.

        Raises:
            CheckpointError: a tensor has not come, or is not what the metadata say.
        """
        if self.metadata is None:
            if "weight" not in self.found:
                raise CheckpointError(f"{self.name}.weight is missing from the checkpoint's files; fetch it anew")
            return DenseWeight(self.found["weight"].to(dtype))
        try:
            weight = QuantizedWeight.from_state(self.metadata, self.found)
            weight.validate()
        except (ValueError, CheckpointError) as error:
            raise CheckpointError(f"{self.name}: {error}; the checkpoint is damaged") from error
        return weight


def joined(weights: Sequence[QuantizedWeight]) -> list[QuantizedWeight]:
    """The same outputs in the same order by as few weights as their formats allow."""
    found: list[QuantizedWeight] = []
    for weight in weights:
        both = QuantizedWeight.side_by_side([found[-1], weight]) if found else None
        found = [*found[:-1], both] if both is not None else [*found, weight]
    return found


def settled(weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> QuantizedWeight:
    """The weight in memory of its own on a device, in the form in which products take it there.

    A first product with x in `dtype` makes what is made once, so that no compiler traces that and no graph records it.
    """
    weight = weight.map(lambda tensor: tensor.to(device, copy=True).contiguous()).prepared()
    weight.prepare()
    weight.matmul(torch.zeros(1, weight.shape[1], dtype=dtype, device=device))
    return weight


def product(weights: Sequence[QuantizedWeight], x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in_features] -> [..., out_features] of all weights together; bias [out_features]."""
    if len(weights) == 1:
        return weights[0].matmul(x, bias)
    y = torch.cat([weight.matmul(x) for weight in weights], dim=-1)
    return y if bias is None else y + bias
