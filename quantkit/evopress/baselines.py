"""What a search must beat: uniform levels, the best of some random assignments, greedy steps and a knapsack.

The last two believe that losses of single items add up. They are cheap and often near the best, and make good starts.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from quantkit.evopress.evolve import Assignment, Fitness, Index

Losses = Sequence[Sequence[float]]
"""The loss of each item at each of its levels, as `Index.costs` has them."""
CAPACITIES = 20_000
"""Most different sums that the knapsack tells apart; beyond, costs are rounded up to a grid of so many steps."""


def uniform(index: Index, budget: int) -> Assignment:
    """Every item at one fraction of its highest cost, as far as its levels allow, and what is left spread evenly.

    Raises:
        QuantkitError: not even the lowest levels fit.
    """
    index.check_budget(budget)
    levels = [0] * len(index.costs)
    for fraction in sorted({Fraction(cost, costs[-1]) for costs in index.costs for cost in costs}):
        higher = [max(bisect_right(costs, math.floor(fraction * costs[-1])) - 1, 0) for costs in index.costs]
        if index.cost(higher) > budget:
            break
        levels = higher
    return _filled(index, levels, budget)


def _filled(index: Index, levels: list[int], budget: int) -> Assignment:
    """One level more for as many items as fit, again and again, evenly spread over the depth."""
    spread = sorted(range(len(levels)), key=lambda item: (item * (math.sqrt(5) - 1) / 2) % 1)
    left, raised = budget - index.cost(levels), True
    while raised:
        raised = False
        for item in spread:
            costs, level = index.costs[item], levels[item]
            if level + 1 < len(costs) and costs[level + 1] - costs[level] <= left:
                left -= costs[level + 1] - costs[level]
                levels[item] += 1
                raised = True
    return tuple(levels)


def random_assignment(index: Index, budget: int, generator: torch.Generator) -> Assignment:
    """Steps up at random items, from the lowest levels, until nothing fits.

    Raises:
        QuantkitError: not even the lowest levels fit.
    """
    index.check_budget(budget)
    levels = [0] * len(index.costs)
    left = budget - index.cost(levels)
    open_items = list(range(len(levels)))
    while open_items:
        place = int(torch.randint(len(open_items), (1,), generator=generator))
        item = open_items[place]
        costs, level = index.costs[item], levels[item]
        if level + 1 < len(costs) and costs[level + 1] - costs[level] <= left:
            left -= costs[level + 1] - costs[level]
            levels[item] += 1
        else:
            open_items.pop(place)
    return tuple(levels)


def best_of_random(
    index: Index, fitness: Fitness, budget: int, generator: torch.Generator, count: int = 32, tokens: int = 32768
) -> Assignment:
    """The best of `count` random assignments, all measured on the same text.

    Raises:
        QuantkitError: not even the lowest levels fit.
    """
    found = [random_assignment(index, budget, generator) for _ in range(count)]
    values = fitness(found, tokens, -1)
    return found[min(range(count), key=lambda i: values[i])]


def greedy(index: Index, losses: Losses, budget: int) -> Assignment:
    """Always the step, over one level or several, that lowers the losses most for its price, as long as one fits.

    Raises:
        QuantkitError: not even the lowest levels fit.
    """
    index.check_budget(budget)
    levels = [0] * len(index.costs)
    left = budget - index.cost(levels)
    while True:
        best, step = 0.0, None
        for item, (costs, loss) in enumerate(zip(index.costs, losses, strict=True)):
            for level in range(levels[item] + 1, len(costs)):
                price = costs[level] - costs[levels[item]]
                gain = (loss[levels[item]] - loss[level]) / price
                if price <= left and gain > best:
                    best, step = gain, (item, level, price)
        if step is None:
            return _filled(index, levels, budget)
        item, level, price = step
        levels[item], left = level, left - price


def knapsack(index: Index, losses: Losses, budget: int) -> Assignment:
    """The least sum of losses under the budget, by dynamic programming (SPDY, arXiv 2201.13096, section 3).

    Exact where the costs' greatest common divisor leaves at most `CAPACITIES` sums below the budget.

    Raises:
        QuantkitError: not even the lowest levels fit.
    """
    index.check_budget(budget)
    extra = [[cost - costs[0] for cost in costs] for costs in index.costs]
    spare = min(budget - sum(costs[0] for costs in index.costs), sum(costs[-1] for costs in extra))
    unit = math.gcd(*(cost for costs in extra for cost in costs)) or 1
    unit = max(unit, math.ceil(spare / CAPACITIES))
    capacity = spare // unit
    least = np.zeros(capacity + 1)
    choices = []
    for costs, loss in zip(extra, losses, strict=True):
        totals = np.full((len(costs), capacity + 1), np.inf)
        for level, cost in enumerate(costs):
            units = -(-cost // unit)
            if units <= capacity:
                totals[level, units:] = least[: capacity + 1 - units] + loss[level]
        choices.append(totals.argmin(0))
        least = totals.min(0)
    levels, at = [], capacity
    for costs, choice in zip(reversed(extra), reversed(choices), strict=True):
        levels.append(int(choice[at]))
        at -= -(-costs[levels[-1]] // unit)
    return _filled(index, levels[::-1], budget)
