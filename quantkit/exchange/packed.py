"""A packed checkpoint as an export reads it, a block at a time: packed layers as weights, all else as it is stored."""

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantkit.core.constants import GUARD, SHIM
from quantkit.core.errors import CheckpointError
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.tied import TiedWeight
from quantkit.io.checkpoint import packed_layers, read_config
from quantkit.io.classes import meta_model
from quantkit.io.conversion import as_stored, stored_layers
from quantkit.io.shards import DTYPES, Shards
from quantkit.models.experts import parts, place
from quantkit.models.structure import find_blocks

DENSE = "`--to dense` writes any model, rounded to the type of its other weights"
"""What helps where a form does not hold a weight."""


class PackedFolder:
    """A packed checkpoint.

    Args:
        folder: of the checkpoint.

    Attributes:
        folder: the same.
        layers: its packed layers, on the meta device; of an embedding and a head that are one, the embedding, by whose
            name dense models store it.
        model: the dense model on the meta device, its experts taken apart.
        prefix: of the decoder blocks' names.
        num_blocks: of them.

    Raises:
        CheckpointError: no packed checkpoint, or a damaged one.
        QuantkitError: transformers knows no such model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = packed_layers(folder)
        every = {name: QuantizedWeight.empty(metadata) for name, metadata in self._metadata.items()}
        self.layers = {name: weight for name, weight in every.items() if not isinstance(weight, TiedWeight)}
        self.model: PreTrainedModel = meta_model(folder, None)
        self.prefix, blocks = find_blocks(self.model)
        self.num_blocks = len(blocks)
        tied = {name: weight.layer for name, weight in every.items() if isinstance(weight, TiedWeight)}
        self._is_tied = any(not self.inside(name) for name in tied)
        embedding = next(name for name, one in self.model.named_modules() if one is self.model.get_input_embeddings())
        self._called = {tied[embedding]: embedding} if embedding in tied else {}
        self._shards = Shards(folder)
        self._units: dict[int, list[str]] = defaultdict(list)
        places = {f"{self.prefix}.{block}": block for block in range(self.num_blocks)}
        depth = self.prefix.count(".") + 2
        for name in self._shards.specs:
            self._units[places.get(".".join(name.split(".")[:depth]), -1)].append(name)
        self._owners = {f"{layer}.{key}": layer for layer, weight in self.layers.items() for key in weight.state()}
        self.layers = {self._called.get(name, name): weight for name, weight in self.layers.items()}

    @property
    def units(self) -> tuple[int, ...]:
        """What is read together: each block, and at the end (-1) all that is outside of them."""
        return (*range(self.num_blocks), -1)

    @cached_property
    def places(self) -> dict[str, list[tuple[str, Tensor]]]:
        """Where the model's files have each packed layer, and each expert's: (name, int64 [outputs]) of every part."""
        experts = [name.removesuffix(".weight") for name in parts(self.model) if name.endswith(".weight")]
        return stored_layers(self.model, dict.fromkeys([*self.layers, *experts]))

    def as_stored(self, dense: dict[str, Tensor]) -> dict[str, Tensor]:
        """A unit's dense tensors as the model's files have them; of experts that lie there one by one, not all need be
        given.
        """
        found: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for name, tensor in dense.items():
            layer, _, what = name.rpartition(".")
            own = self.places.get(layer, []) if what == "weight" and place(layer) is not None else []
            found |= {f"{stored}.weight": tensor[rows] for stored, rows in own}
            if not own:
                whole[name] = tensor
        return found | as_stored(self.model, whole)

    def inside(self, layer: str) -> bool:
        """Whether a layer is part of a decoder block."""
        return layer.startswith(f"{self.prefix}.")

    def described(self, unit: int) -> dict[str, QuantizedWeight | Tensor]:
        """What `read` gives of a unit, by name, on the meta device."""
        found: dict[str, QuantizedWeight | Tensor] = {}
        for name in self._units[unit]:
            layer = self._owners.get(name)
            if layer is not None:
                called = self._called.get(layer, layer)
                found[called] = self.layers[called]
            else:
                dtype, shape = self._shards.specs[name]
                found[name] = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
        return found

    def field(self, layer: str, key: str) -> Tensor:
        """One tensor of a packed layer."""
        own = next((name for name, called in self._called.items() if called == layer), layer)
        return next(tensor for _, tensor in self._shards.read([f"{own}.{key}"]))

    def read(self, unit: int) -> Iterator[tuple[str, QuantizedWeight | Tensor]]:
        """Yields (name, weight) of a unit's packed layers, and (name, tensor) of its other tensors.

        Args:
            unit: one of `units`.

        Raises:
            CheckpointError: a file cannot be read, or a layer's tensors are not what its metadata say.
        """
        kept: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in self._shards.read(self._units[unit]):
            layer = self._owners.get(name)
            if layer is None:
                yield name, tensor
                continue
            kept[layer][name.removeprefix(f"{layer}.")] = tensor
            called = self._called.get(layer, layer)
            if len(kept[layer]) == len(self.layers[called].state()):
                try:
                    weight = QuantizedWeight.from_state(self._metadata[layer], kept.pop(layer))
                    weight.validate()
                except (ValueError, CheckpointError) as error:
                    raise CheckpointError(f"{layer}: {error}; the checkpoint is damaged") from error
                yield called, weight

    def as_dense(self, name: str, weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor that the dense model has for a packed layer, [out, in] or as its class has it.

        Args:
            name: of the layer.
            weight: of the layer.
            dtype: of the tensor; None for the model's.
        """
        module: Any = self.model.get_submodule(name)
        dense = weight.dequantize(dtype or module.weight.dtype)
        return dense.T if isinstance(module, Conv1D) else dense

    def config(self) -> dict[str, Any]:
        """config.json of the dense model that was packed."""
        config = {key: value for key, value in read_config(self.folder).items() if key != "quantization_config"}
        if config.get("transformers_weights") == GUARD:
            del config["transformers_weights"]
        own = {auto: code for auto, code in config.get("auto_map", {}).items() if SHIM not in str(code)}
        config.pop("auto_map", None)
        if self._is_tied:  # which packing ended
            config["tie_word_embeddings"] = True
        return config | ({"auto_map": own} if own else {})

    def fingerprint(self) -> dict[str, str]:
        """What tells this checkpoint from any other."""
        return self._shards.fingerprint()


def named_after(model: str, to: str) -> Path:
    """What an export makes of a folder or hub id where nobody names it: it lies in the working directory."""
    name = Path(model).expanduser().resolve().name
    return Path(f"{name}.gguf" if to == "gguf" else f"{name}-{to}")
