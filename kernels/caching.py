"""Tables that are made once a process."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
T = TypeVar("T")


def kept(make: Callable[P, T]) -> Callable[P, T]:
    """A function of hashable arguments that gives tensors, made at its first call and kept for all others.

    They outlive the caller's mode: what is made under `torch.inference_mode` no gradient could pass later.
    """

    @lru_cache
    def made(*arguments: P.args, **settings: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad():
            return make(*arguments, **settings)

    return cast(Callable[P, T], wraps(make)(made))
