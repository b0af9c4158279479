"""Where a model's tensors are in its files, which may hold them under other names and in other shapes.

transformers knows for each model how its files become its tensors (`transformers.core_model_loading`): renamed, split,
concatenated, experts stacked. `origins` asks it, so that any such model is read a tensor at a time; of experts that are
stored one by one, no more than those that are wanted.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from quantkit.core.errors import QuantkitError
from quantkit.io.shards import DTYPES, Shards
from quantkit.models.experts import Apart, Part, parts
from quantkit.models.structure import linear_weight
from quantkit.models.ties import inner_ties, tied_names

_COMPUTED = ("inv_freq", "masked_bias")
"""Last words of names that older versions of transformers stored, and that nothing reads any more."""


class _Group:
    """Stored tensors that together become one or several of a model's.

    Args:
        model: whose.
        first: the name that the first of the model's tensors has there.
        converter: transformers' for them; None where a single tensor is taken as it is.

    Attributes:
        sources: stored names by the converter's pattern, in order.
    """

    def __init__(self, model: nn.Module, first: str, converter: WeightConverter | None) -> None:
        self._model, self._first, self._converter = model, first, converter
        self.sources: dict[str, list[str]] = {}

    @property
    def by_expert(self) -> bool:
        """Whether each expert has stored tensors of its own, one a pattern."""
        return self._converter is not None and _is_stack(self._converter.operations[0])

    def names(self, expert: int | None = None) -> list[str]:
        """Stored names of all, or of one expert."""
        return [name for own in self.sources.values() for name in (own if expert is None else own[expert : expert + 1])]

    def convert(self, stored: Mapping[str, Tensor], expert: int | None = None) -> dict[str, Tensor]:
        """The model's tensors by name; those of one expert are stacks of one."""
        if self._converter is None:
            return {self._first: stored[self.names()[0]]}
        converter = copy.deepcopy(self._converter)
        for pattern, names in self.sources.items():
            for name in names if expert is None else names[expert : expert + 1]:
                converter.add_tensor(self._first, name, pattern, stored[name])  # type: ignore[arg-type]
        model: Any = _Stacked(self._model)
        found = converter.convert(self._first, model=model, config=self._model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in found.items()}


