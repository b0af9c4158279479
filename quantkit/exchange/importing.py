"""A model that another program has quantized to whole numbers, as a packed checkpoint with the very same numbers.

It is a run like any other (`run.pipeline`), whose quantizer for each layer takes what its file holds instead of
rounding: progress, resumption, the report and the checkpoint are those of `quantize`. Columns in groups by activation
order (`g_idx`) are brought side by side (`formats.ordered`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Needs
from quantkit.core.stats import LayerStats
from quantkit.core.weight import QuantizedWeight
from quantkit.exchange.gguf_blocks import BLOCK, SYMMETRIC, WITH_ZEROS, Kind
from quantkit.exchange.gguf_models import architecture, row_order, tensor_names
from quantkit.formats.int_group import IntGroupWeight
from quantkit.formats.ordered import OrderedWeight
from quantkit.formats.scaled import ScaledWeight
from quantkit.io.checkpoint import CheckpointWriter, read_config
from quantkit.io.conversion import stored_layers
from quantkit.io.gguf import gguf_folder
from quantkit.io.gguf_header import Header, TensorPlace, read_header
from quantkit.io.run_folder import Output
from quantkit.io.source import Sharded, Source, open_folder
from quantkit.io.stored.matrix import Numbers, with_offsets
from quantkit.io.stored_forms import FORMS, Dequantized, quantization_of
from quantkit.kernels.int_group_layout import STORED, WHOLE
from quantkit.models.experts import number_of, unnumbered
from quantkit.models.structure import block_linears, ends, is_lookup, one_weight, outer_linears
from quantkit.run.pipeline import Progress, run, silent
from quantkit.run.recipe import Recipe
from quantkit.run.record import and_others
from quantkit.run.report import Report


@dataclass(frozen=True)
class Taken:
    """A layer's numbers as its file has them; a `Quantizer` for that layer alone.

    Attributes:
        layer: its name.
        form: in which they are stored.
        bits, group_size: of them.
        zero: where it is; one of `kernels.int_group_layout`'s.
        zeros_dtype: of stored zeros; fp32 where offsets are not a few digits of them.
        ordered: whether groups go by activation order.
        read: gives them.
    """

    layer: str
    form: str
    bits: int
    group_size: int
    zero: int
    ordered: bool
    read: Callable[[], Numbers] = field(repr=False, compare=False)
    zeros_dtype: torch.dtype = torch.float16
    needs: ClassVar[Needs] = Needs.NOTHING

    def layout(self, out_features: int, in_features: int) -> QuantizedWeight:
        """See `Quantizer`."""
        form = self.bits, self.group_size, self.zero, self.zeros_dtype
        base = IntGroupWeight.layout(out_features, in_features, *form)
        if not self.ordered:
            return base
        return OrderedWeight(base, torch.empty(in_features, dtype=torch.int32, device="meta"))

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> QuantizedWeight:
        """The stored numbers; times a power of two where `weight` [out, in] is theirs times that.

        Raises:
            QuantkitError: another weight.
        """
        found = self.read()
        order = found.group.argsort(stable=True) if self.ordered else None
        codes = (found.codes if order is None else found.codes[:, order]).to(torch.uint8)
        norm = float(found.values().norm())
        power = 2.0 ** round(math.log2(float(weight.norm()) / norm)) if norm and float(weight.norm()) else 1.0
        held = halves(found.scales * power)
        assert held is not None  # of layers whose scales fp16 does not hold nothing is taken
        scales, factor = held
        zeros = found.zeros.to(self.zeros_dtype).T.contiguous()
        if self.zero == WHOLE:
            zeros = zeros.flatten()[:1]
        base = IntGroupWeight.pack(codes, scales.T.contiguous(), zeros, self.bits, self.group_size)
        packed: QuantizedWeight = base if order is None else OrderedWeight(base, order.int())
        if factor != 1:
            packed = ScaledWeight(packed, torch.full((1,), factor))
        packed = packed.map(lambda tensor: tensor.to(weight.device))
        off = float((packed.dequantize() - weight).norm())
        if off > 2**-6 * float(weight.norm()):  # the model has the matrix in 16 bits
            raise QuantkitError(f"{self.layer}: its numbers do not make the weight that the model has there")
        return packed


def halves(scales: Tensor) -> tuple[Tensor, float] | None:
    """Scales in fp16 and a power of two whose products are the very scales; None where there are no such.

    bf16's scales may lie below what fp16 has: then the largest is brought near fp16's upper end.

    Args:
        scales: fp32, any shape.
    """
    _, exponent = math.frexp(float(scales.abs().max()))
    for factor in (1.0, 2.0 ** (exponent - 15)):
        half = (scales / factor).half()
        if torch.equal(half.float() * factor, scales):
            return half, factor
    return None


def import_model(
    place: Path,
    output: Path,
    *,
    name: str = "",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Report:
    """Makes a packed checkpoint of a model whose layers are stored as whole numbers, the same numbers.

    Args:
        place: a folder of GPTQ, AWQ, auto-round, compressed-tensors or MLX, as their writers leave it; or a GGUF file.
        output: the folder to make.
        name: of the model, for the report.
        resume, overwrite, progress: see `run.pipeline.quantize_checkpoint`.

    Returns:
        The report; layers that are stored in another way stay dense, experts in one tensor among them.

    Raises:
        QuantkitError: nothing there is stored as whole numbers, or not as int_group holds them.
    """
    source, taken, form = _of_file(place) if place.is_file() else _of_folder(place)
    if not taken:
        raise QuantkitError(
            f"{place} is stored as {form}, and no layer of its blocks as whole numbers with scales; "
            "`quantkit quantize` reads it as what it stands for"
        )
    target = Output(output, place, resume=resume, overwrite=overwrite)
    writer = CheckpointWriter(target, len(source.blocks), source.dense)
    return run(source, Recipe(None, taken), writer, name=name, device="cpu", progress=progress)


def _of_folder(folder: Path) -> tuple[Source, dict[str, Any], str]:
    """The model, what each layer is taken by, and the form in which they are stored."""
    form = quantization_of(read_config(folder)).get("quant_method")
    if form is None:
        raise QuantkitError(f"{folder} holds no quantized model; `quantkit quantize` makes one of it")
    if form not in FORMS:
        raise QuantkitError(f"{folder} is quantized by {form}; whole numbers are taken from gptq, awq, auto-round, "
                            "compressed-tensors and mlx")  # fmt: skip
    source = open_folder(folder)
    return source, _taken(source), form


def _of_file(file: Path) -> tuple[Source, dict[str, Any], str]:
    """As `_of_folder`, of a GGUF file."""
    source = open_folder(gguf_folder(file))
    config = source.model.config
    own = architecture(config)
    called, header, found = tensor_names(own, config), read_header(file), dict[str, Any]()
    kinds = {kind.number: kind for kind in (*SYMMETRIC, *WITH_ZEROS)}
    layers = _layers(source.model)
    for name, parts in stored_layers(source.model, layers).items():
        held = [(_place(header, called, part), part, outputs) for part, outputs in parts]
        known = {kinds.get(place.kind) for place, _, _ in held if place is not None}
        kind = known.pop() if len(known) == 1 else None
        if kind is None or any(place is None for place, _, _ in held):
            continue
        reads = [
            (_Blocks(file, place, kind, row_order(own, config, name, len(outputs)).argsort(), number_of(part)), outputs)
            for place, part, outputs in held if place is not None
        ]  # fmt: skip
        zero, dtype = (STORED, torch.float32) if kind.offset else (WHOLE, torch.float16)
        found[name] = Taken(name, "gguf", kind.bits, BLOCK, zero, False, _Reading(reads), dtype)
    return source, _with_tie(source.model, found), "gguf"


def _place(header: Header, called: Callable[[str], str | None], layer: str) -> TensorPlace | None:
    """Where a file has a layer of transformers' files, or the stack that it is in; None where it has none such."""
    name = called(unnumbered(f"{layer}.weight"))
    return None if name is None else header.tensors.get(name)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that may be taken, by name: those of the blocks, the input embedding and the head."""
    embedding, head = ends(model)
    found, outer = dict[str, nn.Module](block_linears(model)), outer_linears(model)
    if embedding is not None and is_lookup(model.get_submodule(embedding)):
        found[embedding] = model.get_submodule(embedding)
    return found | ({head: outer[head]} if head in outer else {})


def _with_tie(model: nn.Module, taken: dict[str, Any]) -> dict[str, Any]:
    """With a head and an embedding that are one weight taken as one, or neither."""
    embedding, head = ends(model)
    found = taken.get(embedding or "") or taken.get(head or "")
    if embedding is None or head is None or found is None:
        return taken
    return taken | {embedding: found, head: found} if one_weight(model, embedding, head) else taken


@dataclass(frozen=True, eq=False)
class _Blocks:
    """A matrix in a GGUF file, or an expert's in a stack of them; `order` has its rows as the model has them."""

    file: Path
    place: TensorPlace
    kind: Kind
    order: Tensor
    expert: int = 0

    def __call__(self) -> Numbers:
        rows, columns = self.place.shape[-2:]
        row = columns // BLOCK * self.kind.nbytes
        start = self.place.offset + self.expert * rows * row
        held = np.fromfile(self.file, np.uint8, rows * row, offset=start).reshape(rows, row)
        codes, scales, offsets = self.kind.unpack(held)
        group = torch.arange(columns) // BLOCK
        zeros = torch.full_like(scales, 2 ** (self.kind.bits - 1), dtype=torch.int64)
        found = Numbers(codes, zeros, scales, group, self.kind.bits)
        if offsets is not None:
            found = with_offsets(codes, scales, offsets, group, self.kind.bits)
        return replace(
            found, codes=found.codes[self.order], zeros=found.zeros[self.order], scales=found.scales[self.order]
        )


