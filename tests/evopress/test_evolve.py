"""The search alone: budgets are kept, small instances are solved, what adds up misleadingly is seen through."""

import dataclasses
import itertools

import pytest
import torch

from quantkit.core.errors import QuantkitError
from quantkit.evopress.baselines import best_of_random, greedy, knapsack, random_assignment, uniform
from quantkit.evopress.evolve import Index, State, evolve, mutated
from quantkit.evopress.settings import Evolution, parse_stages

EVEN = Index(((100, 150, 200, 250),) * 10)
"""Ten equal layers."""
UNEVEN = Index(tuple((20 * w, 30 * w, 40 * w, 60 * w) for w in (1, 3, 1, 2, 3, 1)))
"""Layers of several sizes, and a ladder with a gap."""
QUICK = Evolution(40, 16, ((4, 100), (1, 100)))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Additive:
    """Losses that add up; the same on all text, and counted."""

    def __init__(self, index, seed=0):
        generator = seeded(seed)
        self.losses = [
            sorted((4.0 * torch.rand(len(costs), generator=generator)).tolist(), reverse=True) for costs in index.costs
        ]
        self.seen = []

    def __call__(self, assignments, tokens, draw):
        self.seen += assignments
        return [sum(row[level] for row, level in zip(self.losses, a, strict=True)) for a in assignments]


def best_of_all(index, fitness, budget):
    every = itertools.product(*(range(len(costs)) for costs in index.costs))
    allowed = [levels for levels in every if index.cost(levels) <= budget]
    return min(zip(fitness(allowed, 0, 0), allowed, strict=True))[0]


