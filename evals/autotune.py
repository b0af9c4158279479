"""Measures launch sizes for a model's own shapes on this GPU and keeps them; asked for, never on its own."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.core.errors import QuantkitError
from quantkit.formats.int_group import ArrangedIntGroupWeight, IntGroupWeight
from quantkit.kernels.int_group_matmul import Problem, rule
from quantkit.kernels.timing import copies, seconds_per_call
from quantkit.kernels.tuning import Config, cache_file, tune, variations
from quantkit.models.linear import QuantizedLinear

ROWS = (8, 16, 32)
Integers = IntGroupWeight | ArrangedIntGroupWeight


def autotune(model: nn.Module, progress: Callable[[int, int, str], None] = lambda done, total, name: None) -> int:
    """Tunes every distinct decode launch of the model's integer layers.

    Args:
        model: with packed layers on a GPU, fused or not.
        progress: called with (launches done, launches in all, key).

    Returns:
        How many launches were measured.

    Raises:
        QuantkitError: no launch size of one of them runs on this GPU.
    """
    todo: dict[str, tuple[Integers, Problem]] = {}
    for weight in _weights(model):
        for rows in ROWS:
            problem = weight.problem(_rows(weight, rows, getattr(model, "dtype", torch.bfloat16)))
            if problem.decodes:
                todo.setdefault(problem.key(), (weight, problem))
    for index, (key, (weight, problem)) in enumerate(todo.items()):
        progress(index, len(todo), key)
        file = cache_file(torch.cuda.get_device_name(_device(weight)))
        candidates = variations(rule(problem), problem.K // 128)
        try:
            tune(file, key, candidates, _timer(weight, problem))
        except ValueError as error:
            raise QuantkitError(str(error)) from error
    progress(len(todo), len(todo), "")
    return len(todo)


def _device(weight: Integers) -> torch.device:
    return next(iter(weight.tensors().values())).device


def _rows(weight: Integers, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, weight.in_features, dtype=dtype, device=_device(weight))


def _weights(model: nn.Module) -> Iterator[Integers]:
    """Integer weights as they are launched: in the form that they have there, a fused group's as one."""
    seen = set()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            weight: Any = module.used if module.shared is None else module.shared.weight
            if isinstance(weight, Integers) and id(weight) not in seen:
                seen.add(id(weight))
                yield weight


def _timer(weight: Integers, problem: Problem) -> Callable[[Config], float]:
    """Seconds of a launch with a given configuration, over copies of the weight that no cache holds."""
    clones: list[Any] = [weight.map(torch.clone) for _ in range(copies(weight.nbytes, most=64))]
    x = _rows(weight, problem.M, problem.dtype)

    def seconds(config: Config) -> float:
        return seconds_per_call([partial(clone.launch, x, config) for clone in clones], repeats=5)

    return seconds
