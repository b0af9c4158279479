"""MLX's affine form: codes as a stream of bits a row, a scale and an offset for each group; experts in stacks."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import QuantkitError
from quantkit.io.shards import Shards
from quantkit.io.stored.matrix import Numbers, Quantized, of_numbers, places, stream, with_offsets
from quantkit.models.experts import place

_STACK = ".switch_mlp."
"""In the names of experts' stacks."""
_FLOATS = ("BF16", "F16", "F32")
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""How Mixtral's own files call an expert's layers."""
_OF_MIXTRAL = {own: name for name, own in _MIXTRAL.items()}


def stacked(name: str) -> str:
    """The name that MLX has for a tensor or a layer of other programs' files: an expert's is that of a stack."""
    of_expert = place(name)
    if of_expert is None:
        return name
    layer, dot, part = of_expert[2].partition(".")
    return f"{of_expert[0].rpartition('.')[0]}{_STACK}{_OF_MIXTRAL.get(layer, layer)}{dot}{part}"


def mlx(shards: Shards, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """Layers, embeddings among them, of one width or of several, which config.json names; experts one by one."""
    found = {}
    for layer, names in places(shards, ".scales", ".weight", ".biases").items():
        own = config.get(layer)
        said = {**config, **own} if isinstance(own, Mapping) else config
        if said.get("mode", "affine") != "affine":
            raise QuantkitError(
                f"{layer} is stored in MLX's mode {said['mode']!r}, and quantkit reads affine ones; give the "
                "full-precision model"
            )
        names = {part: names[part] for part in (".weight", ".scales", ".biases")}
        (kind, [*stack, rows, words]), (of_scales, scales), (of_biases, biases) = (
            shards.specs[name] for name in names.values()
        )
        bits, size = int(said["bits"]), int(said["group_size"])
        columns = words * 32 // bits
        right = kind == "U32" and of_scales in _FLOATS and of_biases in _FLOATS and bits == said["bits"]
        if not right or not scales == biases == [*stack, rows, columns // size]:
            raise ValueError(
                f"{layer}: {bits} bits in groups of {size} for {kind} {[*stack, rows, words]}, scales {scales}"
            )
        for number, name in enumerate(_names(layer, stack)):
            made = partial(_numbers, number if stack else None, bits, size, columns)
            found[f"{name}.weight"] = of_numbers(names, (rows, columns), made)
    for name in shards.specs:
        if _STACK in name and name.endswith(".weight") and f"{name.removesuffix('.weight')}.scales" not in shards.specs:
            count, rows, columns = shards.specs[name][1]
            for number, one in enumerate(_names(name.removesuffix(".weight"), [count])):
                found[f"{one}.weight"] = Quantized({"weight": name}, (rows, columns), partial(_of_stack, number))
    return found


def _of_stack(expert: int, parts: Mapping[str, Tensor]) -> Tensor:
    return parts["weight"][expert].float()


def _names(layer: str, stack: Sequence[int]) -> list[str]:
    """As other programs' files call a layer, or each expert's of a stack: `stacked`, backwards.

    Raises:
        QuantkitError: it is a stack of something else.
    """
    if not stack:
        return [layer]
    block, found, what = layer.partition(_STACK)
    if not found or len(stack) > 1:
        raise QuantkitError(
            f"{layer} is a tensor of {len(stack) + 2} dimensions that mlx-lm makes of others, and not one of those "
            "that quantkit knows; give the full-precision model"
        )
    named = _MIXTRAL.get(what, what) if block.endswith("block_sparse_moe") else what
    return [f"{block}.experts.{number}.{named}" for number in range(stack[0])]


def _numbers(expert: int | None, bits: int, size: int, columns: int, parts: Mapping[str, Tensor]) -> Numbers:
    codes, scales, offsets = (
        parts[what] if expert is None else parts[what][expert] for what in (".weight", ".scales", ".biases")
    )
    group = torch.arange(columns) // size
    return with_offsets(stream(codes.view(torch.int32), bits, columns), scales.float(), offsets.float(), group, bits)
