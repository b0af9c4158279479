"""The database of candidates: every layer, packed in several ways, with what each costs and loses.

    FOLDER/run.json                         whose candidates these are: model, calibration, the prefix they were fed by
    FOLDER/block-00001/KEY.safetensors      one way to pack a block's layers, tensors named as in a checkpoint
    FOLDER/block-00001/KEY.json             its quantizer, and each layer's metadata, relative error and damping

A file appears whole, and its presence says that it is done, so that a build which was killed goes on where it stopped,
another set of candidates adds what is missing, and several searches may read one database once it is filled. Candidates
that are equal have equal keys, hence one file. The full model's predictions lie beside them, in folders `teacher-...`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from quantkit.core import spec
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.core.protocols import Quantizer
from quantkit.core.result import LayerResult
from quantkit.core.weight import QuantizedWeight
from quantkit.io.run_folder import RunFolder
from quantkit.io.shards import checksum, open_shard
from quantkit.models.plan import Plan, tied, with_own_weight

if TYPE_CHECKING:
    from quantkit.io.source import Source

VERSION = 1


@dataclass(frozen=True)
class Candidate:
    """One way to pack one layer.

    Attributes:
        nbytes: of its tensors.
        relative_error: proxy loss over that of an empty weight.
        damping: with which the Hessian factored, or None.
        predicted_kl: what it is expected to cost, in nats a token; None where the database was made without `fisher`.
        metadata: see `QuantizedWeight.metadata`.
    """

    nbytes: int
    relative_error: float
    damping: float | None
    metadata: dict[str, Any]
    predicted_kl: float | None = None


def candidate_key(quantizer: Quantizer) -> str:
    """The name of a quantizer's files: equal for equal settings."""
    text = spec.write(quantizer)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")[:60]
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class Store:
    """A database of candidates on disk.

    Args:
        folder: where it is, or will be.
        identity: JSON of all that candidates depend on but for their own settings.
        num_blocks: decoder blocks of the model; layers outside them count as one more.

    Raises:
        QuantkitError: the folder holds something else, or candidates of another model or calibration.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], num_blocks: int) -> None:
        self.identity, self.num_blocks = {"version": VERSION, **identity}, num_blocks
        self._folder = RunFolder(folder, "a database of candidates")
        self._sidecars: dict[str, dict[str, Any]] = {}
        if found := self._folder.differing(self.identity):
            raise QuantkitError(
                f"{folder} holds candidates of another run ({'; '.join(found)}); give another `database`, or remove it"
            )

    def own(self, name: str) -> Path:
        """A folder in the database for what its candidates are made by; see `RunFolder.own`."""
        return self._folder.own(name)

    def begin(self) -> AbstractContextManager[Any]:
        """The time in which candidates are written; see `RunFolder.begin`."""
        return self._folder.begin(self.identity)

    def has(self, index: int, key: str) -> bool:
        """Whether a block's candidates of one kind are there."""
        return self._folder.has(self._name(index, key))

    def write(self, index: int, key: str, quantizer: Quantizer, layers: Mapping[str, LayerResult]) -> None:
        """Makes a block's candidates of one kind durable; what is there stays."""
        if self.has(index, key):
            return
        tensors = {
            f"{layer}.{name}": tensor.cpu().contiguous()
            for layer, result in layers.items()
            for name, tensor in result.weight.state().items()
        }
        entries = {
            layer: {
                "nbytes": result.weight.nbytes,
                "relative_error": result.relative_error,
                "damping": result.damping,
                "predicted_kl": result.predicted_kl,
                "metadata": result.weight.metadata(),
            }
            for layer, result in layers.items()
        }
        checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
        sidecar = {"quantizer": spec.write(quantizer), "layers": entries, "checksums": checksums}
        self._folder.write_record(self._name(index, key, "json"), sidecar)
        needed = sum(tensor.nbytes for tensor in tensors.values())
        save = partial(save_file, tensors, metadata={"format": "pt"})
        self._folder.write(self._name(index, key), save, needed)

    def candidates(self, index: int, key: str) -> dict[str, Candidate]:
        """A block's candidates of one kind, by layer.

        Raises:
            CheckpointError: they are missing or damaged.
        """
        return {layer: Candidate(**entry) for layer, entry in self._sidecar(index, key)["layers"].items()}

    def load(self, index: int, key: str, layers: Iterable[str]) -> dict[str, QuantizedWeight]:
        """Some layers' packed weights.

        Raises:
            CheckpointError: the file is damaged.
        """
        path, sidecar = self._folder.path(self._name(index, key)), self._sidecar(index, key)
        weights = {}
        with open_shard(path) as shard:
            present = set(shard.keys())
            for layer in layers:
                state = {}
                for name in (name for name in sidecar["checksums"] if name.startswith(f"{layer}.")):
                    tensor = shard.get_tensor(name) if name in present else None
                    if tensor is None or checksum(tensor) != sidecar["checksums"][name]:
                        raise CheckpointError(f"{path} is damaged at {name}; remove it, and the next run makes it anew")
                    state[name.removeprefix(f"{layer}.")] = tensor
                weights[layer] = QuantizedWeight.from_state(sidecar["layers"][layer]["metadata"], state)
        return weights

    def load_one(self, index: int, key: str, layer: str) -> QuantizedWeight:
        """One layer's; see `load`."""
        return self.load(index, key, [layer])[layer]

    def _name(self, index: int, key: str, suffix: str = "safetensors") -> str:
        return f"block-{self.num_blocks + 1 if index < 0 else index + 1:05d}/{key}.{suffix}"

    def _sidecar(self, index: int, key: str) -> dict[str, Any]:
        name = self._name(index, key, "json")
        if name not in self._sidecars:
            what = "a record of candidates; remove it and the file beside it"
            self._sidecars[name] = self._folder.read_record(name, what)
        return self._sidecars[name]


def end_key(layer: str, quantizer: Quantizer) -> str:
    """The name of the file of a layer that is packed in one way."""
    return f"{layer}-{candidate_key(quantizer)}"


@dataclass(frozen=True)
class Database:
    """A model's candidates, all there.

    Attributes:
        store: on disk.
        quantizers: by key, in the order asked for.
        blocks: each searched layer's block, -1 for layers outside the blocks; in model order.
        fixed: quantizers of the layers that are packed in one way, the head and the embedding.
        source: the full-precision model.
        settings: JSON of the calibration.
        bytes_before: of all tensors of the full model.
    """

    store: Store
    quantizers: dict[str, Quantizer]
    blocks: dict[str, int]
    fixed: Plan
    source: Source
    settings: dict[str, Any]
    bytes_before: int

    def ends(self) -> dict[str, LayerResult]:
        """The layers of `fixed`, packed."""
        results = {}
        for name, quantizer in with_own_weight(self.fixed).items():
            key = end_key(name, quantizer)
            made = self.store.candidates(-1, key)[name]
            results[name] = LayerResult(self.store.load_one(-1, key, name), made.relative_error, made.damping)
        for name, layer in tied(self.fixed).items():
            layout = self.fixed[name].layout(*results[layer].weight.shape)
            results[name] = replace(results[layer], weight=layout)
        return results
