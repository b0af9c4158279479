"""What an assignment means on a model in memory: which candidate each layer has, or which blocks are left out."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.core import spec
from quantkit.core.device import free_memory
from quantkit.core.protocols import Quantizer
from quantkit.core.weight import QuantizedWeight
from quantkit.evopress.evolve import Assignment, Index
from quantkit.evopress.store import Candidate, Database
from quantkit.models.embedding import put
from quantkit.models.experts import of_all
from quantkit.models.forward import Wrap, bare
from quantkit.models.linear import Packed, QuantizedLinear, new_linear
from quantkit.models.structure import find_blocks

CACHE_FRACTION = 1 / 4
"""Fraction of the free memory that unpacked candidates may take."""


Cost = Callable[[QuantizedWeight, Quantizer], int]
"""What a candidate costs, in the budget's units; its weight is on the meta device."""


def _nbytes(weight: QuantizedWeight, _quantizer: Quantizer) -> int:
    return weight.nbytes


def genes(layers: Iterable[str], each_expert: bool) -> dict[str, tuple[str, ...]]:
    """What a search gives a level: a layer, or all of a block's experts at the same place, by name -> its layers."""
    found: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        name = layer if each_expert else of_all(layer)
        found[name] = (*found.get(name, ()), layer)
    return found


class CandidateSpace:
    """Layers that take one of their candidates. Only layers that changed are touched.

    A layer's level is its candidate by cost; one that costs no less than another with less error is left out. The head
    and the embedding are packed from the beginning, where the database has them.

    Args:
        model: the full-precision model, on its device; its layers are replaced.
        database: of its candidates.
        dtype: of unpacked weights.
        cost: of a candidate; by default its bytes.
        each_expert: whether each expert has levels of its own, instead of all of a block's at the same place.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype,
        database: Database,
        cost: Cost = _nbytes,
        each_expert: bool = False,
    ) -> None:
        self.model, self._dtype, self.database = model, dtype, database
        for name, result in database.ends().items():
            _unpack(put(model, name, result.weight.map(lambda tensor: tensor.to(model.device))), dtype)
        self._genes = genes(database.blocks, each_expert)
        self.names = list(self._genes)
        self.keys: list[tuple[str, ...]] = []
        self.losses = []
        self.predicted: list[tuple[float, ...]] = []
        costs = []
        for layers in self._genes.values():
            offers = []
            for key, quantizer in database.quantizers.items():
                own = [database.store.candidates(database.blocks[layer], key)[layer] for layer in layers]
                price = sum(cost(QuantizedWeight.empty(candidate.metadata), quantizer) for candidate in own)
                offers.append((price, sum(candidate.relative_error for candidate in own), key, own))
            kept: list[tuple[int, float, str, list[Candidate]]] = []
            for offer in sorted(offers, key=lambda offer: offer[:3]):
                if not kept or (offer[0] > kept[-1][0] and offer[1] < kept[-1][1]):
                    kept.append(offer)
            costs.append(tuple(price for price, *_ in kept))
            self.losses.append(tuple(loss for _, loss, *_ in kept))
            self.keys.append(tuple(key for *_, key, _ in kept))
            expected = [[candidate.predicted_kl for candidate in own] for *_, own in kept]
            known = not any(None in kls for kls in expected)
            self.predicted.append(tuple(sum(kl for kl in kls if kl is not None) for kls in expected) if known else ())
        self.index = Index(tuple(costs))
        fixed = {name: spec.write(quantizer) for name, quantizer in database.fixed.items()}
        self.identity: Any = [database.store.identity, self.keys, fixed]
        self._present: dict[str, str] = {}
        self._linears: OrderedDict[tuple[str, str], QuantizedLinear] = OrderedDict()
        self._budget = int(CACHE_FRACTION * free_memory(model.device))

    def chosen(self, assignment: Assignment) -> dict[str, str]:
        """Each layer's candidate."""
        return {
            layer: keys[level]
            for layers, keys, level in zip(self._genes.values(), self.keys, assignment, strict=True)
            for layer in layers
        }

    def apply(self, assignment: Assignment) -> None:
        """See `Space`.

        Raises:
            CheckpointError: a candidate's file is damaged.
        """
        for name, key in self.chosen(assignment).items():
            if self._present.get(name) != key:
                self.model.set_submodule(name, self._linear(name, key))
                self._present[name] = key
        self._make_room()

    def _linear(self, name: str, key: str) -> QuantizedLinear:
        """A layer with one of its candidates, unpacked."""
        if (name, key) not in self._linears:
            weight = self.database.store.load_one(self.database.blocks[name], key, name)
            weight = weight.map(lambda tensor: tensor.to(self.model.device))
            linear = new_linear(weight, self.model.get_submodule(name))
            _unpack(linear, self._dtype)
            self._linears[name, key] = linear
        self._linears.move_to_end((name, key))
        return self._linears[name, key]

    def _make_room(self) -> None:
        """Drops candidates, the longest unused first, where they take too much.

        Those in the model stay, and stay unpacked, so that a figure does not depend on what was measured before it.
        """
        present = set(self._present.items())
        size = sum(_held_bytes(linear, self._dtype) for linear in self._linears.values())
        for old in [old for old in self._linears if old not in present]:
            if size <= self._budget:
                return
            size -= _held_bytes(self._linears.pop(old), self._dtype)


