"""What a search would make and measure: from shapes, from its texts, and from a trial of its candidates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantkit.core.device import compute_dtype, pick_device
from quantkit.core.products import full_width
from quantkit.core.protocols import Needs, Quantizer
from quantkit.evopress.build import Lacking, lacking
from quantkit.evopress.fitness import sequences_for
from quantkit.evopress.session import SearchRun, SearchSettings, check_text, search_text
from quantkit.evopress.spaces import genes
from quantkit.evopress.store import end_key
from quantkit.io.run_folder import Output
from quantkit.io.source import Source, open_folder
from quantkit.models.plan import with_own_weight
from quantkit.models.structure import linear_weight
from quantkit.run.estimate import experts_chosen, multiplications
from quantkit.run.recipe import Recipe
from quantkit.run.trial import pass_seconds, rounding_seconds

UNITS = {"bits": "bytes", "bytes": "bytes", "weights": "weights", "latency": "ns", "blocks": "blocks"}
"""In which a budget of each kind is counted."""
STARTS = {"best": 5, "predicted": 1, "uniform": 1}
"""Assignments that a search begins from, by the kind of start, and one more where KL is predicted; see
`Session.starts`."""


@dataclass(frozen=True)
class SearchEstimate:
    """A search that has not been made; what is None is not estimated.

    Attributes:
        items: layers that are searched, or blocks where some are to be left out.
        levels: of an item, at most; of candidates that cost the same the worse are left out once they are measured.
        unit: in which costs are counted, see `UNITS`.
        budget, least, most: what the items may cost, and what the cheapest and the dearest candidates do.
        database: the folder of the candidates; None where there are none.
        candidates: layers packed in one way, of all layers and ways; of them `missing` are to be made.
        candidate_bytes: of all of them, as their layouts say, without the files' headers; `missing_bytes` of the
            missing ones.
        prediction_bytes: of the full model's predictions, which are kept beside them.
        sequences, seqlen: of the text that assignments are measured on.
        generations: of the search.
        evaluations, tokens: assignments that are measured, starts and the comparison at the end among them, and the
            text that they are measured on, all added up: at most, and less where a search is resumed.
        candidate_seconds: for the missing candidates, roughly, on this machine as it is now.
        search_seconds, memory_bytes: None.
        device: where the model would run.
        notes: what a user should know of the budget.
    """

    items: int
    levels: int
    unit: str
    budget: int
    least: int
    most: int
    sequences: int
    seqlen: int
    generations: int
    evaluations: int
    tokens: int
    prediction_bytes: int
    device: str
    database: str | None = None
    candidates: int = 0
    missing: int = 0
    candidate_bytes: int = 0
    missing_bytes: int = 0
    candidate_seconds: float = 0.0
    search_seconds: float | None = None
    memory_bytes: int | None = None
    notes: tuple[str, ...] = field(default=())


@full_width()
def estimate(
    asked: SearchRun, device: str | torch.device | None = None, *, resume: bool = False, overwrite: bool = False
) -> SearchEstimate:
    """What a search would make and measure; reads its texts and what the database has, but no weights.

    Args:
        asked: what for.
        device, resume, overwrite: see `run`.

    Raises:
        QuantkitError: bad input, as far as the run would refuse it before it measures anything.
    """
    Output(asked.output, asked.folder, asked.database, resume=resume, overwrite=overwrite)  # which may refuse them
    check_text(asked.text.num_samples, asked.settings)
    where = pick_device(device)
    budget, said = asked.wanted.budget(asked.folder, where, asked.recipe.head_bits is not None)
    made: dict[str, Any] = {}
    notes = [said] if said else []
    if asked.wanted.drop_blocks is None:
        found = lacking(
            asked.folder, asked.recipe, asked.candidates, asked.database, budget=budget, device=where,
            structure_only=True,
        )  # fmt: skip
        source, database = found.database.source, found.database
        names = [*database.blocks]
        shapes = _shapes(source, names)
        costs = [
            sorted({
                sum(budget.cost(way.layout(*shapes[layer]), way) for layer in layers)
                for way in database.quantizers.values()
            })
            for layers in genes(names, asked.settings.each_expert).values()
        ]  # fmt: skip
        allowed = budget.units(source, names, database.fixed)
        notes += [f"note: {found.note}"] if found.note else []
        made = {"database": str(asked.database)} | _candidates(found, asked.recipe, where)
    else:
        source = open_folder(asked.folder, compute_dtype(where), structure_only=True)
        costs = [[0, 1]] * len(source.blocks)
        allowed = budget.units(None, [])
    sequences = search_text(asked.text, source.tokenizer(), source.model, asked.settings)
    predicted = asked.wanted.drop_blocks is None and _runs_back(asked.recipe)
    evaluations, tokens = measured(asked.settings, sequences, len(costs), predicted)
    kept = min(asked.settings.top, source.model.config.get_text_config().vocab_size)
    return SearchEstimate(
        items=len(costs),
        levels=max(map(len, costs)),
        unit=UNITS[budget.kind],
        budget=allowed,
        least=sum(levels[0] for levels in costs),
        most=sum(levels[-1] for levels in costs),
        sequences=sequences.shape[0],
        seqlen=sequences.shape[1],
        generations=asked.settings.evolution.generations,
        evaluations=evaluations,
        tokens=tokens,
        prediction_bytes=sequences.numel() * kept * (torch.float16.itemsize + torch.int32.itemsize),
        device=str(where),
        notes=tuple(notes),
        **made,
    )


def _shapes(source: Source, names: list[str]) -> dict[str, tuple[int, int]]:
    """[out_features, in_features] of layers."""
    found = {}
    for name in names:
        rows, columns = linear_weight(source.model.get_submodule(name)).shape
        found[name] = rows, columns
    return found


def _candidates(found: Lacking, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """How many candidates there are to be, their bytes, and the time for those that are missing."""
    database = found.database
    ends = with_own_weight(database.fixed)
    shapes = _shapes(database.source, [*database.blocks, *ends])
    ways = {
        (layer, key): (index, quantizer)
        for layer, index in database.blocks.items()
        for key, quantizer in database.quantizers.items()
    }
    ways |= {(layer, end_key(layer, quantizer)): (-1, quantizer) for layer, quantizer in ends.items()}
    nbytes = {place: quantizer.layout(*shapes[place[0]]).nbytes for place, (_, quantizer) in ways.items()}
    lacked = set(found.missing)
    missing = {place: quantizer for place, (index, quantizer) in ways.items() if (index, place[1]) in lacked}
    return {
        "candidates": len(ways),
        "missing": len(missing),
        "candidate_bytes": sum(nbytes.values()),
        "missing_bytes": sum(nbytes[place] for place in missing),
        "candidate_seconds": _seconds(found, missing, shapes, recipe, device) if missing else 0.0,
    }


def _seconds(
    found: Lacking,
    missing: Mapping[tuple[str, str], Quantizer],
    shapes: Mapping[str, tuple[int, int]],
    recipe: Recipe,
    device: torch.device,
) -> float:
    """For the walks over the model and for rounding, each candidate by itself: less where some share a factor."""
    rounding = {f"{layer} {key}": (quantizer, shapes[layer]) for (layer, key), quantizer in missing.items()}
    least = Needs.CROSS if recipe.target_shift else Needs.HESSIAN
    needs = max(least, *(quantizer.needs for quantizer in missing.values()))
    felt = _runs_back(recipe)
    source = found.database.source
    chosen = 0 if recipe.all_experts else experts_chosen(source)
    walk = multiplications(shapes, found.tokens.numel(), needs, felt, chosen)
    return rounding_seconds(rounding, device, felt=felt) + pass_seconds(walk, source.model.dtype, device)


def _runs_back(recipe: Recipe) -> bool:
    """Whether candidates are made behind a reverse pass, as the base decides."""
    return recipe.quantizer is not None and recipe.runs_back({"": recipe.quantizer})


def measured(settings: SearchSettings, sequences: Tensor, items: int, predicted: bool = False) -> tuple[int, int]:
    """(assignments that a search measures, tokens that it measures them on), at most.

    Args:
        settings: of the search.
        sequences: of its text, int64 [sequences, length].
        items: layers or blocks.
        predicted: whether candidates come with a predicted KL.
    """
    seqlen, drawn = sequences.shape[1], len(sequences) - settings.held_out
    *_, (_, most) = settings.evolution.stages
    starts = STARTS[settings.start] + (predicted and settings.start != "uniform")
    parts = [(1 + items, settings.sensitivity_tokens)] if settings.start == "best" else []
    parts.append((starts, most))
    pool = settings.evolution.offspring
    for stage, (survivors, tokens) in enumerate(settings.evolution.stages):
        last = stage == len(settings.evolution.stages) - 1
        pool += last  # the parent
        if last or pool > survivors:
            parts.append((settings.evolution.generations * pool, tokens))
        pool = min(pool, survivors)
    held_out = (starts + 1) * settings.held_out * seqlen
    on = sum(count * sequences_for(tokens, drawn, seqlen) * seqlen for count, tokens in parts)
    return starts + 1 + sum(count for count, _ in parts), on + held_out
