"""LoRA adapters of the peft library on packed layers.

peft wraps a QuantizedLinear as it wraps any nn.Linear: y = W x + s B (A x), trained, saved and loaded by peft's own
calls. Only merging is done here, since a packed weight cannot take s B A up: it gets one more low-rank correction,

    W' = W + (s B) A,    up = s B,    down = A    (`formats.low_rank`),

in fp16, counted in the bits of the layer and saved with it. A merge is undone exactly: the former weight is kept, whose
tensors are those of the new one.

Imported as soon as peft's LoRA is (`quantkit.core.post_import`), so that peft makes layers of this kind. Without that,
should peft look otherwise one day, its own layers adapt packed ones, and refuse to merge: see `linear.read_only`.
"""

from copy import copy
from functools import wraps
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from quantkit.core.errors import QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.low_rank import plus
from quantkit.models.linear import QuantizedLinear


class PackedLoraLinear(Linear):
    """peft's adapters of a QuantizedLinear; by its name peft knows that it stands for a linear layer."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        config = copy(config)
        config.fan_in_fan_out = False  # as GPT-2's may ask for; packed weights are [out_features, in_features]
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self._former: list[tuple[QuantizedWeight, Tensor | None]] = []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the packed weight; see `Linear.merge`.

        Raises:
            QuantkitError: an adapter that is no plain LoRA, holds NaN, or sits on a head that is the embedding too.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                self._merge_one(name)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Puts back the packed weight from before all merges."""
        if not self.merged:
            super().unmerge()  # which warns
            return
        base = self._base
        device = base.qweight.device  # to which the model may have been moved since
        weight, bias = self._former[0]
        base.become(weight.map(lambda tensor: tensor.to(device)))
        base.settle()
        if bias is not None and base.bias is not None:
            base.bias.data = bias.to(base.bias)
        self._former.clear()
        self.merged_adapters.clear()

    @torch.no_grad()
    def _merge_one(self, name: str) -> None:
        base = self._base
        if name in self.lora_variant:
            kind = type(self.lora_variant[name]).__name__.removesuffix("LinearVariant")
            raise QuantkitError(f"adapter {name!r} is {kind}, and packed layers take up plain LoRA; keep it unmerged")
        if base.looked_up:
            raise QuantkitError(
                f"adapter {name!r} sits on a head whose packed weight is the input embedding's too; keep it unmerged"
            )
        lora_a, lora_b = self.lora_A[name], self.lora_B[name]
        if self.lora_bias[name] and base.bias is None:
            raise QuantkitError(f"adapter {name!r} has a bias, and the packed layer none; keep it unmerged")
        base.unshare()  # of a fused weight, of which other layers have parts
        former = base.packed, None if base.bias is None else base.bias.detach().clone()
        device = base.qweight.device
        up, down = (cast(Tensor, layer.weight).float().to(device) for layer in (lora_b, lora_a))
        weight = plus(former[0], self.scaling[name] * up, down)
        self._former.append(former)
        base.become(weight)
        base.settle()
        if self.lora_bias[name] and base.bias is not None:
            base.bias.data = (base.bias + self.scaling[name] * lora_b.bias).to(base.bias)

    @property
    def _base(self) -> QuantizedLinear:
        base = self.get_base_layer()
        assert isinstance(base, QuantizedLinear)
        return base

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, QuantizedLinear)
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        assert isinstance(base_layer, QuantizedLinear)
        return base_layer.qweight.device, torch.float32  # the weight's, without unpacking it


def _made_for_packed_layers() -> None:
    """Has peft make this module's layers for packed ones."""
    make = LoraModel._create_new_module

    @wraps(make)
    def create(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        """peft's factory, which makes PackedLoraLinears for packed layers."""
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, QuantizedLinear) and kwargs.get("parameter_name") is None:
            return PackedLoraLinear(target, adapter_name, config=lora_config, **kwargs)
        made: nn.Module = make(lora_config, adapter_name, target, **kwargs)
        return made

    LoraModel._create_new_module = staticmethod(create)  # type: ignore[method-assign]


_made_for_packed_layers()