class _Stacked:
    """A model in which transformers' operations find experts' stacks, although these have been taken apart."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        """See `nn.Module.get_parameter`; a stack is one without numbers, of its shape."""
        place, _, stack = name.rpartition(".")
        module = self._model.get_submodule(place)
        return module.like_stack(stack) if isinstance(module, Apart) else self._model.get_parameter(name)


def _is_stack(operation: Any) -> bool:
    return isinstance(operation, MergeModulelist) and operation.dim == 0


@dataclass(frozen=True)
class Origin:
    """Where a tensor of a model comes from.

    Attributes:
        group: the stored tensors that it is made of.
        name: its own, or that of the stack whose part it is.
        part: of that stack; None for a tensor of its own.
        nbytes: that it takes in its stored dtype.
    """

    group: _Group
    name: str
    part: Part | None
    nbytes: int

    @property
    def expert(self) -> int | None:
        """The one whose stored tensors are all that is needed; None where all are."""
        return self.part.expert if self.part is not None and self.group.by_expert else None

    @property
    def stored(self) -> list[str]:
        """Names of the stored tensors that are read for it."""
        return self.group.names(self.expert)

    def taken_from(self, found: Mapping[str, Tensor]) -> Tensor:
        """The tensor, of what its group gave."""
        whole = found[self.name]
        if self.part is None:
            return whole
        own = whole[0 if self.expert is not None else self.part.expert]
        return own.T if self.part.transposed else own


def origins(model: nn.Module, shards: Shards) -> dict[str, Origin] | None:
    """Where each tensor of a model on the meta device comes from, by its name.

    Returns:
        The map, without tensors that are tied to others but for those inside the blocks; None where one cannot be had
        from the shards, or where transformers converts it in a way that cannot be told without its numbers.

    Raises:
        QuantkitError: a tensor of floating-point numbers is stored as something else.
    """
    state, taken = model.state_dict(), parts(model)
    wanted = {taken[name].stack if name in taken else name: tensor for name, tensor in state.items()}
    groups = _groups(model, shards, wanted)
    made: dict[str, tuple[_Group, Tensor]] = {}
    for group in groups:
        try:
            found = group.convert({name: _empty(shards, name) for name in group.names()})
        except Exception:  # operations that look at numbers, which a tensor on the meta device has none of
            return None
        made |= {name: (group, tensor) for name, tensor in found.items()}
    tied, mapping = tied_names(model), {}
    counts = Counter(part.stack for part in taken.values())
    for name, tensor in state.items():
        part = taken.get(name)
        key = part.stack if part is not None else name
        if key not in made:
            if name in tied:
                continue
            return None
        group, whole = made[key]
        _check_kind(group, shards, key, tensor, model)
        _check_experts(group, key, whole, counts)
        shape = part.of(whole).shape if part is not None else whole.shape
        if shape != tensor.shape:
            return None
        mapping[name] = Origin(group, key, part, tensor.numel() * whole.element_size())
    return {name: mapping[origin] for name, origin in inner_ties(model).items() if origin in mapping} | mapping


def others(model: nn.Module, shards: Shards, mapping: Mapping[str, Origin]) -> list[str]:
    """Stored tensors that belong to no part of a model, such as layers that predict several tokens ahead.

    Those that the model works out by itself, rotary frequencies and masks, are not among them.
    """
    used = {name for origin in mapping.values() for name in origin.group.names()}
    used |= {stored for stored in shards.specs if stored.rpartition(".")[2] in _COMPUTED}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, _ in model.named_buffers():
        used |= {name, name.removeprefix(prefix)}
    return [name for name in shards.specs if name not in used]


def _groups(model: nn.Module, shards: Shards, wanted: Mapping[str, Tensor]) -> list[_Group]:
    """Stored tensors as transformers puts them together; see its `convert_and_load_state_dict_in_model`."""
    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = getattr(model, "base_model_prefix", "")
    groups: dict[str, _Group] = {}
    for stored in sorted(shards.specs, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, wanted)  # type: ignore[arg-type]
        if name not in wanted:
            name, pattern = rename_source_key(stored, [], [], prefix, wanted)  # type: ignore[arg-type]
        if name in wanted:
            converter = None if pattern is None else by_pattern[pattern]
            group = groups.setdefault(name, _Group(model, name, converter))
            group.sources.setdefault(pattern or stored, []).append(stored)
    return list(groups.values())


def _empty(shards: Shards, name: str) -> Tensor:
    kind, shape = shards.specs[name]
    return torch.empty(shape, dtype=DTYPES.get(kind, torch.uint8), device="meta")


def _check_kind(group: _Group, shards: Shards, name: str, tensor: Tensor, model: nn.Module) -> None:
    for stored in group.names():
        kind = shards.specs[stored][0]
        if tensor.is_floating_point() and not getattr(DTYPES.get(kind), "is_floating_point", False):
            raise QuantkitError(
                f"{stored} is {kind} in its file, and {type(model).__name__} has floating-point numbers there; "
                "fetch it anew"
            )


def _check_experts(group: _Group, stack: str, whole: Tensor, counts: Mapping[str, int]) -> None:
    """Raises QuantkitError where files hold more or fewer experts than the model has."""
    wanted = counts.get(stack)
    if wanted is None:
        return
    stored = {len(whole), *(len(names) for names in group.sources.values() if group.by_expert)}
    if stored != {wanted}:
        raise QuantkitError(
            f"{stack}: the files hold {' and '.join(map(str, sorted(stored)))} experts, and config.json says {wanted}; "
            "fetch the model anew"
        )


def read(shards: Shards, mapping: Mapping[str, Origin], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) in the dtype in which it is stored, and the shape that the model has.

    A stored tensor is read once, and kept until all that it belongs to is there.

    Raises:
        CheckpointError: a shard cannot be read.
    """
    asked: dict[tuple[int, int | None], list[str]] = defaultdict(list)
    for name in names:
        asked[id(mapping[name].group), mapping[name].expert].append(name)
    lacking = {key: set(mapping[own[0]].stored) for key, own in asked.items()}
    users: dict[str, set[tuple[int, int | None]]] = defaultdict(set)
    for key, stored in lacking.items():
        for name in stored:
            users[name].add(key)
    kept: dict[str, Tensor] = {}
    for arrived, tensor in shards.read(users):
        kept[arrived] = tensor
        for key in [*users[arrived]]:
            lacking[key].discard(arrived)
            if lacking[key]:
                continue
            own = asked[key]
            found = mapping[own[0]].group.convert(kept, key[1])
            for name in own:
                yield name, mapping[name].taken_from(found)
            for name in mapping[own[0]].stored:
                users[name].discard(key)
                if not users[name]:
                    kept.pop(name)


