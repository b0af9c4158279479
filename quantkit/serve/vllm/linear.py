"""Packed linear layers of vLLM's: alone or fused, whole or a rank's part."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod

from quantkit.core.weight import QuantizedWeight
from quantkit.serve.sharding import part
from quantkit.serve.stored import Stored, joined, product, settled
from quantkit.serve.vllm import placeholders

if TYPE_CHECKING:
    from quantkit.serve.vllm.config import QuantkitConfig


class PackedLinear(LinearMethodBase):
    """Makes and runs a linear layer at least a part of which is packed.

    Args:
        config: of the checkpoint.
        stored: the layers that it is made of, in order.
    """

    def __init__(self, config: "QuantkitConfig", stored: list[Stored]) -> None:
        self.config, self.stored = config, stored

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_attributes: Any,
    ) -> None:
        """Puts placeholders in place.

        Args:
            layer: vLLM's layer.
            input_size_per_partition, output_partition_sizes: of this rank, the latter for each fused part.
            input_size, output_size: of all ranks.
            params_dtype: of activations.

        Raises:
            QuantkitError: the checkpoint's weights are of other shapes, or cannot be shared by so many ranks.
        """
        self.device = torch.get_default_device()  # vLLM's, where the layer will run
        self.dtype, self.rank, self.ranks = params_dtype, layer.tp_rank, layer.tp_size
        self.shapes = [(rows, input_size_per_partition) for rows in output_partition_sizes]
        self.whole = _whole(layer, output_partition_sizes)
        for one in self.stored:
            if one.layout is not None:
                self._own(one, one.layout)
        placeholders.put(layer, self.stored, params_dtype)

    def _own(self, stored: Stored, weight: QuantizedWeight) -> list[QuantizedWeight]:
        """This rank's parts of one of the stored layers, which may be several of vLLM's."""
        if len(self.stored) == len(self.shapes):
            shape = self.shapes[self.stored.index(stored)]
            return [part(stored.name, weight, shape, self.rank, self.ranks)]
        if self.ranks == 1:
            shape = sum(rows for rows, _ in self.shapes), self.shapes[0][1]
            return [part(stored.name, weight, shape, 0, 1)]
        starts = [sum(self.whole[:index]) for index in range(len(self.whole))]
        pieces = [weight.cut(0, start, start + size) for start, size in zip(starts, self.whole, strict=True)]
        return [
            part(stored.name, piece, shape, self.rank, self.ranks)
            for piece, shape in zip(pieces, self.shapes, strict=True)
        ]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Makes the weights of what came, where this process computes.

        Raises:
            CheckpointError: a tensor is missing or damaged.
        """
        parts = [own for one in self.stored for own in self._own(one, one.weight(self.dtype))]
        placeholders.remove(layer, self.stored, self.dtype)
        for one in self.stored:
            one.found.clear()
        if self.config.unpacks(parts, self.dtype):
            become_dense(layer, parts, self.dtype, UnquantizedLinearMethod())
            return
        layer.quantkit = [settled(weight, self.device, self.dtype) for weight in joined(parts)]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features] of this rank."""
        return product(layer.quantkit, x, bias)


def become_dense(layer: Any, parts: list[QuantizedWeight], dtype: torch.dtype, method: Any) -> None:
    """Makes a layer one of vLLM's own, with the weights unpacked.

    Args:
        layer: vLLM's layer.
        parts: its weights, one output after the other.
        dtype: of the dense weight.
        method: of vLLM, that runs it.
    """
    weight = torch.cat([one.dequantize(dtype) for one in parts])
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    layer.quant_method = method
    method.process_weights_after_loading(layer)


def _whole(layer: Any, own: list[int]) -> list[int]:
    """Outputs of each fused part over all ranks."""
    if hasattr(layer, "total_num_kv_heads"):
        heads = layer.total_num_heads, layer.total_num_kv_heads
        return [heads[0] * layer.head_size, heads[1] * layer.head_size, heads[1] * layer.v_head_size]
    return list(getattr(layer, "output_sizes", own))
