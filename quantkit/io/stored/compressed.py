"""compressed-tensors' integers and E4M3."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import QuantkitError
from quantkit.io.shards import Shards
from quantkit.io.stored.matrix import Numbers, Quantized, check_words, of_numbers, places, stream, with_inputs

_FACTS = ("num_bits", "strategy", "group_size", "symmetric")


def compressed(shards: Shards, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """compressed-tensors' packed and plain integers and E4M3, with factors by group, row or tensor."""
    groups, found = [*config["config_groups"].values()], dict[str, Quantized]()
    targets = [_Targets(group.get("targets") or ()) for group in groups]
    told = shards.read([name for name in shards.specs if name.endswith(".weight_shape")])
    shapes = {name: tuple(map(int, shape.tolist())) for name, shape in told}
    for place, names in places(
        shards, ".weight_scale", ".weight", ".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx",
        ".weight_global_scale",
    ).items():  # fmt: skip
        named = [group for group, own in zip(groups, targets, strict=True) if own.name(place)]
        kinds = {tuple(one["weights"].get(fact) for fact in _FACTS) for one in named or groups}
        strategies, symmetric = {kind[1] for kind in kinds}, all(kind[3] is not False for kind in kinds)
        if ".weight_global_scale" in names or not strategies <= {"group", "channel", "tensor"}:
            raise QuantkitError(
                f"{place} is stored in a form of compressed-tensors that quantkit does not read (NVFP4, or by block); "
                "give the full-precision model"
            )
        if len(kinds) == 1 and not symmetric and ".weight_zero_point" not in names:
            raise KeyError(f"{place}.weight_zero_point")
        if ".weight_packed" in names:
            words = shards.specs[names[".weight_packed"]][1][1]
            rows, columns = shapes.get(names.get(".weight_shape", ""), (0, 0))
            bits = next((b for b in sorted({int(kind[0]) for kind in kinds}) if _fits(words, columns, b)), 0)
            check_words(shards, names[".weight_packed"])
            if not bits:
                raise ValueError(f"{place}: {words} words for {columns} columns")
            _check_scales(shards.specs[names[".weight_scale"]][1], rows, columns, kinds)
            found[f"{place}.weight"] = of_numbers(names, (rows, columns), partial(_of_packed, bits, columns))
        elif ".weight" in names:
            kind, sizes = shards.specs[names[".weight"]]
            made = partial(_of_groups, 8)
            shape = tuple(sizes)
            found[f"{place}.weight"] = (
                of_numbers(names, shape, made) if kind == "I8" else Quantized(names, shape, _of_floats)
            )
    return with_inputs(found, shards, ".input_scale")


class _Targets:
    """What a group of config.json is for: names of layers, patterns, and names of classes, which are left out here."""

    def __init__(self, given: Iterable[Any]) -> None:
        self._exact = {*map(str, given)}
        try:
            self._patterns = [re.compile(target[3:]) for target in self._exact if target.startswith("re:")]
        except re.error as error:
            raise ValueError(f"{error} in a target") from error

    def name(self, layer: str) -> bool:
        """Whether they name a layer itself."""
        return layer in self._exact or any(pattern.match(layer) for pattern in self._patterns)


def _check_scales(shape: Sequence[int], rows: int, columns: int, kinds: Collection[tuple[Any, ...]]) -> None:
    """Raises ValueError where factors are not one for all, for each row, or for each group of each row."""
    size = int(next(iter(kinds))[2] or 0) if len(kinds) == 1 else 0
    by_group = {kind[1] for kind in kinds} == {"group"} and size > 0
    wanted = [[rows, -(-columns // size)]] if by_group else [[rows], [rows, 1], [1], [1, 1], []]
    if (by_group or len(kinds) == 1) and list(shape) not in wanted:
        raise ValueError(f"factors {list(shape)} for {rows} x {columns}")
    if len(kinds) > 1 and shape and math.prod(shape) > 1 and shape[0] != rows:
        raise ValueError(f"factors {list(shape)} for {rows} rows")


def _fits(words: int, columns: int, bits: int) -> bool:
    """Whether so many words hold a row's codes, as a stream of bits or as many to a word as it holds whole."""
    return words in (-(-columns * bits // 32), -(-columns // (32 // bits)))


def _of_packed(bits: int, columns: int, parts: Mapping[str, Tensor]) -> Numbers:
    codes = _codes(parts[".weight_packed"], bits, columns) - 2 ** (bits - 1)
    return _of_groups(bits, {**parts, ".weight": codes})


def _of_groups(bits: int, parts: Mapping[str, Tensor]) -> Numbers:
    """Signed codes [rows, columns] with zeros and factors [rows or 1, groups]."""
    middle = 2 ** (bits - 1)
    codes, zeros = parts[".weight"].long() + middle, parts.get(".weight_zero_point")
    scale, group = _factors(parts)
    scale = scale.expand(len(codes), -1)
    if zeros is None:
        zeros = torch.zeros_like(scale)
    elif zeros.dtype == torch.int32:
        zeros = _codes(zeros.T, bits, len(codes)).T - middle
    zeros = zeros.long().reshape(-1, scale.shape[1]).expand(len(codes), -1) + middle
    return Numbers(codes, zeros, scale, group, bits)


def _of_floats(parts: Mapping[str, Tensor]) -> Tensor:
    """E4M3 times factors."""
    scale, group = _factors(parts)
    return parts[".weight"].float() * scale[:, group]


def _factors(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(fp32 [rows or 1, groups], the group of each column, int64 [columns])."""
    columns, scale = parts[".weight"].shape[1], parts[".weight_scale"].float()
    scale = scale.reshape(-1, scale.shape[-1]) if scale.dim() > 1 else scale.reshape(-1, 1)
    if columns % scale.shape[1]:
        raise ValueError(f"{scale.shape[1]} groups for {columns} columns")
    if ".weight_g_idx" in parts:
        return scale, parts[".weight_g_idx"].long()
    return scale, torch.arange(columns) // (columns // scale.shape[1])


def _codes(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of int32 [rows, words]: one bit stream, or, as older versions have it, as many as a word holds whole."""
    whole = 32 // bits
    if words.shape[1] == -(-count * bits // 32):
        return stream(words, bits, count)
    if words.shape[1] != -(-count // whole):
        raise ValueError(f"{words.shape[1]} words for {count} codes of {bits} bits")
    return ((words.long()[..., None] >> torch.arange(whole) * bits) & (2**bits - 1)).flatten(1)[:, :count]
