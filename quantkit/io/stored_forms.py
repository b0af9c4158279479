"""Models whose files hold quantized weights already, as some exist in no other form: dequantized as they are read.

Each form is a function that finds a checkpoint's quantized matrices by the names and shapes of their tensors, and says
how each is made of them. To the rest of quantkit such files are ordinary ones (`Dequantized`); no more than a matrix is
in memory for that. What the forms look like is said by their writers: transformers' `integrations.finegrained_fp8` and
`integrations.mxfp4`, AutoGPTQ and AutoAWQ, bitsandbytes' `QuantState`, and compressed-tensors.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import CheckpointError, QuantkitError, first_line
from quantkit.io.shards import DTYPES, Shards

_ODD = (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError)
"""What comes of files and settings that are not what their form says."""
_SAYING = ("quantization_config", "compression_config")
"""Where a config.json says how a model is quantized."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of E2M1's codes."""
_BNB_STATE = ".quant_state.bitsandbytes__"
"""In the name of the tensor that holds JSON of a 4-bit matrix: its shape and its blocks' sizes."""
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns AutoAWQ puts into a word's nibbles, the lowest first."""


@dataclass(frozen=True, eq=False)
class Numbers:
    """A matrix of whole numbers: (codes - zeros) * scales, those of a column's group.

    Attributes:
        codes: int64 [rows, columns], from 0 to 2^bits - 1.
        zeros: int64 or fp32 [rows, groups].
        scales: fp32 [rows, groups].
        group: int64 [columns], of each column.
        bits: of a code.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    group: Tensor
    bits: int

    def values(self) -> Tensor:
        """The matrix, fp32 [rows, columns]."""
        return (self.codes - self.zeros[:, self.group]).float() * self.scales[:, self.group]


@dataclass(frozen=True)
class Quantized:
    """A matrix of which its quantized parts are stored.

    Attributes:
        parts: name of each stored tensor that it is made of, by what it is.
        shape: of the matrix.
        make: gives it in fp32, of those tensors.
        numbers: gives the whole numbers that it is made of; None where it is not.
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    make: Callable[[Mapping[str, Tensor]], Tensor]
    numbers: Callable[[Mapping[str, Tensor]], Numbers] | None = None


def _of_numbers(
    parts: Mapping[str, str], shape: tuple[int, ...], numbers: Callable[[Mapping[str, Tensor]], Numbers]
) -> Quantized:
    return Quantized(parts, shape, lambda p: numbers(p).values(), numbers)


