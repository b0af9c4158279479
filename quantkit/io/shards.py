"""A folder's safetensors files: their tensors by name, read one at a time."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from quantkit.core.errors import CheckpointError
from quantkit.core.schema import in_words
from quantkit.io.files import leads_below, parse_json

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
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
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
        if (self.folder / SINGLE).is_file():  # before an index, as for transformers: one may be left of an earlier save
            with open_shard(self.folder / SINGLE) as shard:
                return dict.fromkeys(shard.keys(), SINGLE)
        index = self.folder / INDEX
        if index.is_file():
            files = _weight_map(index)
            missing = sorted({file for file in files.values() if not (self.folder / file).is_file()})
            if missing:
                raise CheckpointError(f"{self.folder}: {INDEX} names shards that are not there: {', '.join(missing)}")
            return files
        others = sorted(
            p.name for p in self.folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
        )
        found = f"found {', '.join(others[:4])}" if others else "found no weights at all"
        if ggufs := [name for name in others if name.endswith(".gguf")]:
            raise CheckpointError(f"{self.folder} holds GGUF files; give the one that is meant: {', '.join(ggufs[:4])}")
        raise CheckpointError(
            f"{self.folder} holds neither {SINGLE} nor {INDEX}; {found}: load the model with transformers and "
            "save_pretrained it to get safetensors"
        )

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) in the shape and dtype of the file; each is a copy, so no file stays mapped.

        Raises:
            CheckpointError: a shard cannot be read.
        """
        wanted = set(names)
        for file in dict.fromkeys(self.files[name] for name in self.files if name in wanted):
            with open_shard(self.folder / file) as shard:
                for name in (name for name, place in self.files.items() if place == file and name in wanted):
                    yield name, shard.get_tensor(name).clone()

    def checksums(self) -> dict[str, str]:
        """The `checksum` of every stored tensor; reads all of them.

        Raises:
            CheckpointError: a shard cannot be read.
        """
        return {name: checksum(tensor) for name, tensor in self.read(self.specs)}

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


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, by an index.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        found = parse_json(index)
        found = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(found, dict) or not found:
            raise ValueError("it has no weight_map")
    except ValueError as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error}); fetch it anew") from error
    for name, file in found.items():
        if not leads_below(index.parent, file):
            raise CheckpointError(
                f"{index} places {name!r} in {in_words(file)}, which is no file of the folder; fetch it anew"
            )
    return found


def checksum(tensor: Tensor) -> str:
    """xxh3 of 64 bits over a tensor's [...] bytes, on the CPU, in hexadecimal: it finds damage, and no forgery."""
    return xxh3_64_hexdigest(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """One checksum of several tensors: of their names, types, shapes and bytes."""
    parts = (f"{name} {tensor.dtype} {list(tensor.shape)} {checksum(tensor.cpu())}" for name, tensor in tensors.items())
    return str(xxh3_64_hexdigest("\n".join(sorted(parts)).encode()))


def header_checksum(path: Path) -> str:
    """xxh3 of a safetensors file's header: the names, types, shapes and places of its tensors.

    Raises:
        CheckpointError: it has none.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length <= path.stat().st_size - 8 else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); fetch it anew") from error
    if not header:
        raise CheckpointError(f"{path} is truncated or not a safetensors file; fetch it anew")
    return xxh3_64_hexdigest(header)


def open_shard(path: Path):  # noqa: ANN201  (safe_open is untyped)
    """`safe_open` with errors that name the file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; fetch it anew") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}); fetch it anew") from error
