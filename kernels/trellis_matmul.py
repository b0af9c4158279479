"""Multiply by a trellis-coded weight without materialising it: y = x @ W^T + (x @ D^T) @ U^T + bias.

    W[n, k] = value(the L bits of ring k from bit K n on) * step(scales[k]) * scale

`quantkit.kernels.trellis` has the code: rings of bits along N, one for each column; a value is the sum of two bf16
that a multiplication, a mask and a flip make of a state. `codes` int32 [words, in_features] hold the i-th words of all
rings side by side; the word behind a ring's last is its first. `scales` are uint8 [parts, in_features] and `scale` fp32
[parts], for weights that lie side by side (q, k, v): each has its own rings, steps and scale. U [N, r] and D [r,
in_features] are an optional low-rank correction, bias is [N].

Bytes moved: N * in_features * bits / 8 for W, 2 * M * in_features for x, 2 * M * N for y. From the caches a run of 16
weights is read together with the first 16 bits of the next. Up to 3 bits a weight it is instructions that take time.

Two regimes by M, the rows of x:

    few     weights are decoded in the registers that the tensor core multiplies, without a rounding. Steps go into x,
            which is exact but for one rounding of x in bf16 and fp32; the scale is applied to the fp32 sums.
    many    W is written out, rounded to x's dtype, and torch multiplies.

Results are deterministic; x = I gives exactly the dequantized weight. The kernels stand in `trellis_matmul_triton.py`,
so that this file imports where there is no Triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import cpu, launching, operators, plans, trellis
from quantkit.kernels.experts import check as check_experts
from quantkit.kernels.experts import configured, products
from quantkit.kernels.launching import or_stand_in
from quantkit.kernels.trellis import STATE_BITS
from quantkit.kernels.tuning import Config, chosen

CROSSOVERS = {"default": 32}
"""By GPU name: the most rows for which weights are decoded in registers. The default is a model's guess."""
COMPILED = "quantkit.kernels.trellis_numba"
BLOCK_N = 128
"""Rows of W a program: 16 for each row of lanes."""
_TILE = 128
"""Columns of two chunks of four warps."""


def dequantized(
    codes: Tensor, scales: Tensor, scale: Tensor, bits: int, state_bits: int, parts: Sequence[int], in_features: int
) -> Tensor:
    """The specification of the weight, on any device: fp32 [out_features, in_features]."""
    return trellis.dequantized(codes, scales, scale, bits, state_bits, parts)


def unpacked(
    codes: Tensor, scales: Tensor, scale: Tensor, bits: int, state_bits: int, parts: Sequence[int], in_features: int
) -> Tensor:
    """As `dequantized`, fp32 [out_features, in_features], compiled on a CPU."""
    weight = codes, scales, scale, bits, state_bits, parts
    return cpu.unpacked(COMPILED, dequantized, weight, sum(parts), in_features)


def reference(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale: Tensor,
    bits: int,
    state_bits: int,
    parts: Sequence[int],
    bias: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
) -> Tensor:
    """The specification of the product, on any device: y [..., sum of parts] in x's dtype for x [..., K_in]."""
    weight = trellis.dequantized(codes, scales, scale, bits, state_bits, parts)
    return operators.product(x, weight, bias, up, down)


@dataclass(frozen=True)
class Problem:
    """What a launch depends on, beyond the tensors' addresses.

    Attributes:
        M, N, K: rows of x, rows of W, columns of both.
        bits, state_bits: of a symbol and of a state.
        dtype: of x.
        capability: compute capability of the GPU, e.g. 90.
        multiprocessors: of the GPU.
        stride: of the rows of x; None for K.
        ends: the tile of W's rows behind each part's last, but for the last part.
    """

    M: int
    N: int
    K: int
    bits: int
    state_bits: int
    dtype: torch.dtype
    capability: int = 90
    multiprocessors: int = 132
    stride: int | None = None
    ends: tuple[int, ...] = ()

    @property
    def wide(self) -> bool:
        """Whether four neighbours can be read at once from every row of x and line of codes."""
        return self.K % 16 == 0 and (self.stride or 0) % 16 == 0

    def key(self) -> str:
        """Names the launch in a table of measured choices."""
        return f"trellis_matmul m{rule(self).block_m} n{self.N} k{self.K} b{self.bits} s{self.state_bits} {self.dtype}"


