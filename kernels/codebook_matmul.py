"""Multiply by a vector-quantized weight without materialising it: y = x @ W^T + (x @ D^T) @ U^T + bias.

    W[g v + j, k] = books[c(k), codes[g, k], j] (+ residual_books[c(k), residual_codes[g, k], j])

A vector is v rows of one column. `codes` int32 [ceil(N / v), words] are laid out by `quantkit.kernels.bitpack`, `books`
are fp16 [ranges, 2^bits, v], c(k) = k // range_width(K, ranges). A residual stage has bits and ranges of its own. U
[N, r] and D [r, K] are an optional low-rank correction, bias is [N].

Bytes moved: N * K * bits / (8 v) for codes, the codebooks once a multiprocessor, 2 * M * K for x, 2 * M * N for y.

Two regimes by M, the rows of x:

    decode    few rows. Vectors are looked up in registers of the tensor core's left operand. Codebooks lie in shared
              memory, in several copies where there is room (`codebook_table`); larger ones are read through the caches,
              and so are all where K is not a multiple of 128.
    dense     many rows, or x in fp32: W is written out once and torch multiplies.

All accumulate in fp32 and are deterministic; x = I gives exactly the dequantized weight. The kernels stand in
`codebook_matmul_triton.py`, so that this file imports where there is no Triton.
"""

import torch
from torch import Tensor

from quantkit.kernels import cpu, launching, operators, plans
from quantkit.kernels.bitpack import TILE, row_words, unpack
from quantkit.kernels.codebook_rule import Problem, lookup, range_width, registers, rule
from quantkit.kernels.launching import or_stand_in
from quantkit.kernels.tuning import Config, chosen

COMPILED = "quantkit.kernels.codebook_numba"
CROSSOVERS = {"default": 32}
"""By GPU name: the most rows for which `decode` is used. The default is a model's guess."""


def _stage(codes: Tensor, books: Tensor, in_features: int) -> Tensor:
    """fp32 [vectors, in_features, v]."""
    index = unpack(codes, _bits(books), in_features).long()
    place = torch.arange(in_features, device=codes.device) // range_width(in_features, len(books))
    return books.flatten(0, 1).float()[index + place * books.shape[1]]


def dequantized(
    codes: Tensor,
    books: Tensor,
    residual_codes: Tensor | None,
    residual_books: Tensor | None,
    out_features: int,
    in_features: int,
) -> Tensor:
    """The specification of the weight, on any device: fp32 [out_features, in_features]."""
    vectors = _stage(codes, books, in_features)
    if residual_codes is not None and residual_books is not None:
        vectors = vectors + _stage(residual_codes, residual_books, in_features)
    return vectors.transpose(1, 2).flatten(0, 1)[:out_features]


def unpacked(
    codes: Tensor,
    books: Tensor,
    residual_codes: Tensor | None,
    residual_books: Tensor | None,
    out_features: int,
    in_features: int,
) -> Tensor:
    """As `dequantized`, fp32 [out_features, in_features], compiled on a CPU."""
    weight = codes, books, residual_codes, residual_books, out_features
    return cpu.unpacked(COMPILED, dequantized, weight, out_features, in_features)


def reference(
    x: Tensor,
    codes: Tensor,
    books: Tensor,
    residual_codes: Tensor | None,
    residual_books: Tensor | None,
    out_features: int,
    bias: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
) -> Tensor:
    """The specification of the product, on any device: y [..., out_features] in x's dtype for x [..., K]."""
    weight = dequantized(codes, books, residual_codes, residual_books, out_features, x.shape[-1])
    return operators.product(x, weight, bias, up, down)


