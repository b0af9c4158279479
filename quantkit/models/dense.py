"""A packed model made dense again: its packed layers become what they were, with the weights that they stand for."""

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantkit.core.errors import QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.models.experts import put_together, take_apart


@torch.no_grad()
def make_dense(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Makes a packed model dense, in place, one layer after the other.

    Args:
        model: with packed layers, also such whose corrections are being trained.
        dtype: of its weights afterwards.

    Raises:
        QuantkitError: tensors are not in memory, or peft's adapters sit on packed layers.
    """
    packed: dict[str, Any] = {}  # where a layer is called at several places, at all of them
    outer = "."
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_packed(module) and not name.startswith(outer):
            packed[name], outer = module, f"{name}."
    for name, module in packed.items():
        if name.endswith(".base_layer"):
            raise QuantkitError(f"{name.removesuffix('.base_layer')} has an adapter; merge_and_unload() first")
        if any(tensor.is_meta for tensor in module.buffers()):
            raise QuantkitError(f"{name} is offloaded; load the model so that all of it is in memory")
    before = model.dtype
    names = {module: name for name, module in reversed(packed.items())}
    tied = {name: names[module.head] for name, module in packed.items() if getattr(module, "head", None) is not None}
    blank = _blank(model, dtype)
    for name, module in packed.items():
        if names[module] != name:
            model.set_submodule(name, model.get_submodule(names[module]))
            continue
        layer = blank.get_submodule(name)
        if name not in tied:
            weight = module.packed.dequantize(dtype)
            layer.weight = _parameter(weight.T if isinstance(layer, Conv1D) else weight)
            if getattr(module, "bias", None) is not None:
                layer.bias = _parameter(module.bias.to(dtype))
            for own, buffer in layer.named_buffers():  # such as an embedding's factor
                layer.register_buffer(own, buffer.to(weight.device), persistent=False)
        model.set_submodule(name, layer.train(module.training))
    for name, head in tied.items():
        model.get_submodule(name).weight = model.get_submodule(head).weight
    if tied:  # which packing ended
        model.config.tie_word_embeddings = True
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    put_together(model, ())
    if dtype != before:
        _cast(model, before, dtype)


def _cast(model: PreTrainedModel, before: torch.dtype, after: torch.dtype) -> None:
    """Changes the type of what has the model's, as loading does: not of tables of angles, nor of what stays in fp32."""
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.dtype == before and not any(part in name for part in kept):
            tensor.data = tensor.data.to(after)


def _is_packed(module: nn.Module) -> bool:
    """Whether a module computes by a packed weight, `models.linear.Packed` or one that trains its correction."""
    return isinstance(getattr(module, "packed", None), QuantizedWeight)


def _blank(model: PreTrainedModel, dtype: torch.dtype) -> nn.Module:
    """The dense model without its numbers, experts taken apart; buffers have theirs."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with init_empty_weights(include_buffers=False):
        blank: PreTrainedModel = type(model)._from_config(config, dtype=dtype)
    take_apart(blank)
    return blank


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=True)