class Dequantized(Shards):
    """Shards as though they held the dequantized matrices, in the dtype of the model.

    Args:
        shards: as they are.
        config: JSON of the model's config.json.

    Attributes:
        form: in which they are stored, for people.
        made: how each of those matrices is made, by name.

    Raises:
        QuantkitError: another form than the known ones, or a matrix lacks a part. `read` raises it where parts do not
            go together.
    """

    def __init__(self, shards: Shards, config: Mapping[str, Any]) -> None:
        self.folder, self.files = shards.folder, shards.files
        self._shards, asked = shards, quantization_of(config)
        self.form = method = asked["quant_method"]
        find = FORMS.get(method)
        if find is None:
            raise QuantkitError(
                f"the model is quantized already, by {method}, which quantkit does not read; it reads "
                f"{', '.join(FORMS)}, or give the full-precision model"
            )
        try:
            self.made = find(shards, asked)
        except _ODD as error:
            raise QuantkitError(
                f"{shards.folder}: its config.json or its tensors are not what {method} has "
                f"({type(error).__name__}: {first_line(error)}); fetch it anew"
            ) from error
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        kinds = {str(known).removeprefix("torch."): name for name, known in DTYPES.items() if known.is_floating_point}
        kind = kinds.get(dtype, "BF16")
        self._dtype = DTYPES[kind]
        hidden = {name for made in self.made.values() for name in made.parts.values()}
        left = {name: spec for name, spec in shards.specs.items() if name not in hidden}
        for name, (stored, _) in left.items():
            if stored.startswith("F8"):
                raise QuantkitError(f"{name} is stored in FP8, and its factors are not there; fetch the model anew")
        self.specs = left | {name: (kind, list(made.shape)) for name, made in self.made.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """See `Shards.read`."""
        names = list(names)
        wanted = {name: self.made[name] for name in names if name in self.made}
        users: dict[str, list[str]] = defaultdict(list)
        for name, made in wanted.items():
            for part in made.parts.values():
                users[part].append(name)
        kept: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for stored, tensor in self._shards.read({*users, *(name for name in names if name not in wanted)}):
            if stored not in users:
                yield stored, tensor
            for name in users.get(stored, ()):
                made, parts = wanted[name], kept[name]
                parts |= {what: tensor for what, part in made.parts.items() if part == stored}
                if len(parts) == len(made.parts):
                    yield name, self._matrix(name, made, kept.pop(name))

    def _matrix(self, name: str, made: Quantized, parts: Mapping[str, Tensor]) -> Tensor:
        try:
            matrix = made.make(parts)
        except (*_ODD, RuntimeError) as error:
            raise CheckpointError(
                f"{name}: its parts do not go together ({first_line(error)}); the {self.form} files are damaged"
            ) from error
        if matrix.shape != made.shape:
            raise CheckpointError(f"{name}: its parts make {list(matrix.shape)}, not {list(made.shape)}")
        return matrix.to(self._dtype)

    def numbers(self, name: str) -> Numbers | None:
        """The whole numbers that a matrix is stored as; None where it is not.

        Raises:
            CheckpointError: its parts cannot be read, or do not go together.
        """
        made = self.made.get(name)
        if made is None or made.numbers is None:
            return None
        stored = dict(self._shards.read(made.parts.values()))
        try:
            return made.numbers({what: stored[part] for what, part in made.parts.items()})
        except (*_ODD, RuntimeError) as error:
            raise CheckpointError(f"{name}: {first_line(error)}; the {self.form} files are damaged") from error

    def checksums(self) -> dict[str, str]:
        """See `Shards.checksums`: of what is stored."""
        return self._shards.checksums()


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of a quantization, of the model or of its language model; {} where it says nothing."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for name in _SAYING:
            found = place.get(name)
            if found:
                said = dict(found) if isinstance(found, Mapping) else {"quant_method": found}
                return said | {"quant_method": str(said.get("quant_method")).lower()}
    return {}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing of a quantization that is undone as the model is read."""
    if quantization_of(config).get("quant_method") not in FORMS:
        return dict(config)
    left = {name: value for name, value in config.items() if name not in _SAYING}
    text = left.get("text_config")
    if isinstance(text, Mapping):
        left["text_config"] = {name: value for name, value in text.items() if name not in _SAYING}
    return left


def _places(shards: Shards, *suffixes: str) -> dict[str, dict[str, str]]:
    """Beginnings of names that are followed by the first suffix -> names by suffix, of those that are there."""
    first = [name.removesuffix(suffixes[0]) for name in shards.specs if name.endswith(suffixes[0])]
    return {place: {s: f"{place}{s}" for s in suffixes if f"{place}{s}" in shards.specs} for place in first}


def _fp8(shards: Shards, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """E4M3 with a factor for each block of a weight, or for all of it."""
    block = config.get("weight_block_size")
    block = None if block is None else [int(size) for size in block]
    found = {}
    for place, names in _places(shards, "_scale_inv", "").items():
        parts = {"weight": names[""], "scale": names["_scale_inv"]}
        found[place] = Quantized(parts, tuple(shards.specs[place][1]), partial(_of_blocks, block))
    return _with_inputs(found, shards, ".activation_scale")


def _with_inputs(found: dict[str, Quantized], shards: Shards, suffix: str) -> dict[str, Quantized]:
    """Matrices with the factors of their layers' inputs, which are left as they are here, among their parts."""
    for names in _places(shards, suffix, ".weight").values():
        made = found.get(names.get(".weight", ""))
        if made is not None:
            found[names[".weight"]] = Quantized({**made.parts, "inputs": names[suffix]}, made.shape, made.make)
    return found


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


def _fbgemm(shards: Shards, _config: Mapping[str, Any]) -> dict[str, Quantized]:
    """E4M3 with a factor for each row."""
    return {
        names[".weight"]: Quantized(
            {"weight": names[".weight"], "scale": names[".weight_scale"]}, tuple(shards.specs[names[".weight"]][1]),
            lambda p: p["weight"].float() * p["scale"].float(),
        )
        for names in _places(shards, ".weight_scale", ".weight").values()
    }  # fmt: skip


def _mxfp4(shards: Shards, _config: Mapping[str, Any]) -> dict[str, Quantized]:
    """E2M1 with a power of two for each 32, of stacked experts whose matrices are transposed."""
    found = {}
    for place, names in _places(shards, "_blocks", "_scales").items():
        *stack, rows, groups, half = shards.specs[names["_blocks"]][1]
        parts = {"codes": names["_blocks"], "scale": names["_scales"]}
        found[place] = Quantized(parts, (*stack, groups * half * 2, rows), _of_fp4)
    return found


def _of_fp4(parts: Mapping[str, Tensor]) -> Tensor:
    codes = parts["codes"]
    values = torch.tensor(_FP4)[torch.stack([codes & 15, codes >> 4], -1).long()].flatten(-2)
    return (values * _exponents(parts["scale"])[..., None]).flatten(-2).transpose(-1, -2)


def _gptq(shards: Shards, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """Codes along the inputs, one bit stream a column; zeros, less one in the older version, along the outputs."""
    bits, version = int(config["bits"]), str(config.get("checkpoint_format") or "gptq")
    if version not in ("gptq", "gptq_v2") or bits != config["bits"]:
        raise QuantkitError(f"of GPTQ quantkit reads whole bits, in the versions gptq and gptq_v2, not {version}")
    offset = 0 if version == "gptq_v2" else 1
    found = {}
    for place, names in _places(shards, ".qweight", ".qzeros", ".scales", ".g_idx").items():
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
            zeros = _stream(p[".qzeros"], bits, outputs).T + offset
            group = p[".g_idx"].long() if ".g_idx" in p else _groups_of(inputs, groups, config)
            return Numbers(_stream(p[".qweight"].T, bits, inputs), zeros, p[".scales"].float().T, group, bits)

        found[f"{place}.weight"] = _of_numbers(names, (outputs, inputs), numbers)
    return found


def _auto_round(shards: Shards, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """One of the two before, or GPTQ's with zeros as they are."""
    packing = str(config.get("packing_format", ""))
    if packing.endswith("auto_awq"):
        return _awq(shards, config)
    version = {"auto_round": "gptq_v2", "auto_round:auto_gptq": "gptq"}.get(packing)
    if version is None:
        raise QuantkitError(f"auto-round's packing_format {packing!r} is not read; give the full-precision model")
    return _gptq(shards, {**config, "checkpoint_format": version})


def _awq(shards: Shards, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """Codes and zeros of 4 bits along the outputs, eight to a word, in an order of their own."""
    if int(config.get("bits") or config.get("w_bit") or 4) != 4 or str(config.get("version", "gemm")).lower() != "gemm":
        raise QuantkitError("of AWQ quantkit reads 4 bits in the gemm version; give the full-precision model")
    found = {}
    for place, names in _places(shards, ".qweight", ".qzeros", ".scales").items():
        inputs, words = shards.specs[names[".qweight"]][1]
        groups, _ = shards.specs[names[".scales"]][1]
        names = {part: names[part] for part in (".qweight", ".qzeros", ".scales")}

        def numbers(p: Mapping[str, Tensor], inputs: int = inputs, groups: int = groups) -> Numbers:
            codes, zeros = (_nibbles(p[part]).T.long() for part in (".qweight", ".qzeros"))
            return Numbers(codes, zeros, p[".scales"].float().T, _groups_of(inputs, groups, config), 4)

        found[f"{place}.weight"] = _of_numbers(names, (words * 8, inputs), numbers)
    return found


def _groups_of(columns: int, groups: int, config: Mapping[str, Any]) -> Tensor:
    """Each column's group, int64 [columns], of groups side by side."""
    asked = config.get("group_size")
    size = -(-columns // groups) if asked is None else int(asked)  # where nobody says it, as many as there are
    size = columns if size <= 0 else size
    if -(-columns // size) != groups:
        raise ValueError(f"{groups} groups of {size} for {columns} columns")
    return torch.arange(columns) // size


def _nibbles(words: Tensor) -> Tensor:
    shifts = torch.empty(8, dtype=torch.int32)
    shifts[list(_AWQ_ORDER)] = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).flatten(-2)


def _bitsandbytes(shards: Shards, _config: Mapping[str, Any]) -> dict[str, Quantized]:
    """4 bits (NF4, FP4) in blocks of a matrix laid out flat, whose factors may be 8-bit codes themselves; 8 by row."""
    found = {}
    states = [name for name in shards.specs if _BNB_STATE in name]
    for state, text in shards.read(states):
        said = json.loads(bytes(text.tolist()))
        place = state.partition(_BNB_STATE)[0]
        factors = ("absmax", "nested_absmax", "nested_quant_map") if "nested_blocksize" in said else ("absmax",)
        parts = {part: f"{place}.{part}" for part in (*factors, "quant_map")} | {"weight": place, "state": state}
        shape = tuple(int(size) for size in said["shape"])
        held = {part: math.prod(shards.specs[name][1]) for part, name in parts.items()}
        size = math.prod(shape)
        if (held["weight"], held["absmax"]) != (-(-size // 2), -(-size // int(said["blocksize"]))):
            raise ValueError(f"{held['weight']} bytes and {held['absmax']} factors for {list(shape)}")
        found[place] = Quantized(parts, shape, partial(_of_flat_blocks, said))
    for place, names in _places(shards, ".SCB", ".weight", ".weight_format").items():
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


def _compressed(shards: Shards, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """compressed-tensors' packed and plain integers and E4M3, with factors by group, row or tensor."""
    asked = [group["weights"] for group in config["config_groups"].values()]
    facts = ("num_bits", "strategy", "group_size", "symmetric")
    kinds = {tuple(one.get(fact) for fact in facts) for one in asked}
    found = {}
    told = shards.read([name for name in shards.specs if name.endswith(".weight_shape")])
    shapes = {name: tuple(map(int, shape.tolist())) for name, shape in told}
    for place, names in _places(
        shards, ".weight_scale", ".weight", ".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx",
        ".weight_global_scale",
    ).items():  # fmt: skip
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
            if not bits:
                raise ValueError(f"{place}: {words} words for {columns} columns")
            found[f"{place}.weight"] = _of_numbers(names, (rows, columns), partial(_of_packed, bits, columns))
        elif ".weight" in names:
            kind, sizes = shards.specs[names[".weight"]]
            made = partial(_of_groups, 8)
            shape = tuple(sizes)
            found[f"{place}.weight"] = (
                _of_numbers(names, shape, made) if kind == "I8" else Quantized(names, shape, _of_floats)
            )
    return _with_inputs(found, shards, ".input_scale")


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
        return _stream(words, bits, count)
    if words.shape[1] != -(-count // whole):
        raise ValueError(f"{words.shape[1]} words for {count} codes of {bits} bits")
    return ((words.long()[..., None] >> torch.arange(whole) * bits) & (2**bits - 1)).flatten(1)[:, :count]


def _stream(words: Tensor, bits: int, count: int) -> Tensor:
    """The first codes of a bit stream in each row of int32 [rows, words], lowest bits first: int64 [rows, count]."""
    start = torch.arange(count) * bits
    word, shift = start // 32, start % 32
    stream = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    low, high = stream[:, word], stream[:, (word + 1).clamp(max=stream.shape[1] - 1)]
    return ((low | high << 32) >> shift) & (2**bits - 1)


FORMS: dict[str, Callable[[Shards, Mapping[str, Any]], dict[str, Quantized]]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
}
"""How matrices are found, by the `quant_method` of a config.json."""
