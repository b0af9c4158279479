"""Floating-point numbers of 8 and 4 bits with factors: FP8 by blocks and by rows, MXFP4."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.io.shards import Shards
from quantkit.io.stored.matrix import Quantized, places, with_inputs

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of E2M1's codes."""


def fp8(shards: Shards, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """E4M3 with a factor for each block of a weight, or for all of it."""
    block = config.get("weight_block_size")
    block = None if block is None else [int(size) for size in block]
    found = {}
    for place, names in places(shards, "_scale_inv", "").items():
        parts = {"weight": names[""], "scale": names["_scale_inv"]}
        found[place] = Quantized(parts, tuple(shards.specs[place][1]), partial(_of_blocks, block))
    return with_inputs(found, shards, ".activation_scale")


def _of_blocks(block: list[int] | None, parts: Mapping[str, Tensor]) -> Tensor:
    weight, scale = parts["weight"], parts["scale"]
    scale = _exponents(scale) if scale.dtype == torch.uint8 else scale.float()
    if scale.numel() > 1:
        if block is None:
            raise ValueError("several factors, and no weight_block_size")
        rows, columns = weight.shape[-2:]
        if scale.shape[-2:] != (-(-rows // block[0]), -(-columns // block[1])):
            raise ValueError(f"factors {list(scale.shape)} for blocks of {block}")
        scale = scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return weight.float() * scale


def _exponents(scale: Tensor) -> Tensor:
    """Powers of two that are stored as their biased exponents."""
    return torch.exp2(scale.float() - 127)


def fbgemm(shards: Shards, _config: Mapping[str, Any]) -> dict[str, Quantized]:
    """E4M3 with a factor for each row."""
    return {
        names[".weight"]: Quantized(
            {"weight": names[".weight"], "scale": names[".weight_scale"]}, tuple(shards.specs[names[".weight"]][1]),
            lambda p: p["weight"].float() * p["scale"].float(),
        )
        for names in places(shards, ".weight_scale", ".weight").values()
    }  # fmt: skip


def mxfp4(shards: Shards, _config: Mapping[str, Any]) -> dict[str, Quantized]:
    """E2M1 with a power of two for each 32, of stacked experts whose matrices are transposed."""
    found = {}
    for place, names in places(shards, "_blocks", "_scales").items():
        *stack, rows, groups, half = shards.specs[names["_blocks"]][1]
        parts = {"codes": names["_blocks"], "scale": names["_scales"]}
        found[place] = Quantized(parts, (*stack, groups * half * 2, rows), _of_fp4)
    return found


def _of_fp4(parts: Mapping[str, Tensor]) -> Tensor:
    codes = parts["codes"]
    values = torch.tensor(_FP4)[torch.stack([codes & 15, codes >> 4], -1).long()].flatten(-2)
    return (values * _exponents(parts["scale"])[..., None]).flatten(-2).transpose(-1, -2)
