"""bitsandbytes' 4 and 8 bits."""

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.io.shards import Shards
from quantkit.io.stored.matrix import Quantized, places

_STATE = ".quant_state.bitsandbytes__"
"""In the name of the tensor that holds JSON of a 4-bit matrix: its shape and its blocks' sizes."""


def bitsandbytes(shards: Shards, _config: Mapping[str, Any]) -> dict[str, Quantized]:
    """4 bits (NF4, FP4) in blocks of a matrix laid out flat, whose factors may be 8-bit codes themselves; 8 by row."""
    found = {}
    states = [name for name in shards.specs if _STATE in name]
    for state, text in shards.read(states):
        said = json.loads(bytes(text.tolist()))
        place = state.partition(_STATE)[0]
        factors = ("absmax", "nested_absmax", "nested_quant_map") if "nested_blocksize" in said else ("absmax",)
        parts = {part: f"{place}.{part}" for part in (*factors, "quant_map")} | {"weight": place, "state": state}
        shape = tuple(int(size) for size in said["shape"])
        held = {part: math.prod(shards.specs[name][1]) for part, name in parts.items()}
        size = math.prod(shape)
        if (held["weight"], held["absmax"]) != (-(-size // 2), -(-size // int(said["blocksize"]))):
            raise ValueError(f"{held['weight']} bytes and {held['absmax']} factors for {list(shape)}")
        found[place] = Quantized(parts, shape, partial(_of_flat_blocks, said))
    for place, names in places(shards, ".SCB", ".weight", ".weight_format").items():
        weight = names[".weight"]
        found[weight] = Quantized(names, tuple(shards.specs[weight][1]), partial(_of_rows, place))
    return found


def _of_flat_blocks(said: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    factors, size = parts["absmax"], math.prod(said["shape"])
    if "nested_blocksize" in said:
        outer = parts["nested_absmax"].repeat_interleave(int(said["nested_blocksize"]))[: len(factors)]
        factors = parts["nested_quant_map"][factors.long()] * outer + float(said["nested_offset"])
    codes = parts["weight"].flatten()
    values = parts["quant_map"][torch.stack([codes >> 4, codes & 15], -1).flatten()[:size].long()]
    return (values * factors.repeat_interleave(int(said["blocksize"]))[:size]).view(*said["shape"])


def _of_rows(place: str, parts: Mapping[str, Tensor]) -> Tensor:
    if ".weight_format" in parts and int(parts[".weight_format"]):
        raise ValueError(f"{place} is laid out for one kind of GPU")
    return parts[".weight"].float() * parts[".SCB"].float().view(-1, 1) / 127
