"""What a model's folder or GGUF file holds, whoever has quantized it: by the names, shapes and types of its tensors."""

import math
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from quantkit.core.errors import QuantkitError
from quantkit.io.checkpoint import read_config
from quantkit.io.gguf_header import read_header
from quantkit.io.shards import Shards
from quantkit.io.stored_forms import FORMS, Dequantized, quantization_of


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix.

    Attributes:
        format: how it is stored, in few words: "gptq 4 bits g128", "Q4_0".
        shape: that it stands for.
        bits: of a number; None where that is no whole figure.
        nbytes: of all that it is made of.
    """

    format: str
    shape: tuple[int, ...]
    bits: int | None
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Measured: every stored byte."""
        return 8 * self.nbytes / math.prod(self.shape)


@dataclass(frozen=True)
class Survey:
    """A model in another form than quantkit's.

    Attributes:
        by: what has quantized it; None where nothing has.
        layers: its quantized matrices, by name.
        dense: numbers in its other tensors.
        nbytes: of all tensors.
    """

    by: str | None
    layers: dict[str, Matrix]
    dense: int
    nbytes: int

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the quantized matrices."""
        return sum(matrix.nbytes for matrix in self.layers.values())

    @property
    def bits_per_weight(self) -> float | None:
        """Of the quantized matrices; None where there are none."""
        weights = sum(math.prod(matrix.shape) for matrix in self.layers.values())
        return 8 * self.packed_nbytes / weights if weights else None


def survey(place: Path) -> Survey:
    """What a folder or a GGUF file holds.

    Raises:
        QuantkitError: it is no model, damaged, or quantized in a form that quantkit does not know.
    """
    return _of_file(place) if place.is_file() else _of_folder(place)


def _of_folder(folder: Path) -> Survey:
    config, shards = read_config(folder), Shards(folder)
    nbytes = shards.nbytes()
    said = quantization_of(config)
    form = said.get("quant_method")
    if form is None:
        return Survey(None, {}, sum(math.prod(shape) for _, shape in shards.specs.values()), nbytes)
    if form not in FORMS:
        return Survey(form, {}, 0, nbytes)
    found = Dequantized(shards, config)
    layers = {}
    users = Counter(stored for made in found.made.values() for stored in made.parts.values())  # experts share a stack
    for name, made in found.made.items():
        sizes = {part: shards.tensor_nbytes(stored) // users[stored] for part, stored in made.parts.items()}
        main = max(sizes.values())
        bits = 8 * main / math.prod(made.shape)
        whole = int(bits) if bits % 1 < 0.4 else None  # words may hold as many codes as fit whole
        layers[name.removesuffix(".weight")] = Matrix(
            _label(form, whole, made.shape, {part: shards.specs[stored] for part, stored in made.parts.items()}),
            made.shape, whole, sum(sizes.values()),
        )  # fmt: skip
    dense = sum(math.prod(shape) for name, (_, shape) in found.specs.items() if name not in found.made)
    return Survey(form, layers, dense, nbytes)


def _label(form: str, bits: int | None, shape: tuple[int, ...], parts: dict[str, tuple[str, list[int]]]) -> str:
    """A form with what its parts tell of it."""
    words = [form] + ([] if bits is None else [f"{bits} bits"])
    for part, along in ((".scales", -1 if ".biases" in parts else 0), (".weight_scale", -1)):  # MLX's are by row
        groups = parts[part][1][along] if part in parts and parts[part][1] else 0
        if groups > 1 and len(shape) > 1 and shape[-1] % groups == 0:
            words.append(f"g{shape[-1] // groups}")
    return " ".join(words)


def _of_file(file: Path) -> Survey:
    header = read_header(file)
    if find_spec("gguf") is None:
        raise QuantkitError(f"{file}: its types are told by the package gguf (pip install 'quantkit-llm[gguf]')")
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    layers, dense, nbytes = {}, 0, 0
    for name, place in header.tensors.items():
        try:
            kind = GGMLQuantizationType(place.kind)
            numbers, size = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise QuantkitError(f"{file}: {name} has the type {place.kind}, which gguf does not know") from error
        own = place.elements // numbers * size
        nbytes += own
        if numbers == 1:
            dense += place.elements
        else:
            layers[name.removesuffix(".weight")] = Matrix(kind.name, place.shape, _width(kind.name), own)
    by = header.metadata.get("general.quantized_by")
    return Survey(by if isinstance(by, str) else ("gguf" if layers else None), layers, dense, nbytes)


def _width(kind: str) -> int | None:
    """Bits of a number, by the name of its type: Q4_K, IQ3_S."""
    digits = "".join(letter for letter in kind.removeprefix("I").removeprefix("Q").split("_")[0] if letter.isdigit())
    return int(digits) if digits else None
