"""Whole numbers as GPTQ, auto-round and AWQ have them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import QuantkitError
from quantkit.io.shards import Shards
from quantkit.io.stored.matrix import Numbers, Quantized, check_words, groups_of, of_numbers, places, stream

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns AutoAWQ puts into a word's nibbles, the lowest first."""


def gptq(shards: Shards, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """Codes along the inputs, one bit stream a column; zeros, less one in the older version, along the outputs."""
    bits, version = int(config["bits"]), str(config.get("checkpoint_format") or "gptq")
    if version not in ("gptq", "gptq_v2") or bits != config["bits"]:
        raise QuantkitError(f"of GPTQ quantkit reads whole bits, in the versions gptq and gptq_v2, not {version}")
    offset = 0 if version == "gptq_v2" else 1
    found = {}
    for place, names in places(shards, ".qweight", ".qzeros", ".scales", ".g_idx").items():
        check_words(shards, names[".qweight"], names[".qzeros"])
        words, outputs = shards.specs[names[".qweight"]][1]
        inputs, (groups, _) = words * 32 // bits, shards.specs[names[".scales"]][1]
        if ".g_idx" not in names and config.get("desc_act"):
            raise KeyError(f"{place}.g_idx")
        names = {part: names[part] for part in (".qweight", ".qzeros", ".scales")} | {
            part: name for part, name in names.items() if part == ".g_idx"
        }

        def numbers(
            p: Mapping[str, Tensor], inputs: int = inputs, outputs: int = outputs, groups: int = groups
        ) -> Numbers:
            zeros = stream(p[".qzeros"], bits, outputs).T + offset
            group = p[".g_idx"].long() if ".g_idx" in p else groups_of(inputs, groups, config)
            return Numbers(stream(p[".qweight"].T, bits, inputs), zeros, p[".scales"].float().T, group, bits)

        found[f"{place}.weight"] = of_numbers(names, (outputs, inputs), numbers)
    return found


def auto_round(shards: Shards, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """One of the two before, or GPTQ's with zeros as they are."""
    packing = str(config.get("packing_format", ""))
    if packing.endswith("auto_awq"):
        return awq(shards, config)
    version = {"auto_round": "gptq_v2", "auto_round:auto_gptq": "gptq"}.get(packing)
    if version is None:
        raise QuantkitError(f"auto-round's packing_format {packing!r} is not read; give the full-precision model")
    return gptq(shards, {**config, "checkpoint_format": version})


def awq(shards: Shards, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """Codes and zeros of 4 bits along the outputs, eight to a word, in an order of their own."""
    if int(config.get("bits") or config.get("w_bit") or 4) != 4 or str(config.get("version", "gemm")).lower() != "gemm":
        raise QuantkitError("of AWQ quantkit reads 4 bits in the gemm version; give the full-precision model")
    found = {}
    for place, names in places(shards, ".qweight", ".qzeros", ".scales").items():
        check_words(shards, names[".qweight"], names[".qzeros"])
        inputs, words = shards.specs[names[".qweight"]][1]
        groups, _ = shards.specs[names[".scales"]][1]
        names = {part: names[part] for part in (".qweight", ".qzeros", ".scales")}

        def numbers(p: Mapping[str, Tensor], inputs: int = inputs, groups: int = groups) -> Numbers:
            codes, zeros = (_nibbles(p[part]).T.long() for part in (".qweight", ".qzeros"))
            return Numbers(codes, zeros, p[".scales"].float().T, groups_of(inputs, groups, config), 4)

        found[f"{place}.weight"] = of_numbers(names, (words * 8, inputs), numbers)
    return found


def _nibbles(words: Tensor) -> Tensor:
    shifts = torch.empty(8, dtype=torch.int32)
    shifts[list(_AWQ_ORDER)] = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).flatten(-2)
