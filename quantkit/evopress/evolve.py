"""The evolutionary search of EvoPress (arXiv 2410.14649, section 3, algorithm 1).

What is searched is abstract: items (a model's layers, or its blocks) that each take one of several levels, each at a
cost. An assignment gives every item its level; its cost is the sum. One parent lives at a time. A generation

    mutate    offspring = parent with a few levels switched, at no higher cost than the budget allows
    select    in stages: fewer and fewer survivors are measured on more and more fresh text; the parent takes part in
              the last stage, so that it is replaced only by what was measured to be better

A switch lowers some items by a level and raises others. With rule "size" the two differ in cost by nothing, and all
generations cost the same; with rule "any" one item is lowered or raised and others, as many as it takes, go the other
way, which also moves bytes between layers of different sizes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from quantkit.core.errors import QuantkitError
from quantkit.evopress.settings import Evolution

Assignment = tuple[int, ...]
_DEFAULTS = Evolution()
ATTEMPTS = 20
"""Draws per offspring before it is given up: near a corner of the search space few switches exist."""


@dataclass(frozen=True)
class Index:
    """Levels of each item that a search chooses among.

    Attributes:
        costs: of each item's levels, ascending; bytes, or any other unit that the budget has.
    """

    costs: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for item, costs in enumerate(self.costs):
            if not costs or any(a >= b for a, b in pairwise(costs)):
                raise ValueError(f"item {item}: its levels cost {costs}; give at least one, in ascending order")

    def cost(self, assignment: Sequence[int]) -> int:
        """The sum over all items."""
        return sum(costs[level] for costs, level in zip(self.costs, assignment, strict=True))

    def check_budget(self, budget: int) -> None:
        """Raises QuantkitError where not even the lowest levels fit."""
        least, most = sum(costs[0] for costs in self.costs), sum(costs[-1] for costs in self.costs)
        if budget < least:
            raise QuantkitError(f"a budget of {budget:,} is impossible: the least is {least:,}, the most {most:,}")


class Space(Protocol):
    """A search space over a model.

    Attributes:
        model: in memory; changes with each `apply`.
        index: what can be chosen.
        names: of the items.
        losses: relative error of each item's levels, as the index has them.
        predicted: KL that each item's levels are expected to cost, in nats a token; an item has none where that was not
            measured.
        identity: JSON of what levels stand for.
    """

    model: PreTrainedModel
    index: Index
    names: list[str]
    losses: list[tuple[float, ...]]
    predicted: list[tuple[float, ...]]
    identity: Any

    def apply(self, assignment: Assignment) -> None:
        """Makes the model that the assignment describes.

        Args:
            assignment: a level for each item.
        """


class Fitness(Protocol):
    """Measures assignments; less is better."""

    def __call__(self, assignments: Sequence[Assignment], tokens: int, draw: int) -> list[float]:
        """One figure each, all on the same text.

        Args:
            assignments: to measure.
            tokens: how much text.
            draw: which text: another number, another choice.
        """


@dataclass(frozen=True)
class Generation:
    """One line of a search's history.

    Attributes:
        fitness: of the new parent; former: of the parent before, on the same text.
        cost: of the new parent.
        switched: items that have another level than in the parent before.
    """

    fitness: float
    former: float
    cost: int
    switched: int


@dataclass(frozen=True)
class Outcome:
    """A finished search.

    Attributes:
        assignment: what was found.
        starts: what it was measured against, by name.
        held_out: figure of each of them, and of "search", on text that the search did not see.
        history: of the generations.
        budget: that the items were allowed; spent: what they take.
        seen: fraction of the found model's full KL that the kept tokens show, on one held-out sequence.
    """

    assignment: Assignment
    starts: dict[str, Assignment]
    held_out: dict[str, float]
    history: tuple[Generation, ...]
    budget: int
    spent: int
    seen: float


@dataclass(frozen=True)
class State:
    """A search between two generations; all that the rest of it depends on.

    Attributes:
        parent: the best assignment so far.
        history: of the generations so far.
        random: the generator's state.
    """

    parent: Assignment
    history: tuple[Generation, ...] = ()
    random: bytes = field(default=b"", repr=False)


def evolve(
    index: Index,
    fitness: Fitness,
    budget: int,
    generator: torch.Generator,
    start: Assignment | State,
    settings: Evolution = _DEFAULTS,
    progress: Callable[[State], None] = lambda _state: None,
) -> State:
    """Searches for the assignment of least fitness whose cost is at most the budget.

    Args:
        index: what can be chosen.
        fitness: measures assignments.
        budget: most that an assignment may cost.
        generator: on the CPU; the same one gives the same search.
        start: the first parent, or the state of an interrupted search.
        settings: of the search.
        progress: called after each generation with the state from which the search could go on.

    Returns:
        The last state; its parent is the result.

    Raises:
        QuantkitError: an impossible budget, or a start above it.
    """
    index.check_budget(budget)
    state = start if isinstance(start, State) else State(tuple(start))
    if index.cost(state.parent) > budget:
        raise QuantkitError(f"the search's start costs {index.cost(state.parent):,}, more than the budget {budget:,}")
    if state.random:
        generator.set_state(torch.frombuffer(bytearray(state.random), dtype=torch.uint8))
    for generation in range(len(state.history), settings.generations):
        state = _generation(index, fitness, budget, generator, settings, state, generation)
        progress(state)
    return state


def _generation(
    index: Index,
    fitness: Fitness,
    budget: int,
    generator: torch.Generator,
    settings: Evolution,
    state: State,
    generation: int,
) -> State:
    parent = state.parent
    found = [mutated(index, parent, budget, generator, settings) for _ in range(settings.offspring)]
    pool = list(dict.fromkeys(assignment for assignment in found if assignment not in (None, parent)))
    best, former = math.nan, math.nan
    for stage, (survivors, tokens) in enumerate(settings.stages):
        last = stage == len(settings.stages) - 1
        if last:
            pool.insert(0, parent)  # first: of equals, the parent stays
        if len(pool) > survivors or last:
            values = fitness(pool, tokens, generation * len(settings.stages) + stage)
            values = [value if math.isfinite(value) else math.inf for value in values]
            ranked = sorted(range(len(pool)), key=lambda i: values[i])
            if last:
                best, former = values[ranked[0]], values[0]
            pool = [pool[i] for i in ranked[:survivors]]
    chosen = pool[0]
    switched = sum(a != b for a, b in zip(chosen, parent, strict=True))
    line = Generation(best, former, index.cost(chosen), switched)
    return State(chosen, (*state.history, line), generator.get_state().numpy().tobytes())


def mutated(
    index: Index, parent: Assignment, budget: int, generator: torch.Generator, settings: Evolution
) -> Assignment | None:
    """A neighbour of `parent` that keeps to the budget, or None where none was found."""
    for _ in range(ATTEMPTS):
        levels = list(parent)
        switches = min(_draw(settings.switches, generator), _draw(settings.switches, generator)) + 1
        switch = _switch_equals if settings.rule == "size" else _trade
        if all([switch(index, levels, budget, generator) for _ in range(switches)]) and tuple(levels) != parent:
            return tuple(levels)
    return None


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))


def _shuffled(items: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(items, generator=generator).tolist()


def _step(index: Index, levels: Sequence[int], item: int, by: int) -> int | None:
    """What one level more (by = 1) or less (-1) costs an item, a positive figure; None where there is no such level."""
    costs, level = index.costs[item], levels[item]
    return abs(costs[level + by] - costs[level]) if 0 <= level + by < len(costs) else None


def _switch_equals(index: Index, levels: list[int], _budget: int, generator: torch.Generator) -> bool:
    """Lowers an item and raises another at the same price."""
    for lower in _shuffled(len(levels), generator):
        freed = _step(index, levels, lower, -1)
        if freed is None:
            continue
        for higher in _shuffled(len(levels), generator):
            if higher != lower and _step(index, levels, higher, 1) == freed:
                levels[lower] -= 1
                levels[higher] += 1
                return True
    return False


def _trade(index: Index, levels: list[int], budget: int, generator: torch.Generator) -> bool:
    """Moves an item by a level, up or down, and others the other way until the budget is kept, and used up."""
    by = 1 if _draw(2, generator) else -1
    first = next((i for i in _shuffled(len(levels), generator) if _step(index, levels, i, by) is not None), None)
    if first is None:
        return False
    levels[first] += by
    left = budget - index.cost(levels)
    if left < 0:
        for item in _shuffled(len(levels), generator):
            saved = _step(index, levels, item, -1) if item != first else None
            if saved is not None:
                levels[item] -= 1
                left += saved
                if left >= 0:
                    break
    if left < 0:
        return False
    lowered = {first} if by < 0 else set()
    for item in _shuffled(len(levels), generator):
        price = _step(index, levels, item, 1) if item not in lowered else None
        if price is not None and price <= left:
            levels[item] += 1
            left -= price
    return True
