"""Multiply by a group-wise integer weight without materialising it: y = x @ W^T + (x @ D^T) @ U^T + bias.

    W[n, k] = (code[n, k] - zero[g, n]) * scale[g, n],    g = k // group_size

`codes` int32 [N, words] are laid out by `quantkit.kernels.bitpack`; `scales` and `zeros` are fp16 [groups, N]; zeros
that fp16 would round are fp32. Without `zeros` the zero point is (2^bits - 1) / 2; where they are one number, fp16 [1],
all groups have it: 2^(bits - 1). U [N, r] and D [r, K] are an optional low-rank correction, bias [N].

Bytes moved: N * K * bits / 8 for codes, 2 or 4 bytes a group and row, 2 * M * K for x, 2 * M * N for y.

Three regimes by M, the rows of x, with the weight always the left operand:

    decode    few rows. The tensor core multiplies the codes themselves, as floats offset + code, and each group's
              fp32 accumulator gets its scale and zero:  y += s * ((dot - offset * sum x) - z * sum x).
              Only where K is a multiple of 128, groups are whole tiles or 64 or 32 columns, and x has 16 bits.
    gemm      more rows, or few and any other shape: weights are formed in fp32 and rounded to x's dtype in registers.
    dense     many rows, or more than few and any other shape or group: W is written out once and torch multiplies.

All accumulate in fp32 and are deterministic; x = I gives exactly the dequantized weight. The kernels stand in
`int_group_matmul_triton.py`, so that this file imports where there is no Triton.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import cpu, int_group_layout, launching, operators, plans
from quantkit.kernels.bitpack import TILE, row_words, unpack
from quantkit.kernels.experts import check as check_experts
from quantkit.kernels.experts import configured, products
from quantkit.kernels.int_group_layout import ROWS, STORED, WHOLE, arranges, middle, restored, words_of_block, zero_of
from quantkit.kernels.launching import or_stand_in
from quantkit.kernels.tuning import Config, chosen, shares

CROSSOVERS = {"default": (32, 192)}
"""By GPU name: the most rows for which `decode`, and for which `gemm`, is used. The default is a model's guess."""
GROUPS_IN_A_TILE = (32, 64)
"""Group sizes below 128 that the decode kernel takes."""
COMPILED = "quantkit.kernels.int_group_numba"
AT_ONCE = 2**24
"""Weights that the reference dequantizes at a time: a head has many times as many."""