def launch(
    x: Tensor,
    codes: Tensor,
    books: Tensor,
    residual_codes: Tensor | None,
    residual_books: Tensor | None,
    out_features: int,
    bias: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Runs the Triton kernels; arguments and result as in `reference`.

    Args:
        config: sizes for the decode kernel, instead of those chosen for the shape; block_n counts vectors.

    Raises:
        ValueError: shapes or dtypes that the kernels' addresses do not allow.
    """
    check(x, codes, books, residual_codes, residual_books, out_features, bias, up, down)
    rows = launching.rows_of(x)
    if not len(rows):
        return x.new_empty(*x.shape[:-1], out_features)
    problem = problem_of(rows, books, residual_books, out_features)
    most = CROSSOVERS.get(launching.properties(x.device)[2], CROSSOVERS["default"])
    inner = None if up is None or down is None else plans.inner(rows, down)
    stages = [codes, books, or_stand_in(residual_codes, codes), or_stand_in(residual_books, books)]
    # assembly loads whole vectors: a view may begin anywhere
    stages = [tensor if tensor.data_ptr() % 16 == 0 else tensor.clone() for tensor in stages]
    if (problem.M > most or x.dtype == torch.float32) and config is None:
        y = operators.dense(rows, _write_out(stages, problem), bias, inner, up)
    else:
        y = plans.result((problem.M, problem.N), x)
        if config is None:
            config = rule(problem)
            config = chosen(x.device, problem.key(), config) if x.is_cuda else config
        with torch.cuda.device_of(x):
            _decode(rows, stages, bias, up, inner, y, problem, config)
    return y.view(*x.shape[:-1], out_features)


def problem_of(rows: Tensor, books: Tensor, residual_books: Tensor | None, out_features: int) -> Problem:
    """The problem that rows [M, K] and a weight pose on the GPU that holds the rows."""
    capability, multiprocessors, _ = launching.properties(rows.device)
    residual_bits, residual_ranges = (0, 0) if residual_books is None else (_bits(residual_books), len(residual_books))
    return Problem(
        *(len(rows), out_features, rows.shape[1], books.shape[2], _bits(books), residual_bits, len(books)),
        *(residual_ranges, rows.dtype, capability, multiprocessors, launching.machine(rows)["ASM"]),
    )


def _decode(rows, stages, bias, up, inner, y, problem: Problem, config: Config) -> None:
    from quantkit.kernels.codebook_matmul_triton import decode_kernel  # Triton exists on Linux alone

    M, N, K = problem.M, problem.N, problem.K
    codes, books, more_codes, more_books = stages
    found = lookup(problem, config)
    blocks = -(-problem.vectors // config.block_n) * -(-problem.v // found.window)
    tiles = blocks, -(-M // config.block_m)
    partial, arrived = y, y
    if config.split_k > 1:
        size = tiles[0] * tiles[1] * config.split_k * found.window * config.block_n * config.block_m
        partial, arrived = plans.workspace(size, y), plans.counters(y, tiles[0] * tiles[1])
    plans.start(
        decode_kernel, (*tiles, config.split_k),
        rows, codes, books, more_codes, more_books,
        *(or_stand_in(tensor, y) for tensor in (bias, up, inner)), y, partial, arrived,
        M, N, K, codes.shape[1], more_codes.shape[1], *problem.range_tiles, rows.stride(0),
        0 if up is None else up.shape[1], **problem.flags, WINDOW=found.window,
        SECTIONS=found.sections, HAS_BIAS=bias is not None,
        BLOCK_R=launching.block_r(up), SPLIT_K=config.split_k, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PAIRS=launching.pairs(problem.capability, config.block_m),
        SOURCE=found.source, COPIES=found.copies, TWO=found.two,
        **launching.machine(y), num_warps=config.num_warps, num_stages=config.num_stages,
        maxnreg=registers(problem, config),
    )  # fmt: skip


def _write_out(stages, problem: Problem) -> Tensor:
    """The dequantized weight [N, K], by the kernel."""
    from quantkit.kernels.codebook_matmul_triton import dequantize_kernel

    codes, books, more_codes, more_books = stages
    weight = torch.empty(problem.N, problem.K, dtype=problem.dtype, device=codes.device)
    with torch.cuda.device_of(codes):
        dequantize_kernel[(-(-problem.vectors // 16), -(-problem.K // TILE))](
            codes, books, more_codes, more_books, weight, problem.N, problem.K, codes.shape[1], more_codes.shape[1],
            *problem.range_tiles, **problem.flags, BLOCK_N=16, **launching.machine(codes), num_warps=8,
        )  # fmt: skip
    return weight


def _bits(books: Tensor) -> int:
    return (books.shape[1] - 1).bit_length()


def check(
    x: Tensor,
    codes: Tensor,
    books: Tensor,
    residual_codes: Tensor | None,
    residual_books: Tensor | None,
    out_features: int,
    bias: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
) -> None:
    """Raises ValueError unless every address that follows from the arguments lies inside the tensors.

    The module's docstring has the shapes and dtypes that are right, for x [..., K].
    """
    if (residual_codes is None) != (residual_books is None):
        raise ValueError("a residual stage has both residual_codes and residual_books, or neither")
    v = books.shape[2] if books.dim() == 3 else 0
    expected = _expected("", codes, books, v, out_features, x.shape[-1])
    if residual_books is not None:
        expected |= _expected("residual_", residual_codes, residual_books, v, out_features, x.shape[-1])
    operators.check(x, out_features, expected, bias, up, down)


def _expected(prefix: str, codes: Tensor | None, books: Tensor, v: int, N: int, K: int) -> dict[str, tuple]:
    """A stage for `operators.check`, with codebooks that hold a vector for every code of their bits."""
    ranges, size = books.shape[:2] if books.dim() == 3 else (0, 0)
    bits = _bits(books) if size else 0
    if size != 1 << bits or bits not in range(1, 17) or v not in range(1, 17):
        raise ValueError(
            f"{prefix}books are {tuple(books.shape)}; they hold 2 to 2^16, a power of two, vectors of 1 to 16"
        )
    if K and (ranges < 1 or ranges != -(-K // range_width(K, ranges))):
        raise ValueError(f"{prefix}books are of {ranges} ranges, which do not divide {K} columns into whole tiles")
    return {
        f"{prefix}codes": (codes, torch.int32, (-(-N // v), row_words(K, bits))),
        f"{prefix}books": (books, torch.float16, (ranges, size, v)),
    }


codebook_matmul = operators.register(
    "codebook_matmul",
    "Tensor codes, Tensor books, Tensor? residual_codes, Tensor? residual_books, int out_features",
    lambda *weight: weight[-1],
    dequantized,
    reference,
    launch,
    COMPILED,
    check,
)
