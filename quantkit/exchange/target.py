"""What an export has to know of the form that it writes; the forms are in the files beside."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.core.errors import QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.exchange.packed import DENSE, PackedFolder
from quantkit.io.beside import files_beside
from quantkit.io.run_folder import Output
from quantkit.io.shards import INDEX, checksum, open_shard
from quantkit.models.experts import parts

Told = Callable[[int, int, str], None]
"""Called with (units done, units in all, what comes next)."""


@dataclass(frozen=True)
class Exported:
    """What an export came to.

    Attributes:
        output: what was made.
        to: its form.
        layers: packed layers that are packed there too.
        dense: packed layers that became dense.
        error: the most by which a layer that stayed packed differs from what it was, |W' - W| / |W| (Frobenius); 0 if
            none does.
        nbytes: of the weights.
    """

    output: Path
    to: str
    layers: int
    dense: tuple[str, ...]
    error: float
    nbytes: int


class Target(ABC):
    """A form of a model that other programs read.

    Args:
        packed: what is exported.
        dtype: of scales and dense weights; None for what suits.

    Attributes:
        packed: the same.
        dtype: as it is to be.

    Raises:
        QuantkitError: a package is missing, or the form does not hold the model; the message says what would.
    """

    name: ClassVar[str]
    outer: ClassVar[bool] = False
    """Whether the form holds layers outside of the blocks, the embedding and the head."""

    def __init__(self, packed: PackedFolder, dtype: torch.dtype | None = None) -> None:
        self.packed, self.dtype = packed, dtype
        refused = {name: why for name, weight in self._held() if (why := self.refusal(name, weight))}
        if refused:
            name, why = next(iter(refused.items()))
            more = f" (and {len(refused) - 1} more layers)" if len(refused) > 1 else ""
            raise QuantkitError(f"{name}{more}: {self.name} does not hold {why}")

    def _held(self) -> list[tuple[str, QuantizedWeight]]:
        return [(name, weight) for name, weight in self.packed.layers.items() if self.holds(name)]

    def holds(self, layer: str) -> bool:
        """Whether a packed layer stays packed; the others become dense."""
        return self.outer or self.packed.inside(layer)

    def refuse_nothing(self) -> None:
        """Raises QuantkitError where no layer would stay packed."""
        if not self._held():
            raise QuantkitError(f"no layer that {self.name} holds is packed; {DENSE}")

    def check_experts(self, form: Callable[[QuantizedWeight], Hashable]) -> None:
        """Looks whether the experts of each block can be one tensor, as readers have them.

        Args:
            form: what is the same of weights that go together.

        Raises:
            QuantkitError: they are packed in several ways.
        """
        ways: dict[str, dict[Hashable, str]] = {}
        for name, part in parts(self.packed.model).items():
            layer = name.removesuffix(".weight")
            weight = self.packed.layers.get(layer)
            if layer != name:
                way = None if weight is None or not self.holds(layer) else form(weight)
                ways.setdefault(part.stack, {}).setdefault(way, layer)
        for layers in ways.values():
            if len(layers) > 1:
                raise QuantkitError(
                    f"{' and '.join([*layers.values()][:2])} are stored in two ways, and readers of {self.name} have "
                    "the experts of a block in one tensor; give them one width and size of groups"
                )

    @abstractmethod
    def refusal(self, name: str, weight: QuantizedWeight) -> str:
        """What of a layer on the meta device the form does not hold, and what would help; "" where it does."""

    @abstractmethod
    def tensors(self, name: str, weight: QuantizedWeight) -> tuple[dict[str, Tensor], Tensor]:
        """What is stored of a layer, by its name in the files, and the weight that readers make of it, fp32 [out, in].

        Raises:
            QuantkitError: the form does not hold its numbers.
        """

    @abstractmethod
    def write(self, output: Path, resume: bool, overwrite: bool, progress: Told) -> Exported:
        """Writes the model; see `exchange.export.export_folder`."""

    @classmethod
    def check(cls, folder: Path, output: Path, resume: bool, overwrite: bool) -> None:
        """Looks whether a packed folder can be written so, before its weights are read.

        Raises:
            QuantkitError: something else is there, it would lie in the packed folder, or the form has no such model.
        """
        Output(output, folder, resume=resume, overwrite=overwrite)

    def cast(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of numbers in the type asked for.

        Raises:
            QuantkitError: numbers are too large for it.
        """
        if self.dtype is None or not tensor.is_floating_point() or tensor.dtype == self.dtype:
            return tensor
        made = tensor.to(self.dtype)
        if not torch.isfinite(made).all() and torch.isfinite(tensor).all():
            raise QuantkitError(f"{name} has numbers beyond {self.dtype}; give another `dtype`")
        return made