def dequantized(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> Tensor:
    """The specification of the weight, on any device: fp32 [N, in_features]."""
    values = unpack(codes, bits, in_features).float()
    padding = scales.shape[0] * group_size - in_features
    grouped = (torch.nn.functional.pad(values, (0, padding)) if padding else values).unflatten(1, (-1, group_size))
    if zeros is not None and zeros.dim() == 2:
        grouped -= zeros.float().T.unsqueeze(2)
    else:
        grouped -= middle(bits, zero_of(zeros))
    grouped *= scales.float().T.unsqueeze(2)
    return grouped.flatten(1)[:, :in_features]


def unpacked(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> Tensor:
    """As `dequantized`, fp32 [out_features, in_features], compiled on a CPU."""
    weight = codes, scales, zeros, bits, group_size
    return cpu.unpacked(COMPILED, dequantized, weight, len(codes), in_features)


def reference(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
) -> Tensor:
    """The specification of the product, on any device: y [..., N] in x's dtype for x [..., K]."""

    def some(part: slice) -> Tensor:
        """y [..., rows of the part]: the product with some rows of the weight."""
        own_zeros = zeros[:, part] if zeros is not None and zeros.dim() == 2 else zeros
        weight = dequantized(codes[part], scales[:, part], own_zeros, bits, group_size, x.shape[-1])
        own_bias, own_up = (None if tensor is None else tensor[part] for tensor in (bias, up))
        return operators.product(x, weight, own_bias, own_up, down)

    step = max(1, AT_ONCE // max(1, x.shape[-1]))
    parts = [some(slice(start, start + step)) for start in range(0, len(codes), step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class Problem:
    """What a launch depends on, beyond the tensors' addresses.

    Attributes:
        M, N, K: rows of x, rows of W, columns of both.
        bits, group_size: of the weight.
        dtype: of x.
        capability: compute capability of the GPU, e.g. 90.
        multiprocessors: of the GPU.
        arranged: whether the weight has the form of `int_group_layout`.
    """

    M: int
    N: int
    K: int
    bits: int
    group_size: int
    dtype: torch.dtype
    capability: int = 90
    multiprocessors: int = 132
    arranged: bool = False

    @property
    def tiled(self) -> bool:
        """Whether codes can be taken tile by tile, straight into 16-bit operands of the tensor core."""
        return self.K % TILE == 0 and self.dtype != torch.float32

    @property
    def whole_groups(self) -> bool:
        """Whether no group ends inside a tile."""
        return self.group_size % TILE == 0 or self.group_size >= self.K

    @property
    def decodes(self) -> bool:
        """Whether the decode kernel takes this shape, whatever M."""
        return self.tiled and (self.whole_groups or self.group_size in GROUPS_IN_A_TILE)

    def key(self) -> str:
        """Names the launch in a table of measured choices."""
        rows, form = rule(self).block_m, f"b{self.bits} g{self.group_size}{' arranged' if self.arranged else ''}"
        return f"int_group_matmul decode m{rows} n{self.N} k{self.K} {form} {self.dtype}"


@lru_cache(maxsize=4096)  # asked at every launch
def rule(problem: Problem) -> Config:
    """Sizes for a decode launch on a GPU that nobody has measured."""
    block_m = 8 if problem.M <= 8 else 16 if problem.M <= 16 else 32
    own = problem.capability // 10 == 10 and block_m >= launching.fewest_rows()  # tensor memory, of sm_10x
    if own and problem.bits == 3:  # both halves of a tile would go there and back; 8 rows at a time take half of that
        block_m, own = 8, False
    narrow = not problem.whole_groups  # each of a tile's groups takes registers
    many_registers = narrow and (problem.bits == 8 or problem.group_size == 32 or block_m == 32)
    block_n = 64 if problem.N <= 2048 or own or many_registers else 128
    tiles = -(-problem.N // block_n) * -(-problem.M // block_m)
    little_memory = problem.capability in (86, 89, 120, 121)  # 99 KiB a program
    stages = 5 if problem.bits <= 2 else 4 if problem.bits < 8 else 2 if little_memory else 3  # a tile's bytes vary
    return Config(block_m, block_n, shares(tiles, problem.K // TILE, problem.multiprocessors), num_stages=stages)


def gemm_rule(problem: Problem) -> Config:
    """Sizes for a gemm launch: no spilled registers, and shared memory for every GPU since sm_80 (99 KiB at least)."""
    block_m = max(16, 1 << (problem.M - 1).bit_length())
    if not (problem.tiled and problem.whole_groups):
        return Config(min(block_m, 32), 32, num_warps=8, num_stages=1)  # scales come a tile at a time, as wide as codes
    widest = 128 if problem.capability // 10 in (9, 10) else 64  # mma.sync holds more of the operands in registers
    block_m = min(block_m, widest)
    return Config(block_m, 128, num_warps=8 if block_m > 32 else 4, num_stages=2 if block_m == 128 else 3)


def flags(problem: Problem, zero: int) -> dict[str, Any]:
    """The compile-time arguments that all three kernels share; `zero` is one of `int_group_layout`'s."""
    size = words_of_block(problem.bits, problem.group_size, zero) if problem.arranged else 0
    groups = TILE // problem.group_size if problem.group_size < min(TILE, problem.K) else 1
    form = {"BITS": problem.bits, "HAS_ZEROS": zero == STORED, "MIDDLE": middle(problem.bits, zero), "GROUPS": groups}
    return form | {"ARRANGED": problem.arranged, "BLOCK_WORDS": size}


def shape_flags(problem: Problem) -> dict[str, Any]:
    """Compile-time arguments that `gemm_kernel` and `dequantize_kernel` have besides."""
    return {"WHOLE_GROUPS": problem.whole_groups, "TAIL": problem.K % TILE}


def problem_of(rows: Tensor, out_features: int, bits: int, group_size: int, arranged: bool = False) -> Problem:
    """The problem that rows [M, K] and a weight pose on the GPU that holds the rows."""
    capability, multiprocessors, _ = launching.properties(rows.device)
    form = bits, group_size, rows.dtype, capability, multiprocessors, arranged
    return Problem(len(rows), out_features, rows.shape[1], *form)


def launch(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Runs the Triton kernels; arguments and result y [..., out_features] as in `reference`.

    Args:
        config: sizes for the decode kernel, instead of those chosen for the shape.

    Raises:
        ValueError: shapes or dtypes that the kernels' addresses do not allow.
    """
    check(x, codes, scales, zeros, bits, group_size, bias, up, down)
    weight = codes, scales, zeros, zero_of(zeros), codes.shape[1]
    return _multiply(x, weight, len(codes), bits, group_size, False, (bias, up, down), config)


def launch_arranged(
    x: Tensor,
    stream: Tensor,
    bits: int,
    group_size: int,
    zero: int,
    out_features: int,
    bias: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """As `launch`, y [..., out_features], of a weight in the form of `int_group_layout`.

    Raises:
        ValueError: shapes or dtypes that the kernels' addresses do not allow.
    """
    K, N = x.shape[-1], out_features
    if bits not in range(1, 9) or group_size < 1 or not arranges(K, group_size):
        raise ValueError(f"bits={bits}, group_size={group_size}, x {tuple(x.shape)}: no such weight is arranged")
    shape = -(-N // ROWS), K // TILE, words_of_block(bits, group_size, zero)
    operators.check(x, N, {"stream": (stream, torch.int32, shape)}, bias, up, down)
    halves = stream.view(torch.float16)
    weight = stream, halves, halves if zero == STORED else None, zero, shape[1] * shape[2]
    return _multiply(x, weight, N, bits, group_size, True, (bias, up, down), config)


_Weight = tuple[Tensor, Tensor, Tensor | None, int, int]
"""Codes, scales, zeros, where zero is, and the words between rows, or blocks of rows, of codes."""


def _multiply(x, weight: _Weight, N: int, bits: int, group_size: int, arranged: bool, others, config) -> Tensor:
    bias, up, down = others
    rows = launching.rows_of(x)
    if not (len(rows) and N):
        return x.new_empty(*x.shape[:-1], N)
    problem = problem_of(rows, N, bits, group_size, arranged)
    decode_rows, gemm_rows = CROSSOVERS.get(launching.properties(x.device)[2], CROSSOVERS["default"])
    inner = None if up is None or down is None else plans.inner(rows, down)
    if problem.M > (gemm_rows if problem.tiled and problem.whole_groups else decode_rows) and config is None:
        y = operators.dense(rows, _write_out(weight, problem), bias, inner, up)
    else:
        y = plans.result((problem.M, N), x)
        with torch.cuda.device_of(x):
            if problem.decodes and (problem.M <= decode_rows or config is not None):
                config = config or (chosen(x.device, problem.key(), rule(problem)) if x.is_cuda else rule(problem))
                _decode(rows, weight, bias, up, inner, y, problem, config)
            else:
                _gemm(rows, weight, bias, up, inner, y, problem)
    return y.view(*x.shape[:-1], N)


def _decode(rows, weight: _Weight, bias, up, inner, y, problem: Problem, config: Config) -> None:
    from quantkit.kernels.int_group_matmul_triton import decode_kernel  # Triton exists on Linux alone

    M, N, K = problem.M, problem.N, problem.K
    codes, scales, zeros, zero, words = weight
    tiles = -(-N // config.block_n), -(-M // config.block_m)
    partial, arrived = y, y
    if config.split_k > 1:
        size = tiles[0] * tiles[1] * config.split_k * config.block_n * config.block_m
        partial, arrived = plans.workspace(size, y), plans.counters(y, tiles[0] * tiles[1])
    plans.start(
        decode_kernel, (*tiles, config.split_k),
        rows, codes, scales, or_stand_in(zeros, scales), *(or_stand_in(tensor, y) for tensor in (bias, up, inner)),
        y, partial, arrived,
        M, N, K // TILE, words, min(problem.group_size, K), rows.stride(0), 0 if up is None else up.shape[1],
        **flags(problem, zero), HAS_BIAS=bias is not None, BLOCK_R=launching.block_r(up),
        SPLIT_K=config.split_k, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PAIRS=launching.pairs(problem.capability, config.block_m),
        **launching.machine(y), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _gemm(rows, weight: _Weight, bias, up, inner, y, problem: Problem) -> None:
    from quantkit.kernels.int_group_matmul_triton import gemm_kernel

    M, N, K = problem.M, problem.N, problem.K
    codes, scales, zeros, zero, words = weight
    config = gemm_rule(problem)
    plans.start(
        gemm_kernel, (-(-N // config.block_n), -(-M // config.block_m)),
        rows, codes, scales, or_stand_in(zeros, scales), *(or_stand_in(tensor, y) for tensor in (bias, up, inner)), y,
        M, N, K, words, min(problem.group_size, K), rows.stride(0), 0 if up is None else up.shape[1],
        **flags(problem, zero), **shape_flags(problem), HAS_BIAS=bias is not None,
        BLOCK_R=launching.block_r(up), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PAIRS=launching.pairs(problem.capability, config.block_m),
        **launching.machine(y), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _write_out(weight: _Weight, problem: Problem) -> Tensor:
    """The dequantized weight [N, K], by the kernel."""
    from quantkit.kernels.int_group_matmul_triton import dequantize_kernel

    N, K = problem.N, problem.K
    codes, scales, zeros, zero, words = weight
    out = torch.empty(N, K, dtype=problem.dtype, device=codes.device)
    with torch.cuda.device_of(codes):
        dequantize_kernel[(-(-N // 64), -(-K // TILE))](
            codes, scales, or_stand_in(zeros, scales), out, N, K, words, min(problem.group_size, K),
            **flags(problem, zero), **shape_flags(problem), BLOCK_N=64, **launching.machine(codes),
            num_warps=4,
        )  # fmt: skip
    return out


def check(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
) -> None:
    """Raises ValueError unless every address that follows from the arguments lies inside the tensors.

    The module's docstring has the shapes and dtypes that are right, for x [..., K].
    """
    if bits not in range(1, 9) or group_size < 1 or codes.dim() != 2:
        raise ValueError(
            f"bits={bits}, group_size={group_size}, codes {tuple(codes.shape)}: codes [N, words] are of 1 to 8 bits, "
            "groups hold at least one column"
        )
    N, K = len(codes), x.shape[-1]
    groups = -(-K // group_size), N
    expected = {
        "codes": (codes, torch.int32, (N, row_words(K, bits))),
        "scales": (scales, torch.float16, groups),
        "zeros": (zeros, int_group_layout.zeros_dtype(zeros), (1,) if zero_of(zeros) == WHOLE else groups),
    }
    operators.check(x, N, expected, bias, up, down)


int_group_matmul = operators.register(
    "int_group_matmul",
    "Tensor codes, Tensor scales, Tensor? zeros, int bits, int group_size",
    lambda codes, *others: codes.shape[0],
    dequantized,
    reference,
    launch,
    COMPILED,
    check,
)


def dequantized_arranged(
    stream: Tensor, bits: int, group_size: int, zero: int, out_features: int, in_features: int
) -> Tensor:
    """The specification of an arranged weight, on any device: fp32 [N, in_features]."""
    return dequantized(*restored(stream, bits, group_size, zero, out_features), bits, group_size, in_features)


def reference_arranged(x, stream, bits, group_size, zero, out_features, bias=None, up=None, down=None) -> Tensor:
    """The specification of the product with an arranged weight, on any device: y [..., N] in x's dtype for x [..., K].

    Args:
        stream: int32 [ceil(N / ROWS), K / 128, words], see `int_group_layout`.
        bits, group_size: of the weight.
        zero: where it is; see `int_group_layout`.
        out_features: N.
        x, bias, up, down: as in `reference`.
    """
    codes, scales, zeros = restored(stream, bits, group_size, zero, out_features)
    return reference(x, codes, scales, zeros, bits, group_size, bias, up, down)


int_group_arranged_matmul = operators.register(
    "int_group_arranged_matmul",
    "Tensor stream, int bits, int group_size, int zero, int out_features",
    lambda *weight: weight[-1],
    dequantized_arranged,
    reference_arranged,
    launch_arranged,
)


def problem_of_expert(x: Tensor, N: int, bits: int, group_size: int, arranged: bool) -> Problem:
    """The problem of one row and one expert; its `decodes` says whether there is a kernel for it."""
    return replace(problem_of(x[:1], N, bits, group_size, arranged), M=1)


def expert_rule(problem: Problem, zero: int) -> Config:
    """Sizes for `experts_kernel`: those of a single weight, where registers suffice for an expert's place too."""
    config = rule(problem)
    return replace(config, block_n=32, num_warps=2) if zero == STORED and problem.group_size == 32 else config


def launch_experts(
    x: Tensor,
    chosen: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    zero: int,
    bias: Tensor | None = None,
) -> Tensor:
    """y [pairs, N] for x [rows, K], of a stack of weights; see `kernels.experts`.

    Args:
        x, chosen, bias: see there.
        codes: int32 [experts, N, words]; or, without `scales`, streams of `int_group_layout` [experts, blocks, tiles,
            words].
        scales, zeros: [experts, groups, N], of the types above; no zeros where none are stored.
        bits, group_size, out_features, zero: of each weight; see `int_group_layout` for the last.

    Raises:
        ValueError: shapes or dtypes that the kernel's addresses do not allow.
    """
    from quantkit.kernels.int_group_matmul_triton import experts_kernel  # Triton exists on Linux alone

    K, N, experts, arranged = x.shape[-1], out_features, len(codes), scales is None
    problem = problem_of_expert(x, N, bits, group_size, arranged)
    if not problem.decodes:
        raise ValueError(f"{K} columns in groups of {group_size}, x of {x.dtype}: no kernel takes such rows")
    if scales is None:
        shape = experts, -(-N // 64), K // TILE, words_of_block(bits, group_size, zero)
        check_experts(x, chosen, experts, bias, N, {"streams": (codes, torch.int32, shape)})
        halves, words = codes.view(torch.float16), shape[2] * shape[3]
        own = codes, halves, halves
        each = shape[1] * words, 2 * shape[1] * words
    else:
        words, groups = codes.shape[-1], (experts, -(-K // group_size), N)
        tensors = {"codes": (codes, torch.int32, (experts, N, row_words(K, bits)))}
        check_experts(x, chosen, experts, bias, N, tensors | {
            "scales": (scales, torch.float16, groups), "zeros": (zeros, int_group_layout.zeros_dtype(zeros), groups),
        })  # fmt: skip
        own, each = (codes, scales, or_stand_in(zeros, scales)), (N * words, groups[1] * N)
    rows, y = launching.rows_of(x), plans.result((len(chosen), N), x)
    config = configured(expert_rule(problem, zero), N, len(chosen), K // TILE, problem.multiprocessors)
    blocks = -(-N // config.block_n) * len(y)
    partial, arrived = plans.scratch(blocks, config.split_k, config.block_n * config.block_m, y)
    with torch.cuda.device_of(x):
        plans.start(
            experts_kernel, (-(-N // config.block_n), len(chosen), config.split_k),
            rows, chosen, *own, or_stand_in(bias, y), y, partial, arrived,
            experts, N, K // TILE, words, min(group_size, K), rows.stride(0), *each,
            PER_ROW=len(chosen) // len(x), **flags(problem, zero), HAS_BIAS=bias is not None,
            SPLIT_K=config.split_k, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            PAIRS=launching.pairs(problem.capability, config.block_m), **launching.machine(y),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y


def reference_experts(
    x: Tensor,
    chosen: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    zero: int,
    bias: Tensor | None = None,
) -> Tensor:
    """The specification of `launch_experts`, on any device: y [pairs, N] for x [rows, K]."""
    K = x.shape[-1]

    def weight(expert: int) -> Tensor:
        if scales is None:
            return dequantized_arranged(codes[expert], bits, group_size, zero, out_features, K)
        whole = codes.new_full((1,), middle(bits, zero), dtype=torch.float16) if zero == WHOLE else None
        own = whole if zeros is None else zeros[expert]
        return dequantized(codes[expert], scales[expert], own, bits, group_size, K)

    return products(x, chosen, weight, bias)


int_group_experts = operators.define(
    "int_group_experts(Tensor x, Tensor chosen, Tensor codes, Tensor? scales, Tensor? zeros, int bits, int group_size, "
    "int out_features, int zero, Tensor? bias=None) -> Tensor",
    launch_experts,
    reference_experts,
    lambda x, chosen, *others: x.new_empty(len(chosen), others[5]),
)
