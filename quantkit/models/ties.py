"""Weights that are one under several names: a head tied to its embedding."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quantkit.models.structure import linear_weight


def tied_names(model: nn.Module) -> dict[str, str]:
    """Tensors that are other tensors by another name (a head tied to its embedding) and are not stored -> those."""
    return getattr(model, "all_tied_weights_keys", None) or {}


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

    Args:
        model: changed in place, its config too.
        layers: that may be tied.
        together: pairs of them that are to be packed as one weight: they stay one here, and only transformers no longer
            knows.
        mapping: where tensors are stored (`io.conversion.origins`); gets an entry for each weight that was not stored.
    """
    ties = tied_names(model)
    ended = {name: origin for name, origin in ties.items() if belongs(name, layers) or belongs(origin, layers)}
    pairs = [set(pair) for pair in (together or {}).items()]
    for name, origin in ended.items():
        ties.pop(name)
        if mapping:
            mapping.setdefault(name, mapping[origin])
        if {name.removesuffix(".weight"), origin.removesuffix(".weight")} not in pairs:
            layer = model.get_submodule(name.rpartition(".")[0])
            layer.weight = torch.nn.Parameter(linear_weight(layer).detach(), requires_grad=False)
    if ended:
        model.config.tie_word_embeddings = False
