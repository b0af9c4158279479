"""Products with packed weights on a CPU: what takes which path.

    few rows of x   a compiled loop reads the packed weight once a row (`int_group_numba`, `trellis_numba`, ...)
    more            W is written out some rows at a time, into a buffer that stays, and torch multiplies
    else            the reference: where numba is not installed, and for x in fp64

A family's compiled part is a module with

    FEW                                 rows of x that count as few
    multiply(x, *weight) -> y           x fp32 [M, K], y fp32 [M, N]
    unpack(*weight, out, first)         rows of W from `first` on, into out, fp32 [rows, K]
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 2**21
"""Weights that are written out at a time: 8 MB, which the caches hold while torch multiplies."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MEMORY = (Tensor, torch.nn.Parameter)
_LOCAL = threading.local()
_plain = 0


@lru_cache
def has_numba() -> bool:
    """Whether numba is installed, without importing it."""
    return find_spec("numba") is not None


@contextmanager
def plain() -> Iterator[None]:
    """Takes the reference's paths everywhere while it is open."""
    global _plain
    _plain += 1
    try:
        yield
    finally:
        _plain -= 1


def compiled(module: str) -> Any:
    """A family's compiled part, or None where there is none."""
    return import_module(module) if module and has_numba() and not _plain else None


def unpacked(
    module: str, specification: Callable[..., Tensor], weight: Sequence[Any], out_features: int, in_features: int
) -> Tensor:
    """The weight in fp32 [out_features, in_features]: the same numbers as specification(*weight, in_features)."""
    plain = weight[0].device.type == "cpu" and type(weight[0]) in _MEMORY and not torch.compiler.is_compiling()
    loops = compiled(module) if plain else None  # what is traced has no memory to read
    if loops is None:
        return specification(*weight, in_features)
    out = torch.empty(out_features, in_features, dtype=torch.float32)
    loops.unpack(*weight, out, 0)
    return out


def takes(module: str, x: Tensor) -> bool:
    """Whether a family's compiled part multiplies by x [..., K]: it is on a CPU, not empty, in fp32, bf16 or fp16."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and x.numel() > 0 and compiled(module) is not None


def product(
    x: Tensor,
    module: str,
    weight: Sequence[Any],
    out_features: int,
    bias: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
) -> Tensor:
    """y [..., out_features] = x @ W^T + (x @ down^T) @ up^T + bias in x's dtype, for x [..., K] that `takes` takes."""
    loops = import_module(module)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= loops.FEW:
        y = loops.multiply(rows.float(), *weight).to(x.dtype)
    else:
        y = _by_parts(loops, rows, weight, out_features)
    if bias is not None:
        y += bias.to(y.dtype)
    if up is not None and down is not None:
        y += (rows @ down.T.to(x.dtype)) @ up.T.to(x.dtype)
    return y.view(*x.shape[:-1], out_features)


def _by_parts(loops: Any, rows: Tensor, weight: Sequence[Any], out_features: int) -> Tensor:
    in_features = rows.shape[1]
    step = min(out_features, max(64, AT_ONCE // in_features // 64 * 64))
    y = torch.empty(len(rows), out_features, dtype=rows.dtype)
    for first in range(0, out_features, step):
        part = _buffer(min(step, out_features - first), in_features)
        loops.unpack(*weight, part, first)
        y[:, first : first + len(part)] = rows @ part.to(rows.dtype).T
    return y


def _buffer(rows: int, in_features: int) -> Tensor:
    """fp32 [rows, in_features], the same memory in every call of a thread: fresh pages cost more than the writing."""
    size = rows * in_features
    if not hasattr(_LOCAL, "buffer") or _LOCAL.buffer.numel() < size:
        with torch.inference_mode(False):
            _LOCAL.buffer = torch.empty(size, dtype=torch.float32)
    return _LOCAL.buffer[:size].view(rows, in_features)