def _unpack(module: Packed, dtype: torch.dtype) -> None:
    """Readies a linear layer for many inputs."""
    if isinstance(module, QuantizedLinear):
        module.packed.prepare()
        module.hold(dtype)


def _held_bytes(linear: QuantizedLinear, dtype: torch.dtype) -> int:
    return linear.in_features * linear.out_features * dtype.itemsize


class BlockSpace:
    """Blocks that stay (level 1) or are left out (level 0): depth pruning. The budget counts blocks.

    Args:
        model: on its device.
        _dtype: of unpacked weights, of which there are none.
    """

    def __init__(self, model: PreTrainedModel, _dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        prefix, self._list = find_blocks(model)
        self._blocks = list(self._list)
        self.names = [f"{prefix}.{index}" for index in range(len(self._blocks))]
        self.index = Index(((0, 1),) * len(self._blocks))
        self.losses: list[tuple[float, ...]] = [(1.0, 0.0)] * len(self._blocks)
        self.predicted: list[tuple[float, ...]] = [()] * len(self._blocks)
        self.identity: Any = "blocks"
        self._wrap = _returned_form(model, self._blocks[0])

    def apply(self, assignment: Assignment) -> None:
        """See `Space`; a block that is left out hands its input on."""
        for index, (block, level) in enumerate(zip(self._blocks, assignment, strict=True)):
            self._list[index] = block if level else _Skipped(block, self._wrap)

    def pruned(self, assignment: Sequence[int]) -> PreTrainedModel:
        """The model without the blocks that are left out, as one that can be saved."""
        kept = [index for index, level in enumerate(assignment) if level]
        prefix = self.names[0].rsplit(".", 1)[0]
        self.model.set_submodule(prefix, nn.ModuleList(self._blocks[index] for index in kept))
        config = self.model.config.get_text_config()
        count = len(self._blocks)
        for key, value in list(config.to_dict().items()):
            if isinstance(value, list) and len(value) == count:  # layer_types and their like
                setattr(config, key, [value[index] for index in kept])
        config.num_hidden_layers = len(kept)
        for layer_idx, index in enumerate(kept):
            for module in self._blocks[index].modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = layer_idx  # type: ignore[assignment]  # caches go by it
        return self.model


class _Skipped(nn.Module):
    """In a block's place: its input is its output, in the form in which the block returns it."""

    def __init__(self, block: nn.Module, wrap: Wrap) -> None:
        super().__init__()
        self._wrap = wrap
        for name in ("attention_type", "layer_type"):  # models choose masks by it
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden: Tensor, *_args: object, **_kwargs: object) -> Any:
        """The input [batch, length, hidden]."""
        return self._wrap(hidden)


@torch.no_grad()
def _returned_form(model: PreTrainedModel, block: nn.Module) -> Wrap:
    """How blocks return hidden states: as they are, or as the first of several."""
    outputs: list[Any] = []
    handle = block.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        handle.remove()
    rest = outputs[0][1:] if isinstance(outputs[0], tuple) else None
    return bare if rest is None else lambda hidden: (hidden, *rest)
