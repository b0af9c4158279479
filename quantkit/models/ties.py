"""Weights that are one under several names: a head tied to its embedding, blocks that are called at several depths."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quantkit.core.errors import QuantkitError
from quantkit.models.structure import find_blocks, linear_weight, tied_names


def inner_ties(model: nn.Module, blocks: str | None = None) -> dict[str, str]:
    """The `tied_names` of tensors inside the decoder blocks, by the name of their list where it is known."""
    if not (ties := tied_names(model)):
        return {}
    inside = f"{find_blocks(model)[0] if blocks is None else blocks}."
    return {name: origin for name, origin in ties.items() if name.startswith(inside)}


def belongs(name: str, layers: Collection[str]) -> bool:
    """Whether a tensor is the weight of one of the layers."""
    return name.endswith(".weight") and name.removesuffix(".weight") in layers


def untie(
    model: PreTrainedModel,
    layers: Collection[str],
    together: Mapping[str, str] | None = None,
    mapping: dict[str, Any] | None = None,
) -> None:
    """Ends the ties of some layers, so that changing one's weight leaves the other's as it is.

    Those inside the blocks stay; their tensors are stored from now on by the names by which they are packed.

    Args:
        model: changed in place, its config too.
        layers: that may be tied.
        together: pairs of them that are to be packed as one weight: they stay one here, and only transformers no longer
            knows.
        mapping: where tensors are stored (`io.conversion.origins`); gets an entry for each weight that was not stored.

    Raises:
        QuantkitError: the blocks' ties would end with them.
    """
    ties, inner, together = tied_names(model), inner_ties(model), together or {}
    _store_as(ties, {*together.values()} if inner else ())
    ended = {
        name: origin for name, origin in ties.items()
        if name not in inner and origin not in inner and (belongs(name, layers) or belongs(origin, layers))
    }  # fmt: skip
    if ended and inner:
        raise QuantkitError(
            f"{type(model).__name__} ties its blocks and its head by one setting, which packing the head would end; "
            "leave head and embedding dense (`head_bits`)"
        )
    pairs = [set(pair) for pair in together.items()]
    for name, origin in ended.items():
        ties.pop(name)
        if mapping:
            mapping.setdefault(name, mapping[origin])
        if {name.removesuffix(".weight"), origin.removesuffix(".weight")} not in pairs:
            layer = model.get_submodule(name.rpartition(".")[0])
            layer.weight = torch.nn.Parameter(linear_weight(layer).detach(), requires_grad=False)
    if ended:
        model.config.tie_word_embeddings = False


def _store_as(ties: dict[str, str], layers: Iterable[str]) -> None:
    """Makes the names of some layers' tensors those by which all that are tied to them are stored."""
    for tensor in (f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")):
        if (origin := ties.pop(tensor, None)) is not None:
            ties |= dict.fromkeys((origin, *(name for name, other in ties.items() if other == origin)), tensor)
