"""Reads a model's safetensors shards module by module, so that the whole model is never in memory."""

import contextlib
import ctypes
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.models.linear import Packed
from quantkit.models.structure import find_blocks
from quantkit.models.ties import tied_names

_SAMPLES, _SAMPLE_BYTES = 64, 2**14
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "BOOL": torch.bool,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""safetensors' names of dtypes."""


class Shards:
    """The tensors of a folder's safetensors files, by name.

    Args:
        folder: holds `model.safetensors`, or shards and their index.

    Raises:
        CheckpointError: no weights, an unreadable index, a missing or truncated shard.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = self._locate()
        self.specs: dict[str, tuple[str, list[int]]] = {}
        for file in dict.fromkeys(self.files.values()):
            with open_shard(self.folder / file) as shard:
                present = set(shard.keys())
                for name in (name for name, place in self.files.items() if place == file):
                    if name not in present:
                        raise CheckpointError(
                            f"{INDEX} places {name!r} in {file}, which does not hold it; fetch it anew"
                        )
                    view = shard.get_slice(name)
                    self.specs[name] = (view.get_dtype(), view.get_shape())

    def _locate(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                files = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{index} is not a safetensors index ({error}); fetch it anew") from error
            missing = sorted({file for file in files.values() if not (self.folder / file).is_file()})
            if missing:
                raise CheckpointError(f"{self.folder}: {INDEX} names shards that are not there: {', '.join(missing)}")
            return files
        if (self.folder / SINGLE).is_file():
            with open_shard(self.folder / SINGLE) as shard:
                return dict.fromkeys(shard.keys(), SINGLE)
        others = sorted(
            p.name for p in self.folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
        )
        found = f"found {', '.join(others[:4])}" if others else "found no weights at all"
        raise CheckpointError(
            f"{self.folder} holds neither {SINGLE} nor {INDEX}; {found}: load the model with transformers and "
            "save_pretrained it to get safetensors"
        )

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) as stored; every tensor is a copy, so no file stays mapped.

        Raises:
            CheckpointError: a shard cannot be read.
        """
        wanted = set(names)
        for file in dict.fromkeys(self.files[name] for name in self.files if name in wanted):
            with open_shard(self.folder / file) as shard:
                for name in (name for name, place in self.files.items() if place == file and name in wanted):
                    yield name, shard.get_tensor(name).clone()

    def tensor_nbytes(self, name: str) -> int:
        """Bytes of one stored tensor."""
        dtype, shape = self.specs[name]
        return math.prod(shape) * torch.empty(0, dtype=DTYPES[dtype]).element_size()

    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(map(self.tensor_nbytes, self.specs))

    def fingerprint(self) -> dict[str, str]:
        """A hash of each file's size, header and samples of its content: another model's differ somewhere."""
        prints = {}
        for file in sorted({*self.files.values(), "config.json"}):
            path = self.folder / file
            size = path.stat().st_size
            digest = hashlib.sha256(str(size).encode())
            with open(path, "rb") as stream:
                for part in range(_SAMPLES):
                    stream.seek(part * size // _SAMPLES)
                    digest.update(stream.read(_SAMPLE_BYTES))
            prints[file] = digest.hexdigest()
        return prints


def open_shard(path: Path):  # noqa: ANN201  (safe_open is untyped)
    """`safe_open` with errors that name the file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}); fetch it anew") from error


def match_names(model: nn.Module, shards: Shards) -> dict[str, str] | None:
    """Names of the model's tensors -> names in the shards, which may lack or carry the base model's prefix.

    Returns:
        The map, or None where the shards store some tensor of the model in another form (renamed, split, fused).
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    tied = tied_names(model)
    mapping: dict[str, str] = {}
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in shapes.items():
        candidates = [name, name.removeprefix(prefix), prefix + name]
        stored = next((c for c in candidates if c in shards.specs), None)
        if stored is None and name in tied:
            continue
        if stored is None or shards.specs[stored][1] != shape:
            return None
        mapping[name] = stored
    return mapping


class ModelTensors:
    """A model's tensors in shards, under the model's names.

    Args:
        shards: where they are.
        mapping: names of the model's tensors -> names in the shards.

    Attributes:
        mapping: the same.
        change: what becomes of a tensor, given its name, once it is read.
    """

    def __init__(self, shards: Shards, mapping: dict[str, str]) -> None:
        self._shards, self.mapping = shards, mapping
        self.change: Callable[[str, Tensor], Tensor] = lambda _name, tensor: tensor

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) in the dtype in which it is stored."""
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self.mapping[name], []).append(name)  # two for a head once tied
        for stored, tensor in self._shards.read(wanted):
            for name in wanted[stored]:
                yield name, self.change(name, tensor)


class ShardedWeights:
    """A WeightSource that reads modules of a model on the meta device from shards and drops them after use.

    Args:
        model: on the meta device.
        tensors: the model's weights.
        dtype: floating-point tensors are cast to it when loaded.
        unused: modules outside the blocks that nothing will run (the head, where it stays dense).
    """

    def __init__(self, model: nn.Module, tensors: ModelTensors, dtype: torch.dtype, unused: set[str]) -> None:
        self._model, self._tensors, self._dtype = model, tensors, dtype
        self._blocks = find_blocks(model)[0] + "."
        self._unused = tuple(f"{name}." for name in unused)

    def _names(self, module_name: str) -> list[str]:
        """The stored tensors of a block, or ("") of everything outside the blocks, but for what is packed by now."""
        if module_name:
            names = [name for name in self._tensors.mapping if name.startswith(f"{module_name}.")]
        else:
            outer = (name for name in self._tensors.mapping if not name.startswith(self._blocks))
            names = [name for name in outer if not name.startswith(self._unused)]
        return [name for name in names if not isinstance(self._model.get_submodule(name.rpartition(".")[0]), Packed)]

    def load(self, name: str, module: nn.Module, device: torch.device) -> None:
        """Reads the tensors of a block, or ("") of everything outside the blocks."""
        for local, tensor in self._tensors.read(self._names(name)):
            value = tensor.to(self._dtype) if tensor.is_floating_point() else tensor
            set_module_tensor_to_device(self._model, local, device, value=value, dtype=value.dtype)
        for buffer_name, buffer in module.named_buffers():
            if name and buffer.device != device and not buffer.is_meta:
                set_module_tensor_to_device(module, buffer_name, device, value=buffer)
        if not name:
            self._model.tie_weights()  # type: ignore[operator]
            _move_outer_buffers(self._model, self._blocks, device)

    def release(self, name: str, module: nn.Module) -> None:
        """Sends the module's stored tensors back to the meta device, packed ones included; computed buffers stay."""
        for child in module.modules() if name else ():
            if isinstance(child, Packed):
                child.to("meta")
        for local in self._names(name):
            set_module_tensor_to_device(self._model, local, "meta")
        if not name:
            self._model.tie_weights()  # type: ignore[operator]
        _return_freed_memory()


