"""MLX's affine form, which mlx-lm reads: codes at their own width, a scale and an offset a group."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantkit.core.weight import QuantizedWeight
from quantkit.exchange.packed import DENSE, PackedFolder
from quantkit.exchange.target import FolderTarget
from quantkit.exchange.whole_numbers import scales_dtype
from quantkit.formats.int_group import IntGroupWeight
from quantkit.kernels.bitpack import unpack
from quantkit.kernels.int_group_layout import STORED, middle
from quantkit.models.experts import place

_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)


class MLX(FolderTarget):
    """weight = scale * code + offset, in groups of 32, 64 or 128; any zero is an offset, rounded to the type asked for.

    Args:
        packed: see `Target`.
        dtype: of scales, offsets and dense weights: `scales_dtype` where none is given; fp32 keeps all offsets exactly.
    """

    name: ClassVar[str] = "mlx"
    outer: ClassVar[bool] = True

    def __init__(self, packed: PackedFolder, dtype: torch.dtype | None = None) -> None:
        super().__init__(packed, dtype or scales_dtype(packed))

    def holds(self, layer: str) -> bool:
        """Layers outside of the blocks become dense where the form does not hold them."""
        return self.packed.inside(layer) or not self.refusal(layer, self.packed.layers[layer])

    def refusal(self, name: str, weight: QuantizedWeight) -> str:
        """See `Target`."""
        if not isinstance(weight, IntGroupWeight):
            return f"{weight.label}; it holds codes with scales (`--method gptq` or `rtn`), and {DENSE}"
        if place(name) is not None:
            return f"experts one by one; `--to compressed-tensors` has them, and {DENSE}"
        if not isinstance(self.packed.model.get_submodule(name), nn.Linear | nn.Embedding):
            return f"layers such as {type(self.packed.model.get_submodule(name)).__name__}; {DENSE}"
        if weight.bits not in _BITS:
            return f"codes of {weight.bits} bits; it has {', '.join(map(str, _BITS))}, and {DENSE}"
        columns = weight.shape[1]
        group = min(weight.group_size, columns)
        if group not in _GROUPS or columns % group:
            known = ", ".join(map(str, _GROUPS))
            return f"groups of {group} of {columns} inputs; it has {known}, which divide the inputs, and {DENSE}"
        return ""

    def tensors(self, name: str, weight: QuantizedWeight) -> tuple[dict[str, Tensor], Tensor]:
        """See `Target`."""
        assert isinstance(weight, IntGroupWeight)
        codes = unpack(weight.codes, weight.bits, weight.in_features)
        scales = weight.scales.float().T
        zeros: Tensor | float = middle(weight.bits, weight.zero)
        if weight.zeros is not None and weight.zero == STORED:
            zeros = weight.zeros.float().T
        stored, offsets = self.cast(f"{name}'s scales", scales), self.cast(f"{name}'s offsets", -zeros * scales)
        group = torch.arange(weight.in_features) // weight.group_size
        read = codes.float() * stored.float()[:, group] + offsets.float()[:, group]
        tensors = {"weight": _stream(codes, weight.bits), "scales": stored, "biases": offsets}
        called = self._stored(name)
        return {f"{called}.{part}": tensor.contiguous() for part, tensor in tensors.items()}, read

    def config(self) -> dict[str, Any]:
        """The model's, with the bits and groups of each layer that differs from most."""
        forms = {
            name: (weight.group_size, weight.bits)
            for name, weight in self._held()
            if isinstance(weight, IntGroupWeight)
        }
        counted = [*forms.values()]
        usual = max(counted, key=counted.count)
        said: dict[str, Any] = {"group_size": usual[0], "bits": usual[1], "mode": "affine"}
        said |= {
            self._stored(name): {"group_size": form[0], "bits": form[1]}
            for name, form in forms.items()
            if form != usual
        }
        dtype = str(self.dtype).removeprefix("torch.")
        return self.packed.config() | {"dtype": dtype, "quantization": said, "quantization_config": said}

    def _stored(self, layer: str) -> str:
        """A layer's name as it is stored."""
        ((name, _),) = self.packed.places[layer]
        return name


def _stream(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [rows, columns] as one stream of bits a row, the lowest first: uint32 [rows, columns * bits / 32]."""
    shifts = torch.arange(bits, dtype=torch.uint8)
    single = (codes.unsqueeze(2) >> shifts & 1).flatten(1).view(len(codes), -1, 8)
    octets = (single << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)
    return octets.contiguous().view(torch.uint32)
