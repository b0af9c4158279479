"""Models whose files hold quantized weights already, as some exist in no other form: dequantized as they are read.

Each form is a function that finds a checkpoint's quantized matrices by the names and shapes of their tensors, and says
how each is made of them (`io.stored`). To the rest of quantkit such files are ordinary ones (`Dequantized`); no more
than a matrix is in memory for that. What the forms look like is said by their writers: transformers'
`integrations.finegrained_fp8` and `integrations.mxfp4`, AutoGPTQ and AutoAWQ, bitsandbytes' `QuantState`,
compressed-tensors, and MLX's `quantize`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quantkit.core.errors import CheckpointError, QuantkitError, first_line
from quantkit.io.shards import DTYPES, Shards

if TYPE_CHECKING:
    from quantkit.io.stored.matrix import Numbers, Quantized

_ODD = (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError)
"""What comes of files and settings that are not what their form says."""
_KEPT = 3
"""Stacks of experts: an expert's gate, its up and its down are read in turn."""
_SAYING = ("quantization_config", "compression_config", "quantization")
"""Where a config.json says how a model is quantized."""

FORMS = {
    "fp8": "floats.fp8",
    "fbgemm_fp8": "floats.fbgemm",
    "mxfp4": "floats.mxfp4",
    "gptq": "gptq.gptq",
    "awq": "gptq.awq",
    "auto-round": "gptq.auto_round",
    "bitsandbytes": "bitsandbytes.bitsandbytes",
    "compressed-tensors": "compressed.compressed",
    "mlx": "mlx.mlx",
}
"""What finds matrices, a function in `io.stored`, by the `quant_method` of a config.json."""


def _finder(form: str) -> Callable[[Shards, Mapping[str, Any]], dict[str, Quantized]]:
    module, _, name = FORMS[form].partition(".")
    found: Callable[[Shards, Mapping[str, Any]], dict[str, Quantized]]
    found = getattr(import_module(f"quantkit.io.stored.{module}"), name)
    return found


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
        if method not in FORMS:
            raise QuantkitError(
                f"the model is quantized already, by {method}, which quantkit does not read; it reads "
                f"{', '.join(FORMS)}, or give the full-precision model"
            )
        try:
            self.made: dict[str, Quantized] = _finder(method)(shards, asked)
        except _ODD as error:
            raise QuantkitError(
                f"{shards.folder}: its config.json or its tensors are not what {method} has "
                f"({type(error).__name__}: {first_line(error)}); fetch it anew"
            ) from error
        self._users = Counter(part for made in self.made.values() for part in made.parts.values())
        self._kept: dict[tuple[str, ...], dict[str, Tensor]] = {}
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
        names = dict.fromkeys(names)
        for name in [name for name in names if name in self.made and self._is_shared(self.made[name])]:
            del names[name]
            yield name, self._matrix(name, self.made[name], self._parts(self.made[name]))
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

    def _is_shared(self, made: Quantized) -> bool:
        """Whether a matrix is one of several in the same stored tensors."""
        return self._users[next(iter(made.parts.values()))] > 1

    def _parts(self, made: Quantized) -> dict[str, Tensor]:
        """A matrix' stored parts, by what they are; of stacks that many share the last few stay in memory."""
        names = tuple(made.parts.values())
        if names not in self._kept:
            stored = dict(self._shards.read(names))
            if not self._is_shared(made):
                return {what: stored[part] for what, part in made.parts.items()}
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[names] = stored
        return {what: self._kept[names][part] for what, part in made.parts.items()}

    def numbers(self, name: str) -> Numbers | None:
        """The whole numbers that a matrix is stored as; None where it is not.

        Raises:
            CheckpointError: its parts cannot be read, or do not go together.
        """
        made = self.made.get(name)
        if made is None or made.numbers is None:
            return None
        stored = self._parts(made)
        try:
            return made.numbers(stored)
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
                if "quant_method" not in said and {"bits", "group_size"} <= said.keys():
                    said["quant_method"] = "mlx"  # which says no more
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