def as_stored(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names, and in the shapes, in which transformers saves a model: `read`, backwards.

    Args:
        model: on the meta device, its experts taken apart.
        tensors: by the model's names, those of a stack of experts all together.
    """
    taken = parts(model)
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part = taken.get(name)
        if part is None:
            whole[name] = tensor
            continue
        if part.stack not in whole:
            like = _Stacked(model).get_parameter(part.stack)
            whole[part.stack] = torch.empty(like.shape, dtype=tensor.dtype)
        whole[part.stack][part.expert].copy_(tensor.T if part.transposed and tensor.dim() > 1 else tensor)
    stacked: Any = _Stacked(model)
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(stacked, whole).items()}


def stored_layers(model: nn.Module, layers: Iterable[str]) -> dict[str, list[tuple[str, Tensor]]]:
    """The layers that a model's files have in each layer's place, and which of its outputs each of them has.

    Args:
        model: on the meta device, its experts taken apart.
        layers: names of those with a weight [outputs, inputs].

    Returns:
        By layer, (name, int64 [outputs]) of each: several where files have an expert's gate apart; none where they have
        all experts in one tensor.
    """
    taken, stacks = parts(model), dict[str, list[list[tuple[str, Tensor]]]]()
    found: dict[str, list[tuple[str, Tensor]]] = {}
    for layer in layers:
        part = taken.get(f"{layer}.weight")
        if part is None:
            every = torch.arange(len(linear_weight(model.get_submodule(layer))))
            named = as_stored(model, {f"{layer}.weight": every.view(-1, 1)})
            found[layer] = [(name.removesuffix(".weight"), every) for name in named]
            continue
        if part.stack not in stacks:
            stacks[part.stack] = _stored_experts(model, part)
        found[layer] = stacks[part.stack][part.expert]
    return found


def _stored_experts(model: nn.Module, part: Part) -> list[list[tuple[str, Tensor]]]:
    """What `stored_layers` gives of each expert of a part's stack: found by numbering all outputs."""
    whole: Any = _Stacked(model)
    experts, *sides = whole.get_parameter(part.stack).shape
    outputs = sides[1 if part.transposed else 0]
    marked = torch.arange(experts * outputs).view(experts, outputs, 1).repeat(1, 1, 2)  # 5.17 drops a column of one
    found: list[list[tuple[str, Tensor]]] = [[] for _ in range(experts)]
    reverted = revert_weight_conversion(whole, {part.stack: marked.transpose(1, 2) if part.transposed else marked})
    for name, rows in reverted.items():
        if rows.dim() == 2:
            found[int(rows[0, 0]) // outputs].append((name.removesuffix(".weight"), rows[:, 0] % outputs))
    return found
