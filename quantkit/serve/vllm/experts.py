"""Packed experts of a mixture in vLLM, which routes tokens; what the chosen experts make of them is computed here.

    y[t] = sum over choices of weight[t, choice] * down_e(act(first_e(x[t]))),    e = expert[t, choice]

`first` is an expert's gate_up_proj, as transformers stacks it, or up_proj. On a GPU some rows at a time are one launch
a projection whose choice the host never learns (`kernels.experts`), so that CUDA graphs record it; elsewhere experts
run one by one. Either way it is one operator, into which torch.compile does not look.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    apply_moe_activation,
)
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.kernels.experts import MOST
from quantkit.models.experts import place
from quantkit.serve.sharding import part
from quantkit.serve.stored import Stored, joined, product, settled

if TYPE_CHECKING:
    from quantkit.serve.vllm.config import QuantkitConfig


@dataclass
class Projection:
    """One linear layer of each of this rank's experts.

    Attributes:
        weights: of each expert, one beside the other.
        bias: [experts, out_features], or None.
        stack: all of them as one, where they are alike.
    """

    weights: list[list[QuantizedWeight]]
    bias: Tensor | None
    stack: QuantizedWeight | None = None

    def of(self, expert: int, x: Tensor) -> Tensor:
        """An expert's output [rows, out_features] for x [rows, in_features]."""
        return product(self.weights[expert], x, None if self.bias is None else self.bias[expert])


