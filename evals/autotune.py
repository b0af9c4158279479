"""Measures launch sizes for a model's own shapes on this GPU and keeps them; asked for, never on its own."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from quantkit.errors import QuantkitError
from quantkit.formats.int_group import IntGroupWeight
from quantkit.kernels.int_group_matmul import Problem, launch, problem_of, rule
from quantkit.kernels.timing import copies, seconds_per_call
from quantkit.kernels.tuning import Config, cache_file, tune, variations
from quantkit.linear import QuantizedLinear

ROWS = (8, 16, 32)


def autotune(model: nn.Module, progress: Callable[[int, int, str], None] = lambda done, total, name: None) -> int:
    """Tunes every distinct decode launch of the model's integer layers.

    Args:
        model: with packed layers on a GPU, fused or not.
        progress: called with (launches done, launches in all, key).

    Returns:
        How many launches were measured.
    """
    todo: dict[str, tuple[IntGroupWeight, Problem]] = {}
    for weight in _weights(model):
        for rows in ROWS:
            x = torch.empty(rows, weight.in_features, dtype=getattr(model, "dtype", torch.bfloat16), device="meta")
            problem = problem_of(x, weight.codes, weight.bits, weight.group_size)
            if problem.decodes:
                todo.setdefault(problem.key(), (weight, problem))
    for index, (key, (weight, problem)) in enumerate(todo.items()):
        progress(index, len(todo), key)
        file = cache_file(torch.cuda.get_device_name(weight.codes.device))
        candidates = variations(rule(problem), problem.K // 128)
        try:
            tune(file, key, candidates, _timer(weight, problem))
        except ValueError as error:
            raise QuantkitError(str(error)) from error
    progress(len(todo), len(todo), "")
    return len(todo)


def _weights(model: nn.Module) -> Iterator[IntGroupWeight]:
    """Integer weights as they are launched: a fused group's counts as one."""
    seen = set()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            weight: Any = module.packed if module.shared is None else module.shared.weight
            if isinstance(weight, IntGroupWeight) and id(weight) not in seen:
                seen.add(id(weight))
                yield weight


def _timer(weight: IntGroupWeight, problem: Problem) -> Callable[[Config], float]:
    """Seconds of a launch with a given configuration, over copies of the weight that no cache holds."""
    clones = [weight.map(torch.clone) for _ in range(copies(weight.nbytes, most=64))]
    x = torch.randn(problem.M, problem.K, dtype=problem.dtype, device=weight.codes.device)

    def seconds(config: Config) -> float:
        def call(copy: Any) -> Callable[[], object]:
            arguments = copy.codes, copy.scales, copy.zeros, copy.bits, copy.group_size
            return lambda: launch(x, *arguments, config=config)

        return seconds_per_call([call(clone) for clone in clones], repeats=5)

    return seconds
