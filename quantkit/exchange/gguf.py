"""GGUF, llama.cpp's file of a model: its weights in ggml's blocks, its sizes and its tokenizer."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from quantkit.core.errors import QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.exchange.gguf_blocks import BLOCK, Kind, kind_of
from quantkit.exchange.gguf_models import (
    OTHERS,
    add_tokenizer,
    architecture,
    check_tokenizer,
    describe,
    file_name,
    row_order,
    tensor_names,
)
from quantkit.exchange.integers import integers, number_bits
from quantkit.exchange.packed import PackedFolder
from quantkit.exchange.target import Exported, Target, Told, difference
from quantkit.formats.int_group import IntGroupWeight
from quantkit.io.classes import config_of
from quantkit.kernels.bitpack import unpack
from quantkit.kernels.int_group_layout import STORED
from quantkit.models.experts import number_of, parts, place
from quantkit.models.structure import ROUTERS


class GGUF(Target):
    """A file of a model that llama.cpp knows.

    Symmetric weights are kept exactly (`exchange.integers`); of others the offset, zero * scale, is rounded to fp16.
    Vectors become fp32; matrices keep their type.

    Args:
        packed: see `Target`.
        dtype: of dense matrices; None for their own.

    Raises:
        QuantkitError: the package gguf is missing, llama.cpp has no such model, or a layer's groups or codes are none
            of its blocks.
    """

    name: ClassVar[str] = "gguf"
    outer: ClassVar[bool] = True

    def __init__(self, packed: PackedFolder, dtype: torch.dtype | None = None) -> None:
        if find_spec("gguf") is None:
            raise QuantkitError("the package gguf is missing: pip install 'quantkit-llm[gguf]'")
        import gguf

        self._gguf, self._config = gguf, packed.model.config
        self._architecture = architecture(self._config)
        self._called = tensor_names(self._architecture, self._config)
        super().__init__(packed, dtype)
        self.check_experts(self._kind)
        self._dense_stacks: dict[str, list[str]] = {}
        """Experts that are all dense, which packed folders keep in one tensor: their layers, by its name."""
        for name, part in parts(packed.model).items():
            self._dense_stacks.setdefault(part.stack, []).append(name.removesuffix(".weight"))

    def holds(self, layer: str) -> bool:
        """Layers outside of the blocks become dense where there are no such blocks."""
        return self.packed.inside(layer) or not self.refusal(layer, self.packed.layers[layer])

    def refusal(self, name: str, weight: QuantizedWeight) -> str:
        """See `Target`."""
        if not isinstance(weight, IntGroupWeight):
            return f"{weight.label}; it holds whole numbers with scales (`--method gptq` or `rtn`), and {OTHERS}"
        columns = weight.shape[1]
        if columns % BLOCK or (weight.group_size < columns and weight.group_size % BLOCK):
            return f"groups of {min(weight.group_size, columns)} of {columns} inputs in blocks of {BLOCK}; {OTHERS}"
        if self._kind(weight) is None:
            zeros = " with zeros" if weight.zero == STORED else ""
            return f"{weight.bits}-bit codes{zeros}, for which it has no blocks; {OTHERS}"
        return ""

    def _kind(self, weight: QuantizedWeight) -> Kind | None:
        assert isinstance(weight, IntGroupWeight)
        return kind_of(number_bits(weight), weight.zero == STORED)

    def tensors(self, name: str, weight: QuantizedWeight) -> tuple[dict[str, Tensor], Tensor]:
        """The layer's blocks, uint8 [out, bytes of a row]."""
        assert isinstance(weight, IntGroupWeight)
        kind = self._kind(weight)
        assert kind is not None
        group, offsets = torch.arange(0, weight.in_features, BLOCK) // weight.group_size, None
        if weight.zeros is not None and weight.zero == STORED:
            numbers, scales = unpack(weight.codes, weight.bits, weight.in_features).short(), weight.scales.float().T
            offsets = (-weight.zeros.float().T * scales)[:, group].half()
        else:
            found = integers(weight)
            assert found is not None
            numbers, scales = found.numbers, found.scales
        steps = scales[:, group].half()
        read = numbers.view(len(numbers), -1, BLOCK).float() * steps.float().unsqueeze(2)
        read = read if offsets is None else read + offsets.float().unsqueeze(2)
        order = self._order(name, len(numbers))
        packed = kind.pack(numbers[order], steps[order], None if offsets is None else offsets[order])
        return {name: torch.from_numpy(packed)}, read.flatten(1)

    def _name(self, name: str) -> str:
        return file_name(self._called, self._architecture, name)

    def _stacks(self, unit: int) -> dict[str, list[tuple[str, Any, int]]]:
        """The tensors of a unit by their names in the file, and what each is made of: what `described` names, an index
        of the part that is taken, and how many rows that is; one an expert, in their order, else all (None) of one.
        """
        found: dict[str, dict[int, tuple[str, Any, int]]] = {}
        for name, value in self.packed.described(unit).items():
            own = f"{name}.weight" if isinstance(value, QuantizedWeight) else name
            layer, stack = own.removesuffix(".weight"), self._dense_stacks.get(name, ())
            if place(layer) is None and not stack:
                found[self._name(own)] = {0: (name, None, value.shape[0])}
            for expert, one in enumerate(stack or ([layer] if place(layer) is not None else [])):
                for stored, rows in self.packed.places[one]:
                    index = (expert, rows.numpy()) if stack else rows.numpy()
                    parts = found.setdefault(self._name(f"{stored}.weight"), {})
                    parts[number_of(stored)] = name, index, len(rows)
        return {name: [parts[number] for number in sorted(parts)] for name, parts in found.items()}

    def _type(self, name: str, value: QuantizedWeight | Tensor) -> Kind | torch.dtype:
        """In what a tensor is stored: blocks, or numbers."""
        if isinstance(value, QuantizedWeight) and self.holds(name):
            assert isinstance(value, IntGroupWeight)
            kind = self._kind(value)
            assert kind is not None
            return kind
        own = self.packed.model.dtype if isinstance(value, QuantizedWeight) else value.dtype
        if len(value.shape) == 1 or _is_router(name):
            return torch.float32
        return self.dtype or own

    def _order(self, layer: str, rows: int) -> Tensor:
        return row_order(self._architecture, self._config, layer, rows)

    def _array(self, name: str, tensor: Tensor) -> np.ndarray:
        """A dense tensor as the file has it."""
        tensor = tensor[self._order(name.rpartition(".")[0], len(tensor))]
        if tensor.dim() == 1:
            shift = self._architecture.norm_shift if name.endswith("norm.weight") else 0.0
            return (tensor.float() + shift).numpy()
        if _is_router(name):
            return (tensor[0] if len(tensor) == 1 else tensor).float().contiguous().numpy()
        tensor = self.cast(name, tensor).contiguous()
        return (tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor).numpy()

    @classmethod
    def check(cls, folder: Path, output: Path, resume: bool, overwrite: bool) -> None:
        """See `Target`; a file is written anew, whatever `resume` says."""
        config, place = config_of(folder), output.expanduser().resolve()
        architecture(config)
        check_tokenizer(folder, config)
        if folder.resolve() in place.parents:
            raise QuantkitError(f"`output` {output} lies in the packed model's own folder; give another place")
        if place.is_dir():
            raise QuantkitError(f"`output` {output} is a folder; name a file, such as {output}/{place.name}.gguf")
        if place.exists() and not overwrite:
            raise QuantkitError(f"{place} already exists; give another `output`, or `overwrite` to replace it")
        if not place.parent.is_dir():
            raise QuantkitError(f"`output` {output}: {place.parent} is no folder")

    def write(self, output: Path, resume: bool, overwrite: bool, progress: Told) -> Exported:
        """Writes the file, a layer at a time, under its name once it is whole."""
        output = output.expanduser().resolve()
        partial = output.with_name(f"{output.name}.partial")
        partial.unlink(missing_ok=True)
        writer = self._gguf.GGUFWriter(None, self._architecture.name)
        extra = describe(writer, self._config, self._architecture, self.packed.folder.name)
        add_tokenizer(writer, self.packed.folder, self._config)
        self._declare(writer, extra)
        try:
            writer.write_header_to_file(path=partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            errors, opened = self._write_tensors(writer, extra, progress)
            writer.close()
            nbytes = partial.stat().st_size
            partial.replace(output)
        except OSError as error:
            raise QuantkitError(f"{partial} cannot be written ({error})") from error
        finally:
            partial.unlink(missing_ok=True)
        return Exported(output, self.name, len(errors), tuple(opened), max(errors, default=0.0), nbytes)

    def _declare(self, writer: Any, extra: dict[str, Tensor]) -> None:
        """Tells the writer of all tensors, in the order in which they will come."""
        kinds = self._gguf.GGMLQuantizationType
        for name, tensor in extra.items():
            writer.add_tensor_info(name, tensor.shape, np.float32, 4 * tensor.numel())
        for unit in self.packed.units:
            described = self.packed.described(unit)
            for called, own in self._stacks(unit).items():
                (name, index, outputs), value = own[0], described[own[0][0]]
                columns = value.shape[-1:] if len(value.shape) > 1 else ()
                shape = (*(() if index is None else (len(own),)), outputs, *columns)
                if _is_router(name) and outputs == 1:  # a vector, in llama.cpp's own files
                    shape = shape[1:]
                held = self._type(name, value)
                stored: tuple[int, ...] = shape
                dtype: Any = np.float16 if held == torch.float16 else np.float32
                raw = None
                if isinstance(held, Kind):
                    stored, dtype, raw = (*shape[:-1], shape[-1] // BLOCK * held.nbytes), np.uint8, kinds[held.name]
                elif held == torch.bfloat16:
                    stored, dtype, raw = (*shape[:-1], 2 * shape[-1]), np.uint8, kinds.BF16
                nbytes = math.prod(stored) * np.dtype(dtype).itemsize
                writer.add_tensor_info(called, stored, dtype, nbytes, raw_dtype=raw)

    def _write_tensors(self, writer: Any, extra: dict[str, Tensor], progress: Told) -> tuple[list[float], list[str]]:
        for tensor in extra.values():
            writer.write_tensor_data(tensor.numpy())
        errors, opened = list[float](), list[str]()
        for nth, unit in enumerate(self.packed.units):
            progress(nth, len(self.packed.units), "the rest" if unit < 0 else f"block {unit}")
            arrays: dict[str, np.ndarray] = {}
            for name, value in self.packed.read(unit):
                if not isinstance(value, QuantizedWeight):
                    arrays[name] = self._array(name, value)
                elif self.holds(name):
                    stored, read = self.tensors(name, value)
                    arrays[name] = next(iter(stored.values())).numpy()
                    errors.append(difference(read, value))
                else:
                    dense = self.packed.as_dense(name, value, self.dtype)
                    arrays[name] = self._array(f"{name}.weight", dense)
                    opened.append(name)
            for own in self._stacks(unit).values():
                whole = [arrays[name] if index is None else arrays[name][index] for name, index, _ in own]
                writer.write_tensor_data(whole[0] if own[0][1] is None else np.stack(whole))
        progress(len(self.packed.units), len(self.packed.units), "the file")
        return errors, opened


def _is_router(tensor: str) -> bool:
    """Whether a tensor is a router's, which llama.cpp's own files have in fp32."""
    return tensor.removesuffix(".weight").rpartition(".")[2] in ROUTERS
