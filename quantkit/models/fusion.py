"""Projections that read the same input (q, k, v; gate, up) as one launch over their outputs side by side.

A launch of a small weight cannot fill a GPU; of three it fills it once. Each layer keeps its place in the model and
its tensors, which become views into the fused weight's: the first of them that is called computes all outputs, and
the others hand theirs out. Moving or casting the model takes the fusion apart; saving it does not.

An input must not be changed in place between the calls of its layers where torch counts no versions (inference mode).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.weight import QuantizedWeight
from quantkit.models.linear import QuantizedLinear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))
"""Names of children that read the same input, in all models that transformers builds of them."""


def fuse(model: nn.Module) -> int:
    """Fuses what can be fused, for inference.

    Args:
        model: with packed layers.

    Returns:
        How many groups of layers run as one now. Layers of unlike formats, bits or group sizes stay apart.
    """
    fused = 0
    for module in list(model.modules()):
        for names in SIBLINGS:
            layers = [getattr(module, name, None) for name in names]
            if all(
                isinstance(layer, QuantizedLinear) and layer.shared is None and not _dense(layer) for layer in layers
            ):
                fused += _fuse_layers([layer for layer in layers if isinstance(layer, QuantizedLinear)])
    return fused


def _dense(layer: QuantizedLinear) -> bool:
    """Whether a layer will run unpacked where its tensors are."""
    return layer.unpacked and next(layer.buffers()).device.type == "cpu"


def _fuse_layers(layers: Sequence[QuantizedLinear]) -> bool:
    weight = QuantizedWeight.side_by_side([layer.packed for layer in layers])
    biases = [layer.bias for layer in layers]
    if weight is None or len({bias is None for bias in biases}) > 1:
        return False
    sizes = [layer.out_features for layer in layers]
    prepared = weight.prepared()
    weight = prepared if prepared.divides(sizes) else weight
    bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases if bias is not None])
    shared = SharedInput(weight, bias, sizes)
    for slot, (layer, part) in enumerate(zip(layers, weight.split(sizes), strict=True)):
        layer.share(shared, slot, part)
    return True


class SharedInput:
    """The fused weight, and the outputs for the input that it saw last.

    Args:
        weight: of all layers, one after the other.
        bias: theirs, or None.
        sizes: out_features of each.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, sizes: list[int]) -> None:
        self.weight, self._bias, self._sizes = weight, bias, sizes
        self._last: tuple[Tensor, int, list[Tensor | None]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files hold no activations."""
        return self.__dict__ | {"_last": None}

    def left(self) -> None:
        """Nothing to do: the others have theirs of it still."""

    def output(self, slot: int, x: Tensor) -> Tensor:
        """One layer's output [..., out_features] for x [..., in_features]; computes all where x is new or changed."""
        last = self._last  # one reading: another thread may put its own there
        outputs = last[2] if last is not None and last[0] is x and last[1] == _version(x) else None
        y = None if outputs is None else outputs[slot]
        if outputs is None or y is None:
            outputs = list(self.weight.matmul(x, self._bias).split(self._sizes, dim=-1))
            y = outputs[slot]
            self._last = x, _version(x), outputs
        outputs[slot] = None
        if all(output is None for output in outputs):
            self._last = None  # keeps no activation alive
        assert y is not None
        return y


def _version(x: Tensor) -> int:
    """How often a tensor was changed in place; 0 where nobody counts (inference mode, compiled code)."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