def _taken(source: Source) -> dict[str, Any]:
    """What each layer is taken by, by its name."""
    if not isinstance(source, Sharded) or not isinstance(source.shards, Dequantized):
        return {}
    shards, found, left = source.shards, dict[str, Any](), list[str]()
    layers = _layers(source.model)
    places = stored_layers(source.model, layers)
    for name in layers:
        origin = source.origin(f"{name}.weight")
        if origin is None:
            continue
        own = {f"{part}.weight": outputs for part, outputs in places[name]}
        if origin.part is None and len(origin.stored) == 1:
            own = {origin.stored[0]: next(iter(own.values()))}
        if {*own} != {*origin.stored}:  # experts in one tensor, or parts that only numbers can tell
            continue
        read = _Reading([(partial(shards.numbers, stored), outputs) for stored, outputs in own.items()])
        numbers = read.found()
        if numbers is None:
            left += [name] if read.differs else []
            continue
        counts = numbers.group.bincount()
        size = int(counts.max())
        if halves(numbers.scales) is None or not all(int(count) == size for count in counts[:-1]):
            left.append(name)
            continue
        ordered = not torch.equal(numbers.group, numbers.group.sort().values)
        zero = WHOLE if bool((numbers.zeros == 2 ** (numbers.bits - 1)).all()) else STORED
        dtype = torch.float16 if torch.equal(numbers.zeros, numbers.zeros.round()) else torch.float32
        found[name] = Taken(name, shards.form, numbers.bits, size, zero, ordered, read, dtype)
    if left:
        note = f"{and_others(left)} stay dense: fp16 does not hold their scales, or their groups or widths are several"
        if not found:
            raise QuantkitError(f"nothing can be taken as it is: {note}")
        source.notes = (*source.notes, note)
    return _with_tie(source.model, found)


@dataclass(frozen=True, eq=False)
class _Reading:
    """A layer in its files, which may have an expert's gate apart: what reads each part, and its outputs, int64 [n]."""

    parts: Sequence[tuple[Callable[[], Numbers | None], Tensor]]

    def __call__(self) -> Numbers:
        found = self.found()
        assert found is not None
        return found

    @property
    def differs(self) -> bool:
        """Whether some part is of whole numbers, of those that do not go together."""
        return len(self.parts) > 1 and any(read() is not None for read, _ in self.parts)

    def found(self) -> Numbers | None:
        """None where a part is not of whole numbers, or has other widths or groups than the first."""
        parts = [read() for read, _ in self.parts]
        first = parts[0]
        if first is None or len(parts) == 1:
            return first
        known = [part for part in parts if part is not None]
        same = all(part.bits == first.bits and torch.equal(part.group, first.group) for part in known)
        if not same or len(known) < len(parts):
            return None
        order = torch.cat([outputs for _, outputs in self.parts]).argsort()
        codes, zeros, scales = (
            torch.cat([getattr(part, what) for part in known])[order] for what in ("codes", "zeros", "scales")
        )
        return Numbers(codes, zeros, scales, first.group, first.bits)
