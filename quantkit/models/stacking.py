"""Packed experts as one stack on a GPU, so that a token's experts are one launch whose choice the host never learns.

The layers keep their places and their tensors, which become views into the stack; a move or cast of the model takes the
stack apart, and saving does not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.core.weight import QuantizedWeight
from quantkit.models.linear import QuantizedLinear


class Stack:
    """The layers of all experts at one place; see `fusion.SharedInput`, which is the like for layers side by side.

    Args:
        weight: a stack.
        layers: whose it is, in order.

    Attributes:
        weight: the stack.
        whole: whether all layers have its weights still.
    """

    def __init__(self, weight: QuantizedWeight, layers: Sequence[QuantizedLinear]) -> None:
        self.weight, self.whole, self._own = weight, True, list(layers)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self._bias = torch.stack([bias.detach() for bias in biases]) if biases else None
        self._parts = [weight.part(index) for index in range(len(layers))]
        for index, (layer, part) in enumerate(zip(layers, self._parts, strict=True)):
            layer.share(self, index, part)

    def output(self, slot: int, x: Tensor) -> Tensor:
        """One expert's output [..., out_features] for x [..., in_features]."""
        return self._parts[slot].matmul(x, None if self._bias is None else self._bias[slot])

    def of(self, layers: Sequence[Any]) -> bool:
        """Whether these are its layers, none of which another has replaced."""
        return all(own is layer for own, layer in zip(self._own, layers, strict=True))

    def take_apart(self) -> None:
        """Gives all layers their tensors for themselves again."""
        for layer in self._own:
            if layer.shared is self:
                layer.unshare()

    def left(self) -> None:
        """A layer has gone."""
        self.whole = False

    def chosen(self, x: Tensor, experts: Tensor) -> Tensor | None:
        """[pairs, out_features] for x [rows, in_features]; see `QuantizedWeight.chosen`."""
        return self.weight.chosen(x, experts, self._bias)


def stack(layers: Sequence[Any]) -> Stack | None:
    """A stack of experts' layers at one place; None where one is not packed, is shared already, or they differ."""
    packed = [layer for layer in layers if isinstance(layer, QuantizedLinear) and layer.shared is None]
    if len(packed) < len(layers) or len({layer.bias is None for layer in packed}) > 1:
        return None
    weight = QuantizedWeight.stacked([layer.used for layer in packed])
    return None if weight is None else Stack(weight, packed)
