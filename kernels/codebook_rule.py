"""What a launch of `codebook_matmul` looks like: sizes, where codebooks are read from, and how fast that may be.

Pure functions of a problem's shape: nothing here asks a GPU.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from quantkit.kernels.bitpack import TILE, row_words
from quantkit.kernels.codebook_table import STATIC_LIMIT, table_bytes
from quantkit.kernels.tuning import Config, shares

SHARED_MEMORY = {80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448}
"""Bytes that a program may use, by compute capability; others have 99 KiB."""


def range_width(columns: int, ranges: int) -> int:
    """Columns of a range that has codebooks of its own: all, or whole tiles."""
    return columns if ranges == 1 else -(-columns // (ranges * TILE)) * TILE


@dataclass(frozen=True)
class Problem:
    """What a launch depends on, beyond the tensors' addresses.

    Attributes:
        M, N, K: rows of x, rows of W, columns of both.
        v: rows of W in a vector.
        bits, residual_bits: of the codes; the latter 0 for one stage.
        ranges, residual_ranges: of columns with books of their own.
        dtype: of x.
        capability: compute capability of the GPU, e.g. 90.
        multiprocessors: of the GPU.
        assembly: whether NVIDIA's assembly runs there.
    """

    M: int
    N: int
    K: int
    v: int
    bits: int
    residual_bits: int
    ranges: int
    residual_ranges: int
    dtype: torch.dtype
    capability: int = 90
    multiprocessors: int = 132
    assembly: bool = True

    @property
    def vectors(self) -> int:
        """Vectors of a column: rows of codes."""
        return -(-self.N // self.v)

    @property
    def tiled(self) -> bool:
        """Whether codes can be taken tile by tile, in the order of the tensor core's operand."""
        return self.K % TILE == 0

    @property
    def plain(self) -> bool:
        """Whether Triton's own loads look vectors up: nothing else reads every shape."""
        return not (self.assembly and self.tiled and self.residual_ranges in (0, self.ranges))

    @property
    def range_tiles(self) -> tuple[int, int]:
        """Tiles of 128 columns of a range, for both stages."""
        first, second = (range_width(self.K, max(1, ranges)) for ranges in (self.ranges, self.residual_ranges))
        return -(-first // TILE), -(-second // TILE)

    @property
    def flags(self) -> dict[str, int]:
        """The compile-time arguments that the kernels share."""
        bits = {"V": self.v, "BITS": self.bits, "MORE_BITS": self.residual_bits}
        return bits | {"TILED": self.tiled, "TAIL": self.K % TILE}

    def key(self) -> str:
        """Names the launch in a table of measured choices."""
        codes = f"v{self.v} b{self.bits}+{self.residual_bits} r{self.ranges}"
        return f"codebook_matmul decode m{_block_m(self.M)} n{self.N} k{self.K} {codes} {self.dtype}"


@dataclass(frozen=True)
class Lookup:
    """How a program reads codebooks.

    Attributes:
        source: "shared", "global" or "plain"; see `codebook_matmul_triton`.
        window: entries of each vector that a program multiplies by.
        copies: of the codebooks in shared memory.
        sections: ranges of columns that a program's share of K may have a part in.
        two: whether it holds all pairs of vectors instead, and two codes are looked up at once.
    """

    source: str
    window: int
    copies: int
    sections: int = 1
    two: bool = False

    def table(self, problem: Problem) -> int:
        """Bytes of shared memory beside Triton's own."""
        if self.source != "shared":
            return 0
        times = 2 if self.two else 1
        sizes = (times * self.window, self.copies, self.sections, times * problem.bits, problem.residual_bits)
        return table_bytes(*sizes)


@lru_cache(maxsize=4096)  # asked at every launch
def lookup(problem: Problem, config: Config) -> Lookup:
    """How a launch of these sizes reads codebooks: from shared memory where they fit, the widest window first."""
    most = _most_entries(problem, config.block_m)
    if problem.plain:
        return Lookup("plain", _share(problem.v, most), 0)
    sections = _sections(problem, config.split_k)
    two = problem.bits in (1, 2, 4) and problem.v <= min(4, most) and not problem.residual_bits
    if two:  # only without lanes that meet in a bank: pairs take more room than they save instructions
        found = Lookup("shared", problem.v, 32 if problem.v == 1 else 16 if problem.v == 2 else 8, sections, True)
        if runs(found.table(problem), problem, config):
            return found
    widths = {_share(problem.v, width) for width in range(min(2, problem.v), most + 1)}
    for window in sorted(widths, reverse=True):
        for copies in (32, 16, 8, 4, 2, 1):
            found = Lookup("shared", window, copies, sections)
            if copies * 2 * min(window, 4) <= 128 and runs(found.table(problem), problem, config):
                return found
    whole = max(width for width in range(1, most + 1) if problem.v % width == 0)
    return Lookup("global", whole, 0, sections)


def _sections(problem: Problem, split_k: int) -> int:
    tiles, width = -(-problem.K // TILE), problem.range_tiles[0]
    share = -(-tiles // split_k)
    return max((min(first + share, tiles) - 1) // width - first // width + 1 for first in range(0, tiles, share))


def _most_entries(problem: Problem, block_m: int) -> int:
    """Entries whose operands and accumulators fit the registers; found by compiling.

    Of two stages 4: with 8 at least 208 bytes spill. The windows of longer vectors are programs with neighbouring
    numbers, the second of which finds the codes in the L2 cache.
    """
    if problem.plain or problem.residual_bits:
        return 4 if block_m == 8 or (block_m == 16 and not problem.residual_bits) else 2
    if problem.bits == 16 and block_m < 32:  # their places in global memory take registers of their own
        return 2 if block_m == 16 else 4 if problem.dtype == torch.float16 else 8
    several_planes = problem.bits & (problem.bits - 1)
    return {8: 8, 16: 3 if several_planes else 4, 32: 2}[block_m]


def _share(v: int, most: int) -> int:
    """The widest of equal windows of at most `most` entries."""
    return -(-v // -(-v // most))


def runs(table: int, problem: Problem, config: Config) -> bool:
    """Whether a launch can have a table of this size, or none, beside the buffers of Triton's pipeline.

    The driver gives 48 KiB in all unless more was asked for, which Triton does where its own buffers take more.
    """
    words = row_words(TILE, problem.bits) + (row_words(TILE, problem.residual_bits) if problem.residual_bits else 0)
    stage = 4 * words * config.block_n + 2 * TILE * config.block_m
    least, most = (config.num_stages - 1) * stage, config.num_stages * stage
    most = max(most, 4 * config.block_m * config.block_n)  # for the results, when the loop is done
    asked = table == 0 or table + most <= 49152 or least > 49152
    return table <= STATIC_LIMIT and asked and table + most <= SHARED_MEMORY.get(problem.capability, 101376)


@lru_cache(maxsize=4096)  # asked at every launch
def rule(problem: Problem) -> Config:
    """Sizes for a decode launch on a GPU that nobody has measured."""
    block_m = _block_m(problem.M)
    if problem.plain:
        config = Config(max(block_m, 16), 32, num_warps=8, num_stages=1)
        tiles = -(-problem.vectors // 32) * -(-problem.v // lookup(problem, config).window)
        return replace(config, split_k=shares(tiles, -(-problem.K // TILE), problem.multiprocessors))
    best: tuple[tuple[int, ...], Config] | None = None
    tiles = problem.K // TILE
    for block_n in (128, 64):
        for num_stages in range(2, 13):
            config = Config(block_m, block_n, num_warps=block_n // 16, num_stages=num_stages)
            if block_n == 128 and block_m == 16 and lookup(problem, config).window > 2:
                continue  # 8 warps hold fewer
            blocks = -(-problem.vectors // block_n) * -(-problem.v // lookup(problem, config).window)
            config = replace(config, split_k=shares(blocks, problem.K // TILE, problem.multiprocessors))
            found = lookup(problem, config)
            starved = blocks * config.split_k < problem.multiprocessors * 3 // 4
            if starved and config.split_k < 16 and tiles // (2 * config.split_k) >= 2:
                config = replace(config, split_k=2 * config.split_k)  # two tiles are worth the filling of a table
                found = lookup(problem, config)
            busy = min(blocks * config.split_k, problem.multiprocessors)
            # most copies, 3 tiles in flight, all of the GPU, few shares to add, few tables to fill
            table = found.source == "shared", found.two, found.window, found.copies
            rank = (*table, min(num_stages, 4), busy, -config.split_k, block_n, -num_stages)
            if (best is None or rank > best[0]) and runs(0, problem, config):
                best = rank, config
    assert best is not None
    return best[1]


def registers(problem: Problem, config: Config) -> int | None:
    """The most that the assembler may use for a thread; None leaves it the choice.

    For sm_10x it rather spills a few than exceeds 128 where pairs of entries in several planes meet 32 rows, though
    shared memory keeps more than 3 programs away anyway.
    """
    planes = problem.bits & (problem.bits - 1) and not problem.residual_bits
    tight = problem.capability // 10 == 10 and config.block_m == 32 and problem.v == 2 and config.num_warps == 4
    return 168 if tight and planes else None


def _block_m(rows: int) -> int:
    return 8 if rows <= 8 else 16 if rows <= 16 else 32


def book_bytes(v: int, bits: int, residual_bits: int = 0) -> int:
    """Bytes of the fp16 codebooks of one range of columns."""
    return 2 * v * ((1 << bits) + ((1 << residual_bits) if residual_bits else 0))


def served_from(v: int, bits: int, residual_bits: int = 0, ranges: int = 1, capability: int = 90) -> str:
    """Where codebooks are read from while few rows are multiplied: "shared", "l1" or "l2"."""
    problem = Problem(1, 4096, 4096, v, bits, residual_bits, ranges, ranges, torch.bfloat16, capability)
    if lookup(problem, rule(problem)).source == "shared":
        return "shared"
    return "l1" if book_bytes(v, bits, residual_bits) <= (131072 if capability in SHARED_MEMORY else 65536) else "l2"


_MEETING = {1: 1.0, 2: 1.9, 4: 2.5, 8: 2.9, 16: 3.1, 32: 3.5}
"""Times that a bank is asked, at most, where this many lanes choose among as many banks."""


def expected_speed(v: int, bits: int, residual_bits: int = 0, ranges: int = 1, capability: int = 90) -> float:
    """Speed of a large product with few rows, relative to bf16 weights: a model, not a measurement.

    Both take what the slowest part takes, in clocks of a multiprocessor of an H200, which gets 18.5 bytes a clock from
    memory, 24 from L2 and 128 from shared memory. bf16 reads 2 bytes a weight. A codebook reads its codes; it issues
    0.9 + 3.6 / entries of a lookup instructions a weight and stage (1.5 more for a sum in bf16), 96 lanes a clock; and
    looks up: in shared memory 2 bytes a weight and stage, as often as lanes meet in a bank; in L1 a line of 128 bytes
    at a time; in L2 sectors of 32 bytes.
    """
    problem = Problem(1, 4096, 4096, v, bits, residual_bits, ranges, ranges, torch.bfloat16, capability)
    found = lookup(problem, rule(problem))
    stages = 2 if residual_bits else 1
    memory = (bits + residual_bits) / (8 * v) / 18.5
    wide = found.window * (2 if found.two else 1)
    issue = stages * (0.9 + 3.6 / wide + (1.5 if residual_bits else 0)) / 96
    source = served_from(v, bits, residual_bits, ranges, capability)
    if source == "shared":
        entries = 8 if wide > 6 else 4 if wide > 2 else 2
        look = 2 / 128 * _MEETING[max(1, 128 // (2 * entries * found.copies))]
    elif source == "l1":
        lines = max(1, (2 * v << bits) // 128)
        look = lines * (1 - (1 - 1 / lines) ** 32) / (32 * v)
    else:
        look = 32 * -(-v // found.window) / v / 24
    return (2 / 18.5) / max(memory, issue, stages * look)
