"""Multiply by a pyramid-quantized weight without materialising it: y = x @ W^T + (x @ D^T) @ U^T + bias.

Two forms of the weight, both with groups along the rows of W:

    factored    W[n, k] = (code[n, k] - 2^(bits-1)) * factor[n // dimension, k]
    table       W[8 g + j, k] = y_j * factor,    y = points[field[g, k] mod 2^index_bits],
                factor = fp16(scale[k] * gains[field[g, k] >> index_bits, |y|^2])

`factored` takes any pyramid: its points are decoded to integers of 2 to 8 bits when it is loaded, because decoding
costs 50 to 70 instructions a weight. `codes` int32 [N, words] are laid out by `quantkit.kernels.bitpack`, and so are
`factors` int32 [ceil(N / dimension), words], the bits of fp16 as codes of 16; both for K rounded up to whole tiles.

`table` takes vectors of 8 with at most 6 pulses as a file has them, up to 16 bits each: `codes` int32 [ceil(N / 8),
words], no padding. `points` int32 [2^index_bits] hold 8 nibbles 8 + y_j each, lowest first, `gains` fp32 [gains, 64]
level / |y|, `scales` fp32 [128 * tiles] those of the columns in the order of `lane_order`.

Bytes moved: N * K * (bits + 16 / dimension) / 8 or N * K * bits / 64 for W, 2 * M * K for x, 2 * M * N for y.

Two regimes by M, the rows of x: few rows are multiplied by weights formed in registers; for many, and only then, W is
written out and torch multiplies. Weights are rounded to x's dtype once, sums are fp32, results are deterministic; x = I
gives exactly the dequantized weight. The kernels stand in `pyramid_matmul_triton.py`, so that this file imports where
there is no Triton.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import launching, operators, plans, pyramid
from quantkit.kernels.bitpack import LANES, TILE, pack, row_words, unpack
from quantkit.kernels.caching import kept
from quantkit.kernels.launching import or_stand_in
from quantkit.kernels.tuning import Config, chosen

CROSSOVERS = {"default": 32}
"""By GPU name: the most rows for which weights are formed in registers. The default is a model's guess."""
LARGEST_SQUARE = 64
"""Squared norms of points in a table are below."""