class PackedExperts(FusedMoEMethodBase):
    """Makes and runs the experts of one block.

    Args:
        config: of the checkpoint.
        moe: vLLM's settings of them.
        prefix: their name.
        layers: metadata of their packed layers.
    """

    def __init__(self, config: "QuantkitConfig", moe: Any, prefix: str, layers: Mapping[str, Any]) -> None:
        super().__init__(moe)
        self.config, self.prefix, self.layers = config, prefix, layers

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size_per_partition: int, *_: Any, **__: Any) -> Any:
        """The sizes as they are."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig:
        """Activations are not quantized."""
        return FusedMoEQuantConfig.make()

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_attributes: Any,
    ) -> None:
        """Makes a place for the tensors of this rank's experts.

        Args:
            layer: vLLM's RoutedExperts.
            num_experts: of this rank.
            hidden_size: of the model.
            intermediate_size_per_partition: width of this rank's part of an expert.
            params_dtype: of activations.

        Raises:
            QuantkitError: weights of other shapes, or that cannot be shared by so many ranks; gates that lie between
                the rows of up.
        """
        if layer.activation == MoEActivation.SWIGLUOAI:
            raise QuantkitError(f"{self.prefix}: experts whose gate and up interleave are not served packed")
        self.dtype, self.device = params_dtype, torch.get_default_device()
        self.hidden, self.width = hidden_size, intermediate_size_per_partition
        self.halves = 2 if layer.activation.is_gated else 1
        names = ("gate_up_proj" if self.halves == 2 else "up_proj", "down_proj")
        self.experts = [
            expert for expert in range(layer.global_num_experts)
            if layer._map_global_expert_id_to_local_expert_id(expert) >= 0
        ]  # fmt: skip
        self.stored = {
            (expert, name): Stored(f"{self.prefix}.{expert}.{name}", self.layers.get(f"{self.prefix}.{expert}.{name}"))
            for name in names
            for expert in self.experts
        }
        for (_, name), one in self.stored.items():
            if one.layout is not None:
                self._own(name, one, one.layout)
        layer.load_weights = self._load

    def _own(self, projection: str, stored: Stored, weight: QuantizedWeight) -> list[QuantizedWeight]:
        """This rank's part of an expert's layer."""
        rank, ranks = self.moe.tp_rank, self.moe.tp_size
        if projection == "down_proj":
            return [part(stored.name, weight, (self.hidden, self.width), rank, ranks)]
        if ranks == 1:
            return [part(stored.name, weight, (self.halves * self.width, self.hidden), rank, ranks)]
        half = weight.shape[0] // self.halves
        halves = [weight.cut(0, index * half, (index + 1) * half) for index in range(self.halves)]
        return joined([part(stored.name, own, (self.width, self.hidden), rank, ranks) for own in halves])

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Takes the tensors that vLLM reads, by their names below the experts: 3.down_proj.codes."""
        for name, tensor in weights:
            found = place(f"{self.prefix}.{name}")
            if found is None:
                raise CheckpointError(f"{self.prefix}.{name} is of no expert; the checkpoint is damaged")
            _, expert, rest = found
            projection, _, key = rest.partition(".")
            if expert in self.experts:
                if (expert, projection) not in self.stored:
                    raise CheckpointError(f"{self.prefix}.{name} is of no layer that these experts have in vLLM")
                self.stored[expert, projection].found[key] = tensor
            yield name

    def process_weights_after_loading(self, layer: Any) -> None:
        """Makes the weights of what came.

        Raises:
            CheckpointError: a tensor is missing or damaged.
        """
        biases = {key: one.found.pop("bias") for key, one in self.stored.items() if "bias" in one.found}
        parts = {key: self._own(key[1], one, one.weight(self.dtype)) for key, one in self.stored.items()}
        self.stored.clear()
        if self.config.unpacks([weight for own in parts.values() for weight in own], self.dtype) and not biases:
            self._become_dense(layer, parts)
            return
        self.projections = []
        for name in dict.fromkeys(name for _, name in parts):
            own = [
                [settled(weight, self.device, self.dtype) for weight in parts[expert, name]] for expert in self.experts
            ]
            bias = self._bias(name, [biases[expert, name] for expert in self.experts]) if biases else None
            projection = Projection(own, bias)
            if self.device.type == "cuda" and all(len(weights) == 1 for weights in own):
                projection.stack = QuantizedWeight.stacked([weights[0] for weights in own])
                if projection.stack is not None:
                    projection.weights = [[projection.stack.part(index)] for index in range(len(own))]
            self.projections.append(projection)

    def _bias(self, name: str, biases: list[Tensor]) -> Tensor:
        """This rank's biases [experts, out_features]; that of the last layer is added by the first rank."""
        bias = torch.stack(biases).to(self.device, self.dtype)
        rank = self.moe.tp_rank
        if name == "down_proj":
            return bias if rank == 0 else torch.zeros_like(bias)
        halves = bias.view(len(bias), self.halves, -1)[..., rank * self.width : (rank + 1) * self.width]
        return halves.flatten(1).contiguous()

    def _become_dense(self, layer: Any, parts: dict[tuple[int, str], list[QuantizedWeight]]) -> None:
        """Makes the experts vLLM's own, with their weights unpacked."""
        dense = UnquantizedFusedMoEMethod(self.moe)
        dense.create_weights(layer, len(self.experts), self.hidden, self.width, self.dtype)
        for (expert, name), weights in parts.items():
            stack = layer.w2_weight if name == "down_proj" else layer.w13_weight
            own = torch.cat([weight.dequantize(self.dtype) for weight in weights])
            stack.data[self.experts.index(expert)] = own
        layer._replace_quant_method(dense)
        dense.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Sums of the chosen experts' outputs.

        Args:
            layer: vLLM's RoutedExperts.
            x: [tokens, hidden_size].
            topk_weights: [tokens, k].
            topk_ids: int [tokens, k], of all ranks' experts.

        Returns:
            [tokens, hidden_size] in x's dtype.
        """
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        y: Tensor = torch.ops.quantkit.serve_experts(x, topk_weights, topk_ids, layer.layer_name)
        return y

    def run(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """`apply` with this rank's own numbers of experts; others stand for none."""
        y = torch.zeros_like(x)
        if x.is_cuda:
            few = max(1, MOST // index.shape[1])
            rows = zip(x.split(few), weights.split(few), index.split(few), strict=True)
            parts = [self._at_once(*own) for own in rows]
            found = [own for own in parts if own is not None]
            if len(found) == len(parts):
                return torch.cat(found)
        everywhere = x.is_cuda and torch.cuda.is_current_stream_capturing()  # the choice must not come to the host
        for expert in range(len(self.experts)) if everywhere else index.unique().tolist():
            if 0 <= expert < len(self.experts):
                own = (weights * (index == expert)).sum(1, keepdim=True)
                if everywhere:
                    y += (self._output(expert, x) * own).to(y.dtype)
                else:
                    tokens = (index == expert).any(1).nonzero().flatten()
                    y.index_add_(0, tokens, (self._output(expert, x[tokens]) * own[tokens]).to(y.dtype))
        return y

    def _output(self, expert: int, x: Tensor) -> Tensor:
        first, last = self.projections
        return last.of(expert, self._activated(first.of(expert, x)))

    def _at_once(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor | None:
        """The sums for few rows by one launch a projection; None where no kernel takes the experts."""
        first, last = self.projections
        if first.stack is None or last.stack is None:
            return None
        own = (index >= 0) & (index < len(self.experts))
        chosen = index.clamp(0, len(self.experts) - 1).reshape(-1)
        inner = first.stack.chosen(x, chosen, first.bias)
        y = None if inner is None else last.stack.chosen(self._activated(inner), chosen, last.bias)
        return None if y is None else (y.view(*index.shape, -1) * (weights * own).unsqueeze(-1)).sum(1).to(x.dtype)

    def _activated(self, inner: Tensor) -> Tensor:
        """What the last layer is given [rows, width] of what the first gave."""
        given = inner.new_empty(len(inner), inner.shape[1] // self.halves)
        settings = ApplyMoEActivationConfig.from_configs(self.moe, FusedMoEQuantConfig.make())
        apply_moe_activation(self.moe.activation, given, inner.contiguous(), activation_config=settings)
        return given


@torch.library.custom_op("quantkit::serve_experts", mutates_args=())
def serve_experts(x: Tensor, weights: Tensor, index: Tensor, name: str) -> Tensor:
    """`PackedExperts.run` of the experts with this name in the model that runs."""
    runner = get_forward_context().no_compile_layers[name]
    y: Tensor = runner.routed_experts.quant_method.run(x, weights, index)
    return y


@serve_experts.register_fake
def _(x: Tensor, weights: Tensor, index: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)