@pytest.mark.parametrize("rule", ["size", "any"])
@pytest.mark.parametrize("index", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_no_generation_exceeds_the_budget(index, rule):
    budget = (sum(c[0] for c in index.costs) + sum(c[-1] for c in index.costs)) // 2
    fitness, start = Additive(index), uniform(index, budget)
    states = []
    state = evolve(index, fitness, budget, seeded(), start, dataclasses.replace(QUICK, rule=rule), states.append)
    assert len(states) == 40
    assert all(index.cost(assignment) <= budget for assignment in fitness.seen)
    if rule == "size":
        assert {index.cost(assignment) for assignment in fitness.seen} == {index.cost(start)}
    else:  # what is left is less than any step up of another layer costs
        smallest = min(b - a for costs in index.costs for a, b in itertools.pairwise(costs))
        assert all(line.cost > budget - max(c[-1] for c in index.costs) for line in state.history)
        assert budget - index.cost(state.parent) < 4 * smallest
    assert state.history[-1].fitness < fitness([start], 0, 0)[0]


def test_the_parent_never_gets_worse_on_a_fixed_text():
    state = evolve(EVEN, Additive(EVEN, 1), 1600, seeded(), uniform(EVEN, 1600), QUICK)
    figures = [line.fitness for line in state.history]
    assert all(b <= a for a, b in itertools.pairwise(figures))
    assert all(line.fitness <= line.former for line in state.history)
    assert all((line.switched > 0) == (line.fitness < line.former) for line in state.history)


@pytest.mark.parametrize("seed", range(4))
def test_a_tiny_instance_is_solved(seed):
    index = Index(tuple((10 * w, 15 * w, 20 * w) for w in (1, 2, 1, 1, 3, 2, 1)))
    fitness = Additive(index, seed)
    state = evolve(index, fitness, 160, seeded(seed), uniform(index, 160), dataclasses.replace(QUICK, generations=80))
    assert fitness([state.parent], 0, 0)[0] == pytest.approx(best_of_all(index, fitness, 160))


def test_the_same_seed_gives_the_same_search():
    def run(seed):
        return evolve(UNEVEN, Additive(UNEVEN), 400, seeded(seed), uniform(UNEVEN, 400), QUICK)

    assert run(3) == run(3)
    assert run(3).history != run(4).history


def test_an_interrupted_search_goes_on_as_if_it_had_not_been():
    fitness, states = Additive(UNEVEN, 2), []
    whole = evolve(UNEVEN, fitness, 400, seeded(5), uniform(UNEVEN, 400), QUICK, states.append)
    again = evolve(UNEVEN, fitness, 400, seeded(99), states[17], QUICK)
    assert again == whole


def test_equal_layers_gain_nothing():
    def fitness(assignments, tokens, draw):
        return [sum(4.0 ** -(level + 2) for level in a) for a in assignments]

    state = evolve(EVEN, fitness, 1500, seeded(), uniform(EVEN, 1500), QUICK)
    assert state.parent == uniform(EVEN, 1500) == (1,) * 10


def test_layers_whose_losses_do_not_add_up_mislead_the_knapsack():
    """Two layers that only pay when both are raised; single losses say that they are not worth it."""
    index = Index(((10, 20),) * 6)

    def loss(assignment):
        together = 0.0 if assignment[0] and assignment[1] else 3.0
        return together + sum(0.5 for level in assignment[2:] if not level)

    single = [(loss((0,) * 6), loss(tuple(int(i == item) for i in range(6)))) for item in range(6)]
    losses = [(low - high + 0.0, 0.0) for low, high in single]
    for misled in (knapsack(index, losses, 80), greedy(index, losses, 80)):
        assert loss(misled) == 4.0
    state = evolve(index, lambda many, tokens, draw: [loss(a) for a in many], 80, seeded(), (0, 0, 1, 1, 0, 0), QUICK)
    assert loss(state.parent) == 2.0


def test_the_knapsack_is_exact():
    for seed in range(5):
        index = Index(tuple((7 * w, 11 * w, 18 * w) for w in (1, 2, 1, 4, 3, 2)))
        fitness = Additive(index, seed)
        for budget in (91, 130, 177, 234):
            found = knapsack(index, fitness.losses, budget)
            assert index.cost(found) <= budget
            assert fitness([found], 0, 0)[0] == pytest.approx(best_of_all(index, fitness, budget))


def test_a_knapsack_of_many_sums_stays_within_the_budget():
    index = Index(tuple((1_000_003 * w, 2_000_029 * w, 2_900_017 * w) for w in range(1, 40)))
    fitness = Additive(index, 1)
    budget = index.cost((1,) * 39) + 12_345
    found = knapsack(index, fitness.losses, budget)
    assert 0.99 * budget < index.cost(found) <= budget
    assert fitness([found], 0, 0) <= fitness([greedy(index, fitness.losses, budget)], 0, 0)


def test_uniform_levels_use_the_budget_evenly():
    assert uniform(EVEN, 1000) == (0,) * 10
    assert uniform(EVEN, 1500) == (1,) * 10
    spread = uniform(EVEN, 1750)
    assert sorted(spread) == [1] * 5 + [2] * 5
    assert sum(spread[:5]) in (7, 8), "not all in front"
    assert uniform(EVEN, 10_000) == (3,) * 10


def test_random_assignments_use_the_budget():
    for seed in range(10):
        found = random_assignment(UNEVEN, 400, seeded(seed))
        assert 360 <= UNEVEN.cost(found) <= 400
    fitness = Additive(EVEN, 3)
    best = best_of_random(EVEN, fitness, 1700, seeded(), 8)
    assert fitness([best], 0, 0)[0] == min(fitness([random_assignment(EVEN, 1700, g) for g in [seeded()]], 0, 0)[0],
                                           *fitness(fitness.seen[:8], 0, 0))  # fmt: skip


def test_corners_have_no_neighbours():
    assert mutated(EVEN, (0,) * 10, 1000, seeded(), QUICK) is None
    assert evolve(EVEN, Additive(EVEN), 1000, seeded(), (0,) * 10, QUICK).parent == (0,) * 10


def test_figures_that_are_no_numbers_never_win():
    def fitness(assignments, tokens, draw):
        return [float("nan") if a[0] else 1.0 - 0.01 * a[1] for a in assignments]

    state = evolve(EVEN, fitness, 1300, seeded(), (0, 0, 1, 1, 1, 1, 1, 1, 0, 0), QUICK)
    assert state.parent[0] == 0 and state.parent[1] == 3


def test_bad_input():
    with pytest.raises(QuantkitError, match="the least is 1,000, the most 2,500"):
        evolve(EVEN, Additive(EVEN), 999, seeded(), (0,) * 10, QUICK)
    with pytest.raises(QuantkitError, match="more than the budget"):
        evolve(EVEN, Additive(EVEN), 1000, seeded(), State((3,) * 10), QUICK)
    with pytest.raises(ValueError, match="ascending"):
        Index(((10, 10),))
    for settings in ({"rule": "none"}, {"offspring": 0}, {"stages": ((4, 10),)}, {"generations": -1}):
        with pytest.raises(QuantkitError):
            Evolution(**settings)
    assert parse_stages("8x2048,1x100") == ((8, 2048), (1, 100))
    for text in ("", "8", "8x2x3", "ax2"):
        with pytest.raises(QuantkitError, match="no stages"):
            parse_stages(text)
