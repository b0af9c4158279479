"""MLX's affine form, which mlx-lm reads: codes at their own width, a scale and an offset a group."""

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantkit.core.errors import QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.exchange.integers import factor_of, grid, is_ordered
from quantkit.exchange.packed import DENSE, PackedFolder
from quantkit.exchange.target import FolderTarget
from quantkit.exchange.whole_numbers import scales_dtype
from quantkit.io.stored.mlx import stacked
from quantkit.kernels.bitpack import unpack
from quantkit.kernels.int_group_layout import STORED, middle
from quantkit.models.experts import number_of, place

logger = logging.getLogger(__name__)

_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)
_REMADE = ("kv_b_proj",)
"""Layers that mlx-lm takes apart when it loads them, and rounds anew: they become dense."""
_TRIED = {
    "gemma3_text", "glm4_moe", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "deepseek_v3",
}  # fmt: skip
"""Types of models that mlx-lm has run from such a folder, to the same numbers."""


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
        self.refuse_nothing()
        self.check_experts(_form)
        kind = str(packed.model.config.model_type)
        turned = [
            name for unit in packed.units for name, value in packed.described(unit).items() if _is_turned(name, value)
        ]
        if turned:
            raise QuantkitError(
                f"{turned[0]} is a convolution, which mlx-lm has in another order in {kind}; {DENSE}, which its own "
                "mlx_lm.convert takes"
            )
        if kind not in _TRIED:
            logger.warning("mlx-lm has not been tried here with models of type %s; compare what it predicts", kind)

    def holds(self, layer: str) -> bool:
        """Layers outside of the blocks become dense where the form does not hold them."""
        if layer.rpartition(".")[2] in _REMADE:
            return False
        return self.packed.inside(layer) or not self.refusal(layer, self.packed.layers[layer])

    def refusal(self, name: str, weight: QuantizedWeight) -> str:
        """See `Target`."""
        own = grid(weight)
        if own is None or is_ordered(weight):
            return f"{weight.label}; it holds codes with scales (`--method gptq` or `rtn`), and {DENSE}"
        if not self.packed.places[name]:
            return f"experts that the model's files have all in one tensor; {DENSE}"
        if not isinstance(self.packed.model.get_submodule(name), nn.Linear | nn.Embedding):
            return f"layers such as {type(self.packed.model.get_submodule(name)).__name__}; {DENSE}"
        if own.bits not in _BITS:
            return f"codes of {own.bits} bits; it has {', '.join(map(str, _BITS))}, and {DENSE}"
        columns = own.in_features
        group = min(own.group_size, columns)
        if group not in _GROUPS or columns % group:
            known = ", ".join(map(str, _GROUPS))
            return f"groups of {group} of {columns} inputs; it has {known}, which divide the inputs, and {DENSE}"
        return ""

    def tensors(self, name: str, weight: QuantizedWeight) -> tuple[dict[str, Tensor], Tensor]:
        """See `Target`."""
        own = grid(weight)
        assert own is not None
        codes = unpack(own.codes, own.bits, own.in_features)
        scales = factor_of(weight) * own.scales.float().T
        zeros: Tensor | float = middle(own.bits, own.zero)
        if own.zeros is not None and own.zero == STORED:
            zeros = own.zeros.float().T
        stored, offsets = self.cast(f"{name}'s scales", scales), self.cast(f"{name}'s offsets", -zeros * scales)
        group = torch.arange(own.in_features) // own.group_size
        read = codes.float() * stored.float()[:, group] + offsets.float()[:, group]
        parts = {"weight": _stream(codes, own.bits), "scales": stored, "biases": offsets}
        tensors = {
            f"{called}.{part}": tensor[outputs].contiguous()
            for called, outputs in self.packed.places[name]
            for part, tensor in parts.items()
        }
        return tensors, read

    def arranged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `FolderTarget`: the experts of a block are stacked."""
        stacks: dict[str, dict[int, Tensor]] = {}
        for name in [name for name in tensors if place(name) is not None]:
            stacks.setdefault(stacked(name), {})[number_of(name)] = tensors.pop(name)
        return tensors | {
            name: torch.stack([parts[number] for number in sorted(parts)]) for name, parts in stacks.items()
        }

    def config(self) -> dict[str, Any]:
        """The model's, with the bits and groups of each layer that differs from most."""
        forms: dict[str, tuple[int, int]] = {}
        for name, weight in self._held():
            forms |= {stacked(called): _form(weight) for called, _ in self.packed.places[name]}
        counted = [*forms.values()]
        usual = max(counted, key=counted.count)
        said: dict[str, Any] = {"group_size": usual[0], "bits": usual[1], "mode": "affine"}
        said |= {name: {"group_size": form[0], "bits": form[1]} for name, form in forms.items() if form != usual}
        dtype = str(self.dtype).removeprefix("torch.")
        own = _with_older_keys(self.packed.config())
        return own | {"dtype": dtype, "quantization": said, "quantization_config": said}


def _with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what transformers calls otherwise since 5, and mlx-lm does not: without, it takes its defaults.

    Those are the base of rotary positions and how they are scaled, Gemma's local layers', and the number of experts.
    """
    found = dict(config)
    if isinstance(found.get("text_config"), dict):
        found["text_config"] = _with_older_keys(found["text_config"])
    if "num_local_experts" in found:
        found.setdefault("num_experts", found["num_local_experts"])
    said = found.get("rope_parameters") or {}
    local, rope = said.get("sliding_attention") or {}, dict(said.get("full_attention") or said)
    theta, kind = rope.pop("rope_theta", None), rope.get("rope_type", "default")
    if theta is None:
        return found
    found.setdefault("rope_theta", theta)
    found.setdefault("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    found.setdefault("rope_scaling", None if kind == "default" else rope | {"type": kind})
    if "rope_theta" in local:
        found.setdefault("rope_local_base_freq", local["rope_theta"])
    return found


def _form(weight: QuantizedWeight) -> tuple[int, int]:
    """Weights of a group, and bits."""
    own = grid(weight)
    assert own is not None
    return own.group_size, own.bits


def _is_turned(name: str, value: QuantizedWeight | Tensor) -> bool:
    """Whether a tensor is a convolution's over positions, [channels, 1, positions]."""
    return "conv" in name and isinstance(value, Tensor) and value.dim() == 3


def _stream(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [rows, columns] as one stream of bits a row, the lowest first: uint32 [rows, columns * bits / 32]."""
    shifts = torch.arange(bits, dtype=torch.uint8)
    single = (codes.unsqueeze(2) >> shifts & 1).flatten(1).view(len(codes), -1, 8)
    octets = (single << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)
    return octets.contiguous().view(torch.uint32)
