"""MLX's affine form: codes as a stream of bits a row, a scale and an offset for each group."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import QuantkitError
from quantkit.io.shards import Shards
from quantkit.io.stored.matrix import Numbers, Quantized, of_numbers, places, stream, with_offsets


def mlx(shards: Shards, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """Layers, embeddings among them, of one width or of several, which config.json names."""
    found = {}
    for place, names in places(shards, ".scales", ".weight", ".biases").items():
        own = config.get(place)
        said = {**config, **own} if isinstance(own, Mapping) else config
        if said.get("mode", "affine") != "affine":
            raise QuantkitError(
                f"{place} is stored in MLX's mode {said['mode']!r}, and quantkit reads affine ones; give the "
                "full-precision model"
            )
        shape, bits, size = shards.specs[names[".weight"]][1], int(said["bits"]), int(said["group_size"])
        if len(shape) != 2:
            raise QuantkitError(f"{place} holds experts in one tensor of MLX's; give the full-precision model")
        rows, columns = shape[0], shape[1] * 32 // bits
        if shards.specs[names[".scales"]][1] != [rows, columns // size]:
            raise ValueError(f"{place}: {shards.specs[names['.scales']][1]} scales for {rows} x {columns}")

        def numbers(p: Mapping[str, Tensor], bits: int = bits, size: int = size, columns: int = columns) -> Numbers:
            codes = stream(p[".weight"].view(torch.int32), bits, columns)
            scales, offsets = p[".scales"].float(), p[".biases"].float()
            return with_offsets(codes, scales, offsets, torch.arange(columns) // size, bits)

        found[f"{place}.weight"] = of_numbers(names, (rows, columns), numbers)
    return found