def padded(columns: int) -> int:
    """Columns of whole tiles."""
    return -(-columns // TILE) * TILE


def transcode(points: Tensor, factors: Tensor, bits: int, out_features: int) -> tuple[Tensor, Tensor]:
    """Integer codes and factors of the factored form.

    Args:
        points: integers [groups, in_features, dimension] in [-2^(bits-1), 2^(bits-1)).
        factors: fp16 [groups, in_features].
        out_features: rows; what is left of the last group is dropped.

    Returns:
        (codes, factors) as `pyramid_matmul` takes them.
    """
    codes = (points.short() + 2 ** (bits - 1)).to(torch.uint8).transpose(1, 2).flatten(0, 1)[:out_features]
    space = padded(points.shape[1]) - points.shape[1]
    words = torch.nn.functional.pad(factors, (0, space)).view(torch.int16).int() & 0xFFFF
    return pack(torch.nn.functional.pad(codes, (0, space)), bits), pack(words, 16)


def inverse_norms(largest_square: int, device: torch.device) -> Tensor:
    """1 / |y| by |y|^2, fp32 [squares], for every square up to `largest_square` and some more."""
    return _inverse_norms(largest_square.bit_length(), device)


@kept
def _inverse_norms(bits: int, device: torch.device) -> Tensor:
    return torch.arange(1 << bits).float().rsqrt().to(device)  # made on the CPU: all devices have the same


def lane_order(scales: Tensor) -> Tensor:
    """Scales [K] of columns as fp32 in the order in which a tile's words hold them: even columns, then odd ones."""
    tiles = torch.nn.functional.pad(scales.float(), (0, padded(len(scales)) - len(scales))).view(-1, 16, LANES, 2)
    return tiles.permute(0, 3, 2, 1).flatten()


def gain_table(levels: Tensor) -> Tensor:
    """fp32 [gains, 64]: level / |y|, 0 for |y| = 0."""
    inverse = inverse_norms(LARGEST_SQUARE - 1, levels.device).clone()
    inverse[0] = 0
    return levels.float().unsqueeze(1) * inverse


@kept
def point_table(pulses: int, device: torch.device) -> Tensor:
    """int32 [2^index_bits]: the points of P(8, pulses), pulses <= 6, by number; zeros beyond the last."""
    numbers = torch.arange(pyramid.count(8, pulses)).unsqueeze(-1)
    shifts = 4 * torch.arange(8)
    words = ((pyramid.decode(numbers, 8, pulses).long() + 8) << shifts).sum(-1)
    table = torch.full((1 << pyramid.index_bits(8, pulses),), 0x88888888, dtype=torch.int64)
    table[: len(words)] = words
    return table.to(torch.int32).to(device)


def dequantized(codes: Tensor, factors: Tensor, bits: int, dimension: int, in_features: int) -> Tensor:
    """The specification of the factored weight, on any device: fp32 [N, in_features]."""
    columns = padded(in_features)
    values = unpack(codes, bits, columns)[:, :in_features].float().sub_(2 ** (bits - 1))
    halves = unpack(factors, 16, columns)[:, :in_features].to(torch.int16).view(torch.float16).float()
    rows = torch.nn.functional.pad(values, (0, 0, 0, len(factors) * dimension - len(codes)))
    return rows.unflatten(0, (-1, dimension)).mul_(halves.unsqueeze(1)).flatten(0, 1)[: len(codes)]


def dequantized_table(
    codes: Tensor, scales: Tensor, gains: Tensor, points: Tensor, bits: int, out_features: int, in_features: int
) -> Tensor:
    """The specification of the weight of a table, on any device: fp32 [out_features, in_features]."""
    fields = unpack(codes, bits, in_features).long()
    words = points[fields & len(points) - 1]
    entries = (words.unsqueeze(1) >> (4 * torch.arange(8, device=words.device).view(8, 1)) & 15).float() - 8
    columns = scales.view(-1, 2, LANES, 16).permute(0, 3, 2, 1).flatten()[:in_features]
    squares = entries.square().sum(1).long()
    factor = (gains[fields >> _index_bits(points), squares] * columns).half().float()
    return entries.mul_(factor.unsqueeze(1)).flatten(0, 1)[:out_features]


def reference(x, codes, factors, bits, dimension, bias=None, up=None, down=None) -> Tensor:
    """The specification of `pyramid_matmul`, on any device: y [..., N] in x's dtype for x [..., K]."""
    return operators.product(x, dequantized(codes, factors, bits, dimension, x.shape[-1]), bias, up, down)


def table_reference(x, codes, scales, gains, points, bits, out_features, bias=None, up=None, down=None) -> Tensor:
    """The specification of `pyramid_table_matmul`, on any device: y [..., N] in x's dtype for x [..., K]."""
    weight = dequantized_table(codes, scales, gains, points, bits, out_features, x.shape[-1])
    return operators.product(x, weight, bias, up, down)


@dataclass(frozen=True)
class Problem:
    """What a launch depends on, beyond the tensors' addresses.

    Attributes:
        M, N, K: rows of x, rows of W, columns of both.
        bits: of a code, or of a field of the table.
        dimension: rows that share a factor.
        index_bits: of a field, that select a point; 0 for the factored form.
        dtype: of x.
        capability: compute capability of the GPU, e.g. 90.
        multiprocessors: of the GPU.
    """

    M: int
    N: int
    K: int
    bits: int
    dimension: int
    index_bits: int
    dtype: torch.dtype
    capability: int = 90
    multiprocessors: int = 132

    @property
    def kernel(self) -> str:
        """The form's name."""
        return "table" if self.index_bits else "factored"

    def key(self) -> str:
        """Names the launch in a table of measured choices."""
        shape = f"m{rule(self).block_m} n{self.N} k{self.K} b{self.bits} d{self.dimension} i{self.index_bits}"
        return f"pyramid_matmul {self.kernel} {shape} {self.dtype}"


@lru_cache(maxsize=4096)  # asked at every launch
def rule(problem: Problem) -> Config:
    """Sizes for a launch on a GPU that nobody has measured.

    A lane with 8 rows of a group splits its factors once for all 8, hence few warps for many rows of W; it has not the
    registers for that and for 32 rows of x, or for a last tile that is read with care.
    """
    hopper, ragged = problem.capability // 10 == 9, problem.K % TILE != 0
    block_m = 8 if problem.M <= 8 else 16 if problem.M <= 16 else 32
    if problem.dtype == torch.float32:
        block_m, block_n, warps, stages = max(block_m, 16), 64, 8, 1
    elif problem.index_bits:  # little shared memory, so that the cache beside it holds the points
        block_m = min(block_m, 32 if hopper and not ragged else 16)
        block_n, warps, stages = (128, 2, 2) if block_m == 8 or problem.capability < 90 else (256, 4, 2)
    else:
        blackwell = problem.capability // 10 == 10  # its own instructions want W elsewhere than in registers
        narrow = problem.dimension % 4 != 0 or (block_m == 32 and blackwell)
        if block_m == 16:
            narrow |= problem.bits == 7 or (blackwell and problem.dtype == torch.float16)
        block_n, warps = (64, 2) if narrow else (128, 4) if ragged or block_m == 32 else (128, 2)
        stages = 4 if problem.dimension % 4 == 0 and problem.bits < 8 else 3 if problem.dimension % 2 == 0 else 2
        stages = 2 if block_m == 16 and blackwell else stages  # of 4 ptxas makes a program that spills
    programs = -(-problem.N // block_n) * -(-problem.M // block_m)
    tiles, split = -(-problem.K // TILE), 1
    while programs * split * warps < 8 * problem.multiprocessors and split < 16 and tiles // (2 * split) >= 2:
        split *= 2
    return Config(block_m, block_n, split, warps, stages)


def constants(problem: Problem, config: Config) -> dict[str, Any]:
    """The compile-time arguments that a form's two kernels share, beside block_n and the machine."""
    if problem.index_bits:
        found = {"INDEX": problem.index_bits, "TAIL": problem.K % TILE, "WARPS": max(1, config.block_n // 64)}
    else:
        warps = min(config.num_warps, config.block_n // 16)
        rows = config.block_n // (8 * warps)
        found = {"RUN": rows if problem.dimension >= problem.N else gcd(problem.dimension, rows), "WARPS": warps}
    return {"BITS": problem.bits, **found}


def pairs(problem: Problem, config: Config) -> int:
    """As `launching.pairs`; instructions of a warp-group take one."""
    return launching.pairs(problem.capability, config.block_m) if config.num_warps >= 4 else 4


def dequantize_config(problem: Problem) -> Config:
    """Sizes for the kernels that write W out."""
    return Config(1, 128, num_warps=8, num_stages=2) if problem.index_bits else Config(1, 64, num_warps=8, num_stages=2)


def _multiply(x, weight, sizes, shape, bias, up, down, config) -> Tensor:
    """Runs the kernels of a form.

    Args:
        weight: tensors in the order in which kernels take them.
        sizes: numbers, likewise.
        shape: (N, bits, dimension, index_bits).
        config: sizes for the kernel of few rows, instead of those chosen for the shape.
    """
    N, bits, dimension, index_bits = shape
    K = x.shape[-1]
    rows = launching.rows_of(x)
    if not len(rows):
        return x.new_empty(*x.shape[:-1], N)
    capability, multiprocessors, gpu = launching.properties(x.device)
    problem = Problem(len(rows), N, K, bits, dimension, index_bits, x.dtype, capability, multiprocessors)
    inner = None if up is None or down is None else plans.inner(rows, down)
    if problem.M > CROSSOVERS.get(gpu, CROSSOVERS["default"]) and config is None:
        y = operators.dense(rows, _write_out(weight, sizes, problem), bias, inner, up)
    else:
        y = plans.result((problem.M, N), x)
        if config is None:
            config = rule(problem)
            config = chosen(x.device, problem.key(), config) if x.is_cuda else config
        with torch.cuda.device_of(x):
            _fused(rows, weight, sizes, bias, up, inner, y, problem, config)
    return y.view(*x.shape[:-1], N)


def _fused(rows, weight, sizes, bias, up, inner, y, problem: Problem, config: Config) -> None:
    from quantkit.kernels import pyramid_matmul_triton as kernels  # Triton exists on Linux alone

    M, N, K = problem.M, problem.N, problem.K
    grid = -(-N // config.block_n), -(-M // config.block_m), config.split_k
    partial, arrived = y, y
    if config.split_k > 1:
        size = grid[0] * grid[1] * config.split_k * config.block_n * config.block_m
        partial, arrived = plans.workspace(size, y), plans.counters(y, grid[0] * grid[1])
    ragged = {} if problem.index_bits else {"RAGGED": K % TILE != 0}
    plans.start(
        kernels.table_kernel if problem.index_bits else kernels.factored_kernel, grid,
        rows, *weight, *(or_stand_in(tensor, y) for tensor in (bias, up, inner)), y, partial, arrived,
        M, N, K, -(-K // TILE), *sizes, rows.stride(0), 0 if up is None else up.shape[1],
        **constants(problem, config), **ragged, HAS_BIAS=bias is not None, BLOCK_R=launching.block_r(up),
        SPLIT_K=config.split_k, BLOCK_M=config.block_m, BLOCK_N=config.block_n, PAIRS=pairs(problem, config),
        **launching.machine(y), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _write_out(weight, sizes, problem: Problem) -> Tensor:
    """The dequantized weight [N, K], by the kernel."""
    from quantkit.kernels import pyramid_matmul_triton as kernels

    config, codes = dequantize_config(problem), weight[0]
    out = torch.empty(problem.N, problem.K, dtype=problem.dtype, device=codes.device)
    grid = -(-problem.N // config.block_n), -(-problem.K // TILE)
    with torch.cuda.device_of(codes):
        (kernels.table_dequantize_kernel if problem.index_bits else kernels.factored_dequantize_kernel)[grid](
            *weight, out, problem.N, problem.K, grid[1], *sizes, **constants(problem, config), BLOCK_N=config.block_n,
            **launching.machine(codes), num_warps=config.num_warps,
        )  # fmt: skip
    return out


def launch(x, codes, factors, bits, dimension, bias=None, up=None, down=None, config: Config | None = None) -> Tensor:
    """Runs the Triton kernels; arguments and result y [..., out_features] as in `reference`.

    Raises:
        ValueError: shapes or dtypes that the kernels' addresses do not allow.
    """
    if bits not in range(1, 9) or dimension < 1 or codes.dim() != 2:
        raise ValueError(f"bits={bits}, dimension={dimension}, codes {tuple(codes.shape)}: codes are of 1 to 8 bits")
    N, columns = len(codes), padded(x.shape[-1])
    expected = {
        "codes": (codes, torch.int32, (N, row_words(columns, bits))),
        "factors": (factors, torch.int32, (-(-N // dimension), row_words(columns, 16))),
    }
    operators.check(x, N, expected, bias, up, down)
    sizes = codes.shape[1], factors.shape[1], dimension
    return _multiply(x, (codes, factors), sizes, (N, bits, dimension, 0), bias, up, down, config)


def table_launch(
    x, codes, scales, gains, points, bits, out_features, bias=None, up=None, down=None, config: Config | None = None
) -> Tensor:
    """Runs the Triton kernels; arguments and result y [..., out_features] as in `table_reference`.

    Raises:
        ValueError: shapes or dtypes that the kernels' addresses do not allow.
    """
    index_bits = _index_bits(points)
    if bits not in range(1, 17) or not 1 <= index_bits <= bits:
        raise ValueError(
            f"fields of {bits} bits with {len(points)} points: fields have 1 to 16 bits, an index and a gain"
        )
    K = x.shape[-1]
    expected = {
        "codes": (codes, torch.int32, (-(-out_features // 8), row_words(K, bits))),
        "scales": (scales, torch.float32, (padded(K),)),
        "gains": (gains, torch.float32, (1 << (bits - index_bits), LARGEST_SQUARE)),
        "points": (points, torch.int32, (1 << index_bits,)),
    }
    operators.check(x, out_features, expected, bias, up, down)
    shape = out_features, bits, 8, index_bits
    return _multiply(x, (codes, scales, gains, points), (codes.shape[1],), shape, bias, up, down, config)


def _index_bits(points: Tensor) -> int:
    return (len(points) - 1).bit_length()


pyramid_matmul = operators.register(
    "pyramid_matmul",
    "Tensor codes, Tensor factors, int bits, int dimension",
    lambda codes, *others: codes.shape[0],
    dequantized,
    reference,
    launch,
)
pyramid_table_matmul = operators.register(
    "pyramid_table_matmul",
    "Tensor codes, Tensor scales, Tensor gains, Tensor points, int bits, int out_features",
    lambda *arguments: arguments[-1],
    dequantized_table,
    table_reference,
    table_launch,
)
