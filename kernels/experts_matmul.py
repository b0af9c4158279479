"""Multiply rows of x by the weights of the experts that they chose: y[p] = x[p // k] @ W[e_p]^T + b[e_p].

`chosen` int [P] has the expert of each of P pairs of a row and a choice, k = P / rows to a row. Weights are stacked:
each tensor of a format gets a first dimension [experts, ...]; see `int_group_matmul` and `trellis_matmul` for formats.

For decoding, where weights are read once: a pair is a program of its own, and pairs that chose the same expert read it
from the L2 cache. Bytes moved are those of the chosen experts' weights. Nothing is read back to the host. The kernels
stand in `experts_matmul_triton.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import int_group_matmul as integers
from quantkit.kernels import launching, operators, plans
from quantkit.kernels import trellis_matmul as trellis
from quantkit.kernels.bitpack import TILE
from quantkit.kernels.int_group_layout import words_of_block
from quantkit.kernels.launching import or_stand_in
from quantkit.kernels.tuning import Config, shares

MOST = 64
"""Pairs up to which one launch is used; more share experts, which are better written out once."""


def reference(x: Tensor, chosen: Tensor, weight: Callable[[int], Tensor], bias: Tensor | None = None) -> Tensor:
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


def _configured(config: Config, N: int, pairs: int, tiles: int, multiprocessors: int) -> Config:
    """A launch of one row a program, with shares of K as long as programs are few."""
    programs = -(-N // config.block_n) * pairs
    return replace(config, split_k=shares(programs, tiles, multiprocessors))


def _scratch(config: Config, N: int, y: Tensor) -> tuple[Tensor, Tensor]:
    """What shares of K leave their sums and their counts in."""
    if config.split_k == 1:
        return y, y
    blocks = -(-N // config.block_n) * len(y)
    size = blocks * config.split_k * config.block_n * config.block_m
    return plans.workspace(size, y), plans.counters(y, blocks)


def integer_problem(x: Tensor, N: int, bits: int, group_size: int, arranged: bool) -> integers.Problem:
    """The problem of one row and one expert; its `decodes` says whether there is a kernel for it."""
    return replace(integers.problem_of(x[:1], N, bits, group_size, arranged), M=1)


def launch_integers(
    x: Tensor,
    chosen: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    has_zeros: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """y [pairs, N] for x [rows, K], of a stack of integer weights; see `int_group_matmul`.

    Args:
        x, chosen, bias: see the module's text.
        codes: int32 [experts, N, words]; or, without `scales`, streams of `int_group_layout` [experts, blocks, tiles,
            words].
        scales, zeros: fp16 [experts, groups, N].
        bits, group_size, out_features, has_zeros: of each weight.

    Raises:
        ValueError: shapes or dtypes that the kernel's addresses do not allow.
    """
    from quantkit.kernels.experts_matmul_triton import int_group_kernel  # Triton exists on Linux alone

    K, N, experts, arranged = x.shape[-1], out_features, len(codes), scales is None
    problem = integer_problem(x, N, bits, group_size, arranged)
    if not problem.decodes:
        raise ValueError(f"{K} columns in groups of {group_size}, x of {x.dtype}: no kernel takes such rows")
    if scales is None:
        shape = experts, -(-N // 64), K // TILE, words_of_block(bits, group_size, has_zeros)
        check(x, chosen, experts, bias, N, {"streams": (codes, torch.int32, shape)})
        halves, words = codes.view(torch.float16), shape[2] * shape[3]
        own = codes, halves, halves
        each = shape[1] * words, 2 * shape[1] * words
    else:
        words, groups = codes.shape[-1], (experts, -(-K // group_size), N)
        tensors = {"codes": (codes, torch.int32, (experts, N, integers.row_words(K, bits)))}
        check(x, chosen, experts, bias, N, tensors | {
            "scales": (scales, torch.float16, groups), "zeros": (zeros, torch.float16, groups),
        })  # fmt: skip
        own, each = (codes, scales, or_stand_in(zeros, scales)), (N * words, groups[1] * N)
    rows, y = launching.rows_of(x), plans.result((len(chosen), N), x)
    config = _configured(integers.rule(problem), N, len(chosen), K // TILE, problem.multiprocessors)
    partial, arrived = _scratch(config, N, y)
    with torch.cuda.device_of(x):
        plans.start(
            int_group_kernel, (-(-N // config.block_n), len(chosen), config.split_k),
            rows, chosen, *own, or_stand_in(bias, y), y, partial, arrived,
            experts, N, K // TILE, words, min(group_size, K), rows.stride(0), *each,
            PER_ROW=len(chosen) // len(x), **integers.flags(problem, has_zeros), HAS_BIAS=bias is not None,
            SPLIT_K=config.split_k, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            PAIRS=launching.pairs(problem.capability, config.block_m), **launching.machine(y),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y


def launch_trellis(
    x: Tensor,
    chosen: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale: Tensor,
    bits: int,
    state_bits: int,
    out_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """y [pairs, N] for x [rows, K], of a stack of trellis-coded weights of one part each; see `trellis_matmul`.

    Args:
        x, chosen, bias: see the module's text.
        codes: int32 [experts, words, K].
        scales: uint8 [experts, 1, K].
        scale: fp32 [experts, 1].
        bits, state_bits, out_features: of each weight.

    Raises:
        ValueError: shapes or dtypes that the kernel's addresses do not allow.
    """
    from quantkit.kernels.experts_matmul_triton import trellis_kernel

    (experts, lines), K, N = codes.shape[:2], x.shape[-1], out_features
    wanted = sum(trellis.trellis.lines([N], bits))
    check(x, chosen, experts, bias, N, {
        "codes": (codes, torch.int32, (experts, wanted, K)), "scales": (scales, torch.uint8, (experts, 1, K)),
        "scale": (scale, torch.float32, (experts, 1)),
    })  # fmt: skip
    rows, y = launching.rows_of(x), plans.result((len(chosen), N), x)
    capability, multiprocessors, _ = launching.properties(x.device)
    problem = trellis.Problem(1, N, K, bits, state_bits, x.dtype, capability, multiprocessors, rows.stride(0))
    config = trellis.rule(problem)
    config = _configured(config, N, len(chosen), -(-K // 128), multiprocessors)
    partial, arrived = _scratch(config, N, y)
    constants = trellis.constants(problem, config.num_warps)
    constants.pop("ENDS")
    with torch.cuda.device_of(x):
        plans.start(
            trellis_kernel, (-(-N // trellis.BLOCK_N), len(chosen), config.split_k),
            rows, chosen, codes, scales, scale, or_stand_in(bias, y), y, partial, arrived,
            experts, N, K, lines, rows.stride(0),
            PER_ROW=len(chosen) // len(x), **constants, **trellis.tile_constants(problem, config),
            HAS_BIAS=bias is not None, **launching.machine(y), num_warps=config.num_warps, num_stages=1,
            maxnreg=trellis.registers(problem, config),
        )  # fmt: skip
    return y


def reference_integers(
    x: Tensor,
    chosen: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    has_zeros: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """The specification of `launch_integers`, on any device: y [pairs, N] for x [rows, K]."""
    K = x.shape[-1]

    def weight(expert: int) -> Tensor:
        if scales is None:
            form = bits, group_size, has_zeros, out_features
            return integers.dequantized_arranged(codes[expert], *form, K)
        own = None if zeros is None else zeros[expert]
        return integers.dequantized(codes[expert], scales[expert], own, bits, group_size, K)

    return reference(x, chosen, weight, bias)


def reference_trellis(
    x: Tensor,
    chosen: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale: Tensor,
    bits: int,
    state_bits: int,
    out_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """The specification of `launch_trellis`, on any device: y [pairs, N] for x [rows, K]."""

    def weight(expert: int) -> Tensor:
        own = codes[expert], scales[expert], scale[expert], bits, state_bits
        return trellis.dequantized(*own, [out_features], x.shape[-1])

    return reference(x, chosen, weight, bias)


int_group_experts = operators.define(
    "int_group_experts(Tensor x, Tensor chosen, Tensor codes, Tensor? scales, Tensor? zeros, int bits, int group_size, "
    "int out_features, bool has_zeros, Tensor? bias=None) -> Tensor",
    launch_integers,
    reference_integers,
    lambda x, chosen, *others: x.new_empty(len(chosen), others[5]),
)
trellis_experts = operators.define(
    "trellis_experts(Tensor x, Tensor chosen, Tensor codes, Tensor scales, Tensor scale, int bits, int state_bits, "
    "int out_features, Tensor? bias=None) -> Tensor",
    launch_trellis,
    reference_trellis,
    lambda x, chosen, *others: x.new_empty(len(chosen), others[5]),
)
