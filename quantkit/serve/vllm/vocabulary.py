"""Packed input embeddings and output heads of vLLM's, tied or not.

Both are divided by tokens, and vLLM fills the vocabulary up to a multiple of 64: what a rank has fewer rows than it is
to give results for is filled with zeros, which vLLM cuts off again. Many of vLLM's model classes do not hand the
checkpoint's settings to these layers: `hand_over` does.
"""

from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from quantkit.core.constants import METHOD
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.tied import TiedWeight
from quantkit.serve.stored import Stored, product, settled
from quantkit.serve.vllm import placeholders

if TYPE_CHECKING:
    from quantkit.serve.vllm.config import QuantkitConfig


class PackedVocabulary(QuantizeMethodBase):
    """Makes and runs an embedding or a head.

    Args:
        config: of the checkpoint.
        name: of its layer there. An embedding that is tied to a head looks up the rows of that one; where vLLM has no
            head in this process, it gets the head's tensors (`QuantkitConfig.get_checkpoint_weight_mapper`).
    """

    def __init__(self, config: "QuantkitConfig", name: str) -> None:
        self.config, self.name = config, name
        weight = QuantizedWeight.empty(config.layers[name])
        self.tied = weight.layer if isinstance(weight, TiedWeight) else None
        self.stored = Stored(self.tied or name, config.layers[self.tied or name])

    def create_weights(self, layer: Any, *_sizes: Any, params_dtype: torch.dtype, **_attributes: Any) -> None:
        """Puts placeholders in place, for rows as the layer itself counts them; see `PackedLinear.create_weights`.

        Raises:
            QuantkitError: the checkpoint's weight is of another shape, or cannot be shared by so many ranks.
        """
        self.dtype, self.device = params_dtype, torch.get_default_device()
        if isinstance(layer, ParallelLMHead):
            self.config.heads[self.name] = layer
        elif self.tied is not None:
            self.config.tied[self.name] = self.tied
        assert self.stored.layout is not None
        self._own(layer, self.stored.layout)
        placeholders.put(layer, [self.stored], params_dtype)

    def _own(self, layer: Any, weight: QuantizedWeight) -> QuantizedWeight:
        """This rank's rows."""
        wanted = layer.org_vocab_size, layer.embedding_dim
        if weight.shape != wanted:
            raise QuantkitError(
                f"{self.stored.name} is {list(weight.shape)} in the checkpoint and {list(wanted)} in the model; "
                "the checkpoint is damaged, or of another model"
            )
        own = layer.shard_indices
        try:
            return weight.cut(0, own.org_vocab_start_index, own.org_vocab_end_index)
        except ValueError as error:
            raise QuantkitError(
                f"{self.stored.name}: its rows cannot be shared by {layer.tp_size} ranks: {error}; "
                "pack head and embedding as int_group, which divides anywhere"
            ) from error

    def process_weights_after_loading(self, layer: Any) -> None:
        """Makes the weight of what came.

        Raises:
            CheckpointError: a tensor is missing or damaged.
        """
        placeholders.remove(layer, [self.stored], self.dtype)
        if self.tied and not self.stored.found:
            if self.tied not in self.config.heads:
                raise CheckpointError(f"{self.name} looks up rows of {self.tied}, of which no tensors came")
            return
        weight = self._own(layer, self.stored.weight(self.dtype))
        self.stored.found.clear()
        if isinstance(layer, ParallelLMHead) and self.config.unpacks([weight], self.dtype):
            dense = torch.zeros(layer.num_embeddings_per_partition, layer.embedding_dim, dtype=self.dtype)
            dense[: weight.shape[0]] = weight.dequantize(self.dtype)
            layer.register_parameter("weight", nn.Parameter(dense, requires_grad=False))
            layer.quant_method = UnquantizedEmbeddingMethod()
            layer.quant_method.process_weights_after_loading(layer)
            return
        layer.quantkit = [settled(weight, self.device, self.dtype)]

    def tie_weights(self, layer: Any, embed_tokens: Any) -> nn.Module:
        """The head itself: what is tied is the embedding, by its own metadata."""
        return layer

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits [..., rows of this rank, filled up] of hidden states x [..., features]."""
        y = product(layer.quantkit, x)
        y = torch.nn.functional.pad(y, (0, layer.num_embeddings_per_partition - y.shape[-1]))
        return y if bias is None else y + bias

    def embedding(self, layer: Any, index: Tensor) -> Tensor:
        """int [...] -> [..., features] in the model's dtype."""
        if self.tied and not hasattr(layer, "quantkit"):
            head: Any = self.config.heads[self.tied]
            found: Tensor = head.quant_method.embedding(head, index)
            return found
        return layer.quantkit[0].rows(index, self.dtype)


def hand_over() -> None:
    """Has vLLM make embeddings and heads, from now on, with the checkpoint's settings where its model classes forget.

    By vLLM's own way of replacing layers; other checkpoints' layers stay as they are, and so does what another plugin
    has replaced.
    """
    for layer in (VocabParallelEmbedding, ParallelLMHead):
        if layer.__name__ not in op_registry_oot:
            layer.register_oot(_handed(layer))


def _handed(layer: Any) -> Any:
    """A subclass of the same name that takes vLLM's present quantization config where it is given none."""

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        given, config = signature(layer.__init__).bind(self, *args, **kwargs), get_current_vllm_config().quant_config
        if given.arguments.get("quant_config") is None and config is not None and config.get_name() == METHOD:
            given.arguments["quant_config"] = config
        layer.__init__(*given.args, **given.kwargs)

    return type(layer.__name__, (layer,), {"__init__": make, "__module__": __name__})
