"""What products with the experts that rows chose share: y[p] = x[p // k] @ W[e_p]^T + b[e_p].

`chosen` int [P] has the expert of each of P pairs of a row and a choice, k = P / rows to a row. Weights are stacked:
each tensor of a format gets a first dimension [experts, ...].

For decoding, where weights are read once: a pair is a program of its own, and pairs that chose the same expert read it
from the L2 cache. Bytes moved are those of the chosen experts' weights. The kernels (`experts_kernel` beside those of a
single weight) read which expert their row of x has chosen, move the pointers there, and go on as the kernel of a single
weight does with a single row. So no routing comes to the host, and a CUDA graph that recorded a launch may be replayed
with another choice.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels.tuning import Config, shares

MOST = 64
"""Pairs up to which one launch is used; more share experts, which are better written out once."""


def products(x: Tensor, chosen: Tensor, weight: Callable[[int], Tensor], bias: Tensor | None = None) -> Tensor:
    """The specification, on any device: y [pairs, N] in x's dtype.

    Args:
        x: [rows, K].
        chosen: int [pairs], a multiple of the rows.
        weight: gives an expert's [N, K].
        bias: [experts, N], or None.
    """
    rows = x.repeat_interleave(len(chosen) // len(x), dim=0)
    found: Any = [None] * len(chosen)
    for expert in chosen.unique().tolist():
        own = (chosen == expert).nonzero().flatten()
        own_bias = None if bias is None else bias[expert].to(x.dtype)
        y = torch.nn.functional.linear(rows[own], weight(expert).to(x.dtype), own_bias)
        for place, row in zip(own.tolist(), y, strict=True):
            found[place] = row
    return torch.stack(found)


def check(x: Tensor, chosen: Tensor, experts: int, bias: Tensor | None, N: int, tensors: dict[str, tuple]) -> None:
    """Raises ValueError unless every address that follows from the arguments lies inside the tensors.

    Args:
        x: [rows, K].
        chosen: [pairs].
        experts: E.
        bias: [E, N].
        N: rows of each weight.
        tensors: by name (tensor or None, dtype, the shape it has to have).
    """
    if x.dim() != 2 or not len(x) or chosen.dim() != 1 or not len(chosen) or len(chosen) % len(x):
        raise ValueError(f"x {tuple(x.shape)} and chosen {tuple(chosen.shape)}: give [rows, K] and some pairs a row")
    if chosen.dtype not in (torch.int32, torch.int64) or chosen.device != x.device:
        raise ValueError(f"chosen are {chosen.dtype} on {chosen.device}; give int32 or int64 where x is")
    for name, (tensor, dtype, shape) in (tensors | {"bias": (bias, None, (experts, N))}).items():
        if tensor is None:
            continue
        right = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if not right or tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device != x.device:
            raise ValueError(f"{name} are {tensor.dtype} {tuple(tensor.shape)}; this stack takes contiguous {shape}")


def configured(config: Config, N: int, pairs: int, tiles: int, multiprocessors: int) -> Config:
    """A launch of one row a program, with shares of K as long as programs are few."""
    programs = -(-N // config.block_n) * pairs
    return replace(config, split_k=shares(programs, tiles, multiprocessors))
