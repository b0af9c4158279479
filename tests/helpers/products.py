"""The families of products with packed weights, as the tests that all of them must pass ask for them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from quantkit.formats.codebook import CodebookWeight
from quantkit.formats.int_group import IntGroupWeight
from quantkit.formats.pyramid import PyramidWeight
from quantkit.kernels import (
    codebook_matmul,
    int_group_layout,
    int_group_matmul,
    pyramid,
    pyramid_matmul,
    trellis,
    trellis_matmul,
)
from quantkit.kernels.codebook_rule import range_width
from quantkit.kernels.tuning import Config

OPERATORS = torch.ops.quantkit


def int_group_weight(bits, out_features, in_features, group_size, symmetric):
    """Random codes, scales and zeros; `symmetric` may be "whole" too, for grids around a whole number."""
    groups = -(-in_features // group_size)
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8)
    scales = (torch.rand(groups, out_features) + 0.5).half()
    zeros = None if symmetric else (torch.rand(groups, out_features) * 2**bits).half()
    zeros = torch.full((1,), 2.0 ** (bits - 1)).half() if symmetric == "whole" else zeros
    return IntGroupWeight.pack(codes, scales, zeros, bits, group_size)


def int_group_arguments(weight):
    """Of `int_group_matmul` after x."""
    return weight.codes, weight.scales, weight.zeros, weight.bits, weight.group_size


def arranged_arguments(weight):
    """Of `int_group_arranged_matmul` after x."""
    stream = int_group_layout.arranged(*int_group_arguments(weight))
    return stream, weight.bits, weight.group_size, weight.zero, weight.shape[0]


def trellis_product(out_features, in_features, bits=2, state_bits=16):
    """(arguments of `trellis_matmul` after x, the weight in fp64): any bits are a code.

    out_features: of one weight, or of several side by side.
    """
    parts = [out_features] if isinstance(out_features, int) else out_features
    codes = torch.randint(-(2**31), 2**31, (sum(trellis.lines(parts, bits)), in_features)).int()
    scales = torch.randint(208, 256, (len(parts), in_features), dtype=torch.uint8)
    arguments = codes, scales, torch.rand(len(parts)) + 0.1, bits, state_bits, parts
    return arguments, trellis.dequantized(*arguments).double()


def pyramid_weight(out_features, in_features, dimension, pulses, gain_bits, axis="out"):
    """Random points, gains and scales."""
    along, fields = (out_features, in_features) if axis == "out" else (in_features, out_features)
    lines = -(-along // dimension)
    where = torch.randint(0, dimension, (lines, fields, pulses))
    points = torch.zeros(lines, fields, dimension, dtype=torch.int64).scatter_add_(2, where, torch.ones_like(where))
    points *= torch.where(torch.rand(points.shape) < 0.5, -1, 1)
    gains = torch.randint(0, 2**gain_bits, (lines, fields))
    scales, levels = (torch.rand(fields) + 0.5).half(), (torch.rand(2**gain_bits).sort().values + 0.5).half()
    return PyramidWeight.pack(points, gains, scales, levels, pulses, axis, (out_features, in_features))


def pyramid_product(bits, out_features, in_features, dimension):
    """(arguments of `pyramid_matmul` after x, the weight in fp64) with codes that use all their bits."""
    groups = -(-out_features // dimension)
    points = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (groups, in_features, dimension))
    factors = (torch.rand(groups, in_features) / 2 + 0.01).half()
    codes, words = pyramid_matmul.transcode(points, factors, bits, out_features)
    weight = (points.double() * factors.double().unsqueeze(-1)).transpose(1, 2).flatten(0, 1)[:out_features]
    return (codes, words, bits, dimension), weight


def pyramid_table_product(out_features, in_features, pulses=6, gain_bits=1):
    """(arguments of `pyramid_table_matmul` after x, the weight)."""
    weight = pyramid_weight(out_features, in_features, 8, pulses, gain_bits)
    scales, gains = pyramid_matmul.lane_order(weight.scales), pyramid_matmul.gain_table(weight.levels)
    tables = scales, gains, pyramid_matmul.point_table(pulses, torch.device("cpu"))
    return (weight.codes, *tables, pyramid.index_bits(8, pulses) + gain_bits, out_features), weight


def codebook_weight(N, K, v, bits, residual_bits=0, ranges=1, residual_ranges=None):
    """Random codes and books, all codes used as far as there is room."""
    stages = [_stage(N, K, v, bits, ranges)]
    if residual_bits:
        stages.append(_stage(N, K, v, residual_bits, residual_ranges or ranges))
    codes, books = zip(*stages, strict=True)
    return CodebookWeight.pack(list(codes), list(books), N)


def _stage(N, K, v, bits, ranges):
    ranges = -(-K // range_width(K, ranges))
    codes = torch.randint(0, 2**bits, (-(-N // v), K))
    return codes, torch.randn(ranges, 2**bits, v).half()


def codebook_arguments(weight):
    """Of `codebook_matmul` after x."""
    return *weight._stages, weight.shape[0]


def identity(columns, dtype, few=32):
    """Rows of an identity, `few` at a time: all in bf16; of other types, which change numbers and no places, some."""
    pieces = torch.eye(columns, dtype=dtype).split(few)
    return pieces if dtype == torch.bfloat16 else pieces[:: max(1, len(pieces) - 1)]


def in_turn(rows, *columns):
    """(*row, a value of each column) of all rows, the values in turn: each is met, without the product of all."""
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [(*row, *(column[index % len(column)] for column in columns)) for index, row in enumerate(rows)]


def in_dtypes(rows):
    """(*row, dtype) of all rows: each in bf16, and in turn in fp16 and fp32, which change numbers and no places."""
    others = torch.float16, torch.float32
    return [(*row, dtype) for index, row in enumerate(rows) for dtype in (torch.bfloat16, others[index % 2])]


@dataclass(frozen=True)
class Product:
    """A family.

    Attributes:
        make: (out_features, in_features) -> (arguments after x, the weight in fp64).
        launch, reference: x, the arguments, and bias, up and down.
        operator: the same, as torch knows it.
        config: of a launch of a few rows, but for its shares.
        columns: of a matrix that fills no tile; None where there are none.
    """

    make: Callable
    launch: Callable
    reference: Callable
    operator: Callable
    config: Callable
    columns: int = 200


def _of(make, arguments, *settings):
    def made(out_features, in_features):
        weight = make(out_features, in_features, *settings)
        return arguments(weight), weight.dequantize(torch.float64)

    return made


def _table(out_features, in_features):
    arguments, weight = pyramid_table_product(out_features, in_features)
    return arguments, weight.dequantize(torch.float64)


def _integers(out_features, in_features, symmetric):
    return int_group_weight(3, out_features, in_features, 64, symmetric)


PRODUCTS = {
    "int_group": Product(
        _of(_integers, int_group_arguments, False), int_group_matmul.launch, int_group_matmul.reference,
        OPERATORS.int_group_matmul, partial(Config, 8, 64),
    ),
    "int_group_arranged": Product(
        _of(_integers, arranged_arguments, True), int_group_matmul.launch_arranged, int_group_matmul.reference_arranged,
        OPERATORS.int_group_arranged_matmul, partial(Config, 8, 64), columns=384,  # whole tiles alone are arranged
    ),
    "pyramid": Product(
        lambda n, k: pyramid_product(4, n, k, 32), pyramid_matmul.launch, pyramid_matmul.reference,
        OPERATORS.pyramid_matmul, partial(Config, 8, 128, num_warps=2),
    ),
    "pyramid_table": Product(
        _table, pyramid_matmul.table_launch, pyramid_matmul.table_reference,
        OPERATORS.pyramid_table_matmul, partial(Config, 8, 128, num_warps=2),
    ),
    "trellis": Product(
        trellis_product, trellis_matmul.launch, trellis_matmul.reference,
        OPERATORS.trellis_matmul, partial(Config, 8, 128, num_warps=2),
    ),
    "codebook": Product(
        _of(codebook_weight, codebook_arguments, 4, 6, 4), codebook_matmul.launch, codebook_matmul.reference,
        OPERATORS.codebook_matmul, partial(Config, 8, 64, num_warps=4, num_stages=3),
    ),
}  # fmt: skip
