"""Weights that are one under several names: a head tied to its embedding."""

from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedModel

from quantkit.models.plan import tied
from quantkit.models.structure import linear_weight


def tied_names(model: nn.Module) -> dict[str, str]:
    """Tensors that are other tensors by another name (a head tied to its embedding) and are not stored -> those."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def belongs(name: str, layers: Collection[str]) -> bool:
    """Whether a tensor is the weight of one of the layers."""
    return name.endswith(".weight") and name.removesuffix(".weight") in layers


def untie(model: PreTrainedModel, plan: Collection[str], mapping: dict[str, str] | None = None) -> None:
    """Ends the ties of planned layers, so that changing one's weight leaves the other's as it is.

    Args:
        model: changed in place, its config too.
        plan: layers that may be tied; where it is a plan that keeps two of them together, to be packed as one weight,
            they stay one here, and only transformers no longer knows.
        mapping: see `match_names`; gets an entry for each weight that was not stored.
    """
    ties = tied_names(model)
    ended = {name: origin for name, origin in ties.items() if belongs(name, plan) or belongs(origin, plan)}
    together = [set(pair) for pair in tied(plan).items()] if isinstance(plan, dict) else []
    for name, origin in ended.items():
        ties.pop(name)
        if mapping:
            mapping.setdefault(name, mapping[origin])
        if {name.removesuffix(".weight"), origin.removesuffix(".weight")} not in together:
            layer = model.get_submodule(name.rpartition(".")[0])
            layer.weight = torch.nn.Parameter(linear_weight(layer).detach(), requires_grad=False)
    if ended:
        model.config.tie_word_embeddings = False