def registers(problem: Problem, config: Config) -> int:
    """The most that the assembler may use for a thread, lest it spills; what lets 16, 12 or 8 warps run beside.

    Found by compiling (`evals/kernel_build`), for each generation of GPUs.
    """
    half, ragged, generation = problem.dtype == torch.float16, problem.K % _TILE != 0, problem.capability // 10
    words = problem.state_bits < 16 or problem.bits == 6 or (problem.ends and chunks(problem, config) == 4)
    four = problem.bits == 4 and (config.block_m == 8 or generation == 10)
    five = problem.bits == 5 and generation != 9 and (config.block_m > 8 or generation == 12)
    more = problem.dtype == torch.float32 or (half and (problem.bits > 6 or four or five or ragged))
    more = more or (config.block_m <= 16 and bool(words)) or (config.block_m > 8 and ragged)
    return (128, 168, 255)[min(2, config.block_m // 16 + more + (not problem.wide))]


@lru_cache(maxsize=4096)  # asked at every launch
def rule(problem: Problem) -> Config:
    """Sizes for a launch on a GPU that nobody has measured: as many programs as registers let run at a time, all of
    whose first chunks are then on their way, with two tiles of K each, or four where shares have many sums."""
    tiles = -(-problem.K // _TILE)
    plain = problem.dtype == torch.bfloat16 and problem.K % _TILE == 0
    long = problem.state_bits == 16 and problem.bits != 6  # else windows' words are more
    loose = problem.bits > 2 or problem.capability < 100  # Blackwell's assembler spills 2 bits of 32 rows
    # parts of x, and where it ends, take registers too
    most = 32 if plain and long and loose else 16 if problem.wide else 8
    block_m = 8 if problem.M <= 8 else min(most, 16 if problem.M <= 16 else 32)
    programs, split = -(-problem.N // BLOCK_N) * -(-problem.M // block_m), 1
    config = Config(block_m, BLOCK_N, num_warps=4, num_stages=1)
    wanted, fewest = 512 // registers(problem, config) * problem.multiprocessors, 2 if block_m == 8 else 4
    while programs * split < wanted and split < 32 and tiles // (2 * split) >= fewest:
        split *= 2
    return replace(config, split_k=split)


def chunks(problem: Problem, config: Config) -> int:
    """Chunks of a warp in a tile: as many as registers hold the words of."""
    light = problem.bits <= (4 if config.block_m == 8 else 2 if config.block_m == 16 else 0)
    whole = problem.K % (64 * config.num_warps) == 0
    plain = problem.dtype == torch.bfloat16 and (problem.state_bits == 16 or config.block_m == 8)
    return 4 if light and whole and problem.wide and plain else 2


def constants(problem: Problem, warps: int) -> dict[str, Any]:
    """The compile-time arguments that both kernels share, beside the machine."""
    shared = {"BITS": problem.bits, "STATE_BITS": problem.state_bits, "WIDE": problem.wide, "WARPS": warps}
    return shared | {"ENDS": problem.ends}


def tile_constants(problem: Problem, config: Config) -> dict[str, Any]:
    """Compile-time arguments of the kernel of few rows that follow from its sizes."""
    ahead = chunks(problem, config)
    ragged = problem.K % (16 * ahead * config.num_warps) != 0
    return {"CHUNKS": ahead, "RAGGED": ragged, "SPLIT_K": config.split_k, "BLOCK_M": config.block_m}


def launch(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale: Tensor,
    bits: int,
    state_bits: int,
    parts: Sequence[int],
    bias: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Runs the Triton kernels; arguments and result y [..., sum of parts] as in `reference`.

    Args:
        config: sizes for the kernel of few rows, instead of those chosen for the shape; block_n is `BLOCK_N`.

    Raises:
        ValueError: shapes or dtypes that the kernels' addresses do not allow.
    """
    check(x, codes, scales, scale, bits, state_bits, parts, bias, up, down)
    rows, out_features = launching.rows_of(x), sum(parts)
    if scales.data_ptr() % 4:  # read by words; a weight that was prepared has none such
        scales = scales.clone()
    if rows.data_ptr() % 4:
        rows = rows.clone()
    if not len(rows):
        return x.new_empty(*x.shape[:-1], out_features)
    capability, multiprocessors, gpu = launching.properties(x.device)
    shape = len(rows), out_features, x.shape[-1], bits, state_bits
    ends = tuple(end // BLOCK_N for end in accumulate(parts[:-1]))
    problem = Problem(*shape, x.dtype, capability, multiprocessors, rows.stride(0), ends)
    inner = None if up is None or down is None else plans.inner(rows, down)
    if problem.M > CROSSOVERS.get(gpu, CROSSOVERS["default"]) and config is None:
        y = operators.dense(rows, _write_out(codes, scales, scale, problem), bias, inner, up)
    else:
        y = plans.result((problem.M, problem.N), x)
        if config is None:
            config = rule(problem)
            config = chosen(x.device, problem.key(), config) if x.is_cuda else config
        with torch.cuda.device_of(x):
            _fused(rows, codes, scales, scale, bias, up, inner, y, problem, config)
    return y.view(*x.shape[:-1], out_features)


def _fused(rows, codes, scales, scale, bias, up, inner, y, problem: Problem, config: Config) -> None:
    from quantkit.kernels.trellis_matmul_triton import multiply_kernel  # Triton exists on Linux alone

    grid = -(-problem.N // BLOCK_N), -(-problem.M // config.block_m), config.split_k
    partial, arrived = y, y
    if config.split_k > 1:
        size = grid[0] * grid[1] * config.split_k * BLOCK_N * config.block_m
        partial, arrived = plans.workspace(size, y), plans.counters(y, grid[0] * grid[1])
    plans.start(
        multiply_kernel, grid,
        rows, codes, scales, scale, *(or_stand_in(tensor, y) for tensor in (bias, up, inner)), y, partial, arrived,
        problem.M, problem.N, problem.K, len(codes), rows.stride(0), 0 if up is None else up.shape[1],
        **constants(problem, config.num_warps), **tile_constants(problem, config), HAS_BIAS=bias is not None,
        BLOCK_R=launching.block_r(up), **launching.machine(y), **launching.dependent(y), num_warps=config.num_warps,
        num_stages=1, maxnreg=registers(problem, config),
    )  # fmt: skip


def _write_out(codes: Tensor, scales: Tensor, scale: Tensor, problem: Problem) -> Tensor:
    """The dequantized weight [N, K_in], by the kernel."""
    from quantkit.kernels.trellis_matmul_triton import dequantize_kernel

    weight = torch.empty(problem.N, problem.K, dtype=problem.dtype, device=codes.device)
    with torch.cuda.device_of(codes):
        dequantize_kernel[(-(-problem.N // BLOCK_N), -(-problem.K // 64))](
            codes, scales, scale, weight, problem.N, problem.K, len(codes), **constants(problem, 4),
            **launching.machine(codes), num_warps=4,
        )  # fmt: skip
    return weight


def check(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale: Tensor,
    bits: int,
    state_bits: int,
    parts: Sequence[int],
    bias: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
) -> None:
    """Raises ValueError unless every address that follows from the arguments lies inside the tensors.

    The module's docstring has the shapes and dtypes that are right, for x [..., K].
    """
    if bits not in range(1, 9) or state_bits not in range(STATE_BITS[0], STATE_BITS[1] + 1):
        raise ValueError(
            f"bits={bits}, state_bits={state_bits}: symbols have 1 to 8 bits, states {STATE_BITS[0]} to {STATE_BITS[1]}"
        )
    if min(parts, default=0) < 1 or any(part % BLOCK_N for part in parts[:-1]):
        raise ValueError(
            f"parts={list(parts)}: a weight has rows; side by side, multiples of {BLOCK_N} but for the last"
        )
    expected = {
        "codes": (codes, torch.int32, (sum(trellis.lines(parts, bits)), x.shape[-1])),
        "scales": (scales, torch.uint8, (len(parts), x.shape[-1])),
        "scale": (scale, torch.float32, (len(parts),)),
    }
    operators.check(x, sum(parts), expected, bias, up, down)


trellis_matmul = operators.register(
    "trellis_matmul",
    "Tensor codes, Tensor scales, Tensor scale, int bits, int state_bits, int[] parts",
    lambda *weight: sum(weight[-1]),
    dequantized,
    reference,
    launch,
    COMPILED,
    check,
)


def expert_registers(problem: Problem, config: Config) -> int:
    """As `registers`, for `experts_kernel`, which keeps an expert's place too."""
    least = 255 if problem.dtype == torch.float32 and problem.bits > 5 else 168 if problem.bits == 5 else 0
    return max(registers(problem, config), least)


def launch_experts(
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
    """y [pairs, N] for x [rows, K], of a stack of weights of one part each; see `kernels.experts`.

    Args:
        x, chosen, bias: see there.
        codes: int32 [experts, words, K].
        scales: uint8 [experts, 1, K].
        scale: fp32 [experts, 1].
        bits, state_bits, out_features: of each weight.

    Raises:
        ValueError: shapes or dtypes that the kernel's addresses do not allow.
    """
    from quantkit.kernels.trellis_matmul_triton import experts_kernel

    (experts, lines), K, N = codes.shape[:2], x.shape[-1], out_features
    wanted = sum(trellis.lines([N], bits))
    check_experts(x, chosen, experts, bias, N, {
        "codes": (codes, torch.int32, (experts, wanted, K)), "scales": (scales, torch.uint8, (experts, 1, K)),
        "scale": (scale, torch.float32, (experts, 1)),
    })  # fmt: skip
    rows, y = launching.rows_of(x), plans.result((len(chosen), N), x)
    capability, multiprocessors, _ = launching.properties(x.device)
    problem = Problem(1, N, K, bits, state_bits, x.dtype, capability, multiprocessors, rows.stride(0))
    config = rule(problem)
    config = configured(config, N, len(chosen), -(-K // 128), multiprocessors)
    blocks = -(-N // BLOCK_N) * len(y)
    partial, arrived = plans.scratch(blocks, config.split_k, BLOCK_N * config.block_m, y)
    shared = constants(problem, config.num_warps)
    shared.pop("ENDS")
    with torch.cuda.device_of(x):
        plans.start(
            experts_kernel, (-(-N // BLOCK_N), len(chosen), config.split_k),
            rows, chosen, codes, scales, scale, or_stand_in(bias, y), y, partial, arrived,
            experts, N, K, lines, rows.stride(0),
            PER_ROW=len(chosen) // len(x), **shared, **tile_constants(problem, config),
            HAS_BIAS=bias is not None, **launching.machine(y), num_warps=config.num_warps, num_stages=1,
            maxnreg=expert_registers(problem, config),
        )  # fmt: skip
    return y


def reference_experts(
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
    """The specification of `launch_experts`, on any device: y [pairs, N] for x [rows, K]."""

    def weight(expert: int) -> Tensor:
        own = codes[expert], scales[expert], scale[expert], bits, state_bits
        return dequantized(*own, [out_features], x.shape[-1])

    return products(x, chosen, weight, bias)


trellis_experts = operators.define(
    "trellis_experts(Tensor x, Tensor chosen, Tensor codes, Tensor scales, Tensor scale, int bits, int state_bits, "
    "int out_features, Tensor? bias=None) -> Tensor",
    launch_experts,
    reference_experts,
    lambda x, chosen, *others: x.new_empty(len(chosen), others[5]),
)