class FolderTarget(Target):
    """A folder with config.json and safetensors, under the names in which transformers saves the model, which are those
    that other programs know; written a block at a time, and a run that was stopped goes on where it was.
    """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """config.json."""

    def arranged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A unit's tensors under the form's own names, where these are not those of the model's files."""
        return tensors

    def settings(self) -> dict[str, Any]:
        """JSON of what was asked for; a run goes on only if it was asked for the same."""
        return {"to": self.name, "dtype": str(self.dtype)}

    def write(self, output: Path, resume: bool, overwrite: bool, progress: Told) -> Exported:
        """Writes the folder a block at a time, and publishes it."""
        made, count = Output(output, self.packed.folder, resume=resume, overwrite=overwrite), len(self.packed.units)
        with made.begin(self.settings() | {"packed": self.packed.fingerprint()}):
            for nth, unit in enumerate(self.packed.units):
                progress(nth, count, "the rest" if unit < 0 else f"block {unit}")
                stem = _stem(nth, count)
                shard = made.made(f"{stem}.safetensors")
                if not made.has(shard):
                    tensors, record = self._unit(unit)
                    made.write_record(f"{stem}.json", record)
                    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
                    made.write(shard, partial(_save, tensors), needed)
            progress(count, count, "the folder")
            return self._finish(made)

    def _unit(self, unit: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors of a unit, and what is to be remembered of them."""
        found: dict[str, Tensor] = {}
        dense: dict[str, Tensor] = {}
        errors: dict[str, float] = {}
        opened: list[str] = []
        for name, value in self.packed.read(unit):
            if not isinstance(value, QuantizedWeight):
                dense[name] = self.cast(name, value)
            elif self.holds(name):
                stored, read = self.tensors(name, value)
                found |= stored
                errors[name] = difference(read, value)
            else:
                dense[f"{name}.weight"] = self.packed.as_dense(name, value, self.dtype)
                opened.append(name)
        found = self.arranged(found | self.packed.as_stored(dense))
        sums = {name: checksum(tensor) for name, tensor in found.items()}
        return found, {"errors": errors, "dense": opened, "checksums": sums}

    def _finish(self, made: Output) -> Exported:
        stems = [_stem(nth, len(self.packed.units)) for nth in range(len(self.packed.units))]
        records = [
            made.read_record(f"{stem}.json", "what was written of a block; remove it and its shard") for stem in stems
        ]
        weight_map: dict[str, str] = {}
        for stem in stems:
            with open_shard(made.path(made.made(f"{stem}.safetensors"))) as shard:
                weight_map |= dict.fromkeys(shard.keys(), f"{stem}.safetensors")
        nbytes = sum(made.path(made.made(f"{stem}.safetensors")).stat().st_size for stem in stems)
        for name, content in files_beside(self.packed.folder).items():
            made.write_bytes(made.made(name), content)
        made.write_json(made.made("config.json"), self.config())
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        made.write_json(made.made(INDEX), index)
        made.publish({name: value for record in records for name, value in record["checksums"].items()})
        errors = [error for record in records for error in record["errors"].values()]
        opened = tuple(name for record in records for name in record["dense"])
        return Exported(made.output, self.name, len(errors), opened, max(errors, default=0.0), nbytes)


def _stem(nth: int, count: int) -> str:
    return f"model-{nth + 1:05d}-of-{count:05d}"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def difference(read: Tensor, weight: QuantizedWeight) -> float:
    """|W' - W| / |W| of what readers make of a weight, fp32 [out, in]."""
    exact = weight.dequantize(torch.float32)
    return float((read - exact).norm() / exact.norm().clamp_min(1e-30))
