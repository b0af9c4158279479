"""What is known of experts' inputs: each sees few tokens, and all see tokens of one stream.

An expert's moments are drawn towards the mean of all experts of its layer, as though it had seen k more tokens of that
kind:

    H_e <- (n_e H_e + k H_mean) / (n_e + k),    k = `STRENGTH` * in_features

and likewise C. An expert that no token chose gets the mean.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.core.result import LayerResult
from quantkit.core.stats import LayerStats
from quantkit.models.experts import place

STRENGTH = 1.0
"""Tokens of the mean that an expert's moments get, for each input feature."""
MOMENTS = 2**32
"""Bytes of moments that are gathered at once; experts beyond that are gathered in further passes."""
FEW = 1.0
"""Tokens for each input feature below which an expert is said to have seen few."""


def in_turns(stage: Sequence[list[str]], nbytes: Callable[[str], int]) -> list[list[list[str]]]:
    """A stage's groups, as many at a time as `MOMENTS` allows.

    Args:
        stage: groups of layers that share an input.
        nbytes: of the moments of a group, by its first layer.
    """
    turns: list[list[list[str]]] = []
    left = 0
    for group in stage:
        needed = nbytes(group[0])
        if not turns or needed > left:
            turns.append([])
            left = MOMENTS
        turns[-1].append(group)
        left -= needed
    return turns


@dataclass
class _Mean:
    """Sums over the tokens of all experts at one place, fp32 [in_features, in_features]."""

    hessian: Tensor
    cross: Tensor | None
    count: int


Means = dict[tuple[str, str], _Mean]
"""What is known so far of all experts at one place: their module's name, and what the layer is there."""


def place_of(layer: str) -> tuple[str, str] | None:
    """The place of an expert's layer; None for all other layers."""
    found = place(layer)
    return None if found is None else (found[0], found[2])


def pooled(
    stats: dict[str, LayerStats], layers: Iterable[str], means: Means | None = None, strength: float | None = None
) -> dict[str, LayerStats]:
    """Statistics with those of experts drawn towards their layer's mean.

    Args:
        stats: by layer; of experts, those that some token chose. Changed in place: all moments of a layer's experts
            are not to be in memory twice.
        layers: all whose statistics are wanted.
        means: of experts that were gathered in earlier turns; gets these too.
        strength: see the module's text; None for `STRENGTH`.

    Returns:
        The same dict, with experts that no token chose too, unless none reached their whole layer.
    """
    strength, means = STRENGTH if strength is None else strength, {} if means is None else means
    beside: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        if (at := place_of(layer)) is not None:
            beside.setdefault(at, []).append(layer)
    for at, names in beside.items():
        for name in names:
            if name in stats:
                _add(means, at, stats[name])
        alone = stats.get(names[0]) if len(names) == 1 else None
        if at not in means or (alone is not None and means[at].count == alone.num_tokens):
            continue
        hessian = means[at].hessian / means[at].count
        cross = None if (summed := means[at].cross) is None else summed / means[at].count
        for name in names:
            own = stats.get(name)
            if own is None:
                stats[name] = LayerStats(hessian, cross, 0, name)
                continue
            share = strength * len(hessian) / (own.num_tokens + strength * len(hessian))
            drawn = None if own.cross is None or cross is None else torch.lerp(own.cross, cross, share)
            stats[name] = replace(own, hessian=torch.lerp(own.hessian, hessian, share), cross=drawn)
    return stats


def _add(means: Means, at: tuple[str, str], own: LayerStats) -> None:
    known = means.get(at)
    if known is None:
        cross = None if own.cross is None else own.cross * own.num_tokens
        means[at] = _Mean(own.hessian * own.num_tokens, cross, own.num_tokens)
        return
    known.hessian.add_(own.hessian, alpha=own.num_tokens)
    if known.cross is not None and own.cross is not None:
        known.cross.add_(own.cross, alpha=own.num_tokens)
    known.count += own.num_tokens


def starved_experts(results: Mapping[str, LayerResult]) -> tuple[str, ...]:
    """A note on experts that few tokens chose, where there are such.

    Args:
        results: of experts' layers, by name, with their tokens.
    """
    few, none = set[tuple[str, int]](), set[tuple[str, int]]()
    for name, result in results.items():
        experts = place(name)
        assert experts is not None and result.tokens is not None
        if result.tokens < FEW * result.weight.shape[1]:
            (few if result.tokens else none).add(experts[:2])
    if not few | none:
        return ()
    count = len({place(name)[:2] for name in results})  # type: ignore[index]
    unseen = f", {len(none)} of them by none" if none else ""
    return (
        f"{len(few | none)} of {count} experts were chosen by fewer tokens of the calibration text than they have "
        f"inputs{unseen}, and lean on what others of their layer saw; more of it (`num_samples`), or `all_experts`, "
        "tells more of them",
    )
