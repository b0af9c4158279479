"""Low-rank corrections that are trained while the packed weight stays as it is.

Gradients reach the factors, and what lies before the layer, through the packed weight's own kernel, and an optimizer
keeps state for the factors alone (INT2.1, arXiv 2306.08162: LoRA's adapters over packed weights).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.core.errors import QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.low_rank import LowRankWeight, stored_factors
from quantkit.formats.rotated import RotatedWeight
from quantkit.formats.scaled import ScaledWeight
from quantkit.io.hf import attach
from quantkit.kernels.hadamard import rotate
from quantkit.models.embedding import QuantizedEmbedding
from quantkit.models.linear import Packed, QuantizedLinear, put_in_places
from quantkit.tuning.parts.base import Coded


class AdaptedLinear(nn.Module):
    """A packed linear layer with a trainable correction: y = x W^T + (x down^T) up^T + b.

    In a state dict it is what it will be: a weight of format `low_rank`, its factors in fp16.

    Args:
        weight: whose correction is trained, on from its present value.
        bias: [out_features] or None; stays.
    """

    def __init__(self, weight: LowRankWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.base = QuantizedLinear(weight.base)
        up, down = weight.factors()
        self.up, self.down = nn.Parameter(up.clone()), nn.Parameter(down.clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype."""
        return self.base.packed.matmul(x, self.bias, self.up.to(x.dtype), self.down.to(x.dtype))

    @property
    def packed(self) -> LowRankWeight:
        """The weight with its correction as it is now."""
        return LowRankWeight(self.base.packed, _stored(self.up), _stored(self.down))

    @property
    def metadata(self) -> dict[str, Any]:
        """Of `packed`, as `Packed` has it."""
        return self.packed.metadata()

    @property
    def weight(self) -> Tensor:
        """The weight, fp32 [out_features, in_features], for model code that looks at it; writes change nothing."""
        return self.packed.dequantize()

    def open(self) -> None:
        """See `Tuned`: the factors are used as they are."""

    def close(self) -> None:
        """See `Tuned`."""

    def gradients(self) -> Iterator[Tensor]:
        """See `Tuned`: fp32 [out_features, rank] and [rank, in_features]."""
        for factor in (self.up, self.down):
            if factor.grad is None:
                factor.grad = torch.zeros_like(factor)
            yield factor.grad

    def continuous(self) -> Iterator[tuple[nn.Parameter, float]]:
        """See `Tuned`; a factor of zeros counts as large as the other."""
        sizes = [float(factor.detach().square().mean().sqrt()) for factor in (self.up, self.down)]
        yield self.up, sizes[0] or sizes[1]
        yield self.down, sizes[1] or sizes[0]

    def coded(self) -> Iterator[Coded]:
        """See `Tuned`: codes stay."""
        yield from ()

    def state(self) -> Iterator[Tensor]:
        """See `Tuned`."""
        yield from (self.up, self.down)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("up", "down"):
            destination[prefix + name] = _stored(destination[prefix + name])

    def extra_repr(self) -> str:
        """Shape and rank."""
        return f"{self.in_features}, {self.out_features}, rank={self.up.shape[1]}, bias={self.bias is not None}"


def _saved_once(model: nn.Module, state: dict[str, Any], prefix: str, _local: Any) -> None:
    """Gives a layer that is at several places, as in blocks that share it, the same tensors at all of them."""
    first: dict[AdaptedLinear, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdaptedLinear) and (known := first.setdefault(module, name)) != name:
            for factor in ("up", "down"):
                state[f"{prefix}{name}.{factor}"] = state[f"{prefix}{known}.{factor}"]


def _stored(factor: Tensor) -> Tensor:
    return factor.detach().clamp(-65504, 65504).half()


def finetune(model: PreTrainedModel, rank: int = 16, *, seed: int = 0) -> PreTrainedModel:
    """Makes a packed model trainable, in place: low-rank corrections learn, everything else is frozen.

    Any training loop will do, transformers' Trainer among them. `save_pretrained`, and so Trainer's checkpoints, writes
    a packed checkpoint with the corrections as they are then, which `quantkit.load` reads.

    Args:
        model: as `quantkit.load` or `quantkit.quantize` gives it.
        rank: of the corrections of layers that have none; they begin at zero.
        seed: of those corrections' random factor.

    Returns:
        The same model. `quantkit.finished` makes its layers ordinary packed ones again.

    Raises:
        QuantkitError: no packed layers, or a rank below 1.
    """
    if rank < 1:
        raise QuantkitError(f"rank={rank}: a correction has a rank of at least 1")
    packed = packed_linears(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    adapted = {
        name: AdaptedLinear(_with_correction(linear.packed, rank, generator), linear.bias)
        for name, linear in packed.items()
    }
    put_in_places(model, adapted)
    if _saved_once not in model._state_dict_hooks.values():
        model.register_state_dict_post_hook(_saved_once)
    attach(model, dict(_metadata(model)), trainable=True)
    return model


def finished(model: PreTrainedModel) -> PreTrainedModel:
    """Ends `finetune`, in place: corrections become part of the packed weights."""
    trained = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    put_in_places(model, {name: QuantizedLinear(one.packed, one.bias) for name, one in trained.items()})
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    attach(model, dict(_metadata(model)))
    return model


def packed_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The packed linear layers by name, each with tensors of its own; a head that is the embedding too stays as it is.

    Raises:
        QuantkitError: there is none, they are being trained already, or peft's adapters sit on them.
    """
    adapted = [name for name, _ in model.named_modules() if name.endswith(".base_layer")]
    if adapted:
        raise QuantkitError(f"{adapted[0].removesuffix('.base_layer')} has an adapter; merge_and_unload() first")
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise QuantkitError("the model's corrections are being trained already; quantkit.finished(model) ends that")
    shared = [module.head for module in model.modules() if isinstance(module, QuantizedEmbedding)]
    packed = {
        name: module for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and module not in shared
    }  # fmt: skip
    if not packed:
        raise QuantkitError("the model has no packed layers; quantize it first")
    for module in packed.values():
        module.unshare()
    return packed


def correction_outside(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight with its correction, if it has one inside a rotation or a factor, in front of them.

    R_out^T (W' + U D) R_in = R_out^T W' R_in + (R_out^T U) (D R_in),    f (W' + U D) = f W' + (f U) D
    """
    if not isinstance(weight, RotatedWeight | ScaledWeight):
        return weight
    inner = correction_outside(weight.base)
    if not isinstance(inner, LowRankWeight):
        return weight
    up, down = inner.factors()
    if isinstance(weight, ScaledWeight):
        up = up * weight.factor
    else:
        up, down = weight.outputs_back(up.T).T, rotate(down, weight.in_signs, True)
    return LowRankWeight(replace(weight, base=inner.base), *stored_factors(up, down))


def _with_correction(weight: QuantizedWeight, rank: int, generator: torch.Generator) -> LowRankWeight:
    weight = correction_outside(weight)
    if isinstance(weight, LowRankWeight):
        return weight
    out_features, in_features = weight.shape
    rank = min(rank, out_features, in_features)
    device = next(iter(weight.state().values())).device
    down = torch.randn(rank, in_features, generator=generator) / in_features**0.5
    return LowRankWeight(weight, torch.zeros(out_features, rank, device=device).half(), down.half().to(device))


def _metadata(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Packed | AdaptedLinear) and not name.startswith(inside):
            yield name, module.metadata
            inside = (*inside, f"{name}.")