def _return_freed_memory() -> None:
    """Gives freed heap pages back to the system; glibc would keep them, and the process would grow block by block."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _move_outer_buffers(model: nn.Module, blocks: str, device: torch.device) -> None:
    """Buffers that are computed rather than stored, such as rotary frequencies."""
    for name, buffer in model.named_buffers():
        if not name.startswith(blocks) and not buffer.is_meta and buffer.device != device:
            set_module_tensor_to_device(model, name, device, value=buffer)


class LoadedWeights:
    """A WeightSource over a model that is in memory: blocks visit the device and go back."""

    def __init__(self, model: nn.Module) -> None:
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise QuantkitError(
                f"the model is spread over {found}; put it on one device, or quantize it from its folder"
            )
        self._home = devices.pop()
        self._model, self._blocks = model, find_blocks(model)[1]

    def load(self, name: str, module: nn.Module, device: torch.device) -> None:
        """Moves a block, or ("") everything outside the blocks, to the device."""
        self._move(name, module, device)

    def release(self, name: str, module: nn.Module) -> None:
        """Moves it back to where the model lives."""
        self._move(name, module, self._home)

    def _move(self, name: str, module: nn.Module, device: torch.device) -> None:
        if name or device == self._home:
            module.to(device)
            return
        inside = {id(child) for child in self._blocks.modules()}
        for child in self._model.modules():
            if id(child) not in inside:
                child._apply(lambda tensor: tensor.to(device), recurse=False)
