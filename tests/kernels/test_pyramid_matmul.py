"""The pyramid's Triton kernels, through the interpreter, and their assembly, against the dequantized weight."""

import copy
import logging
from itertools import product

import numpy as np
import pytest
import torch

from quantkit.formats import pyramid as pyramid_format
from quantkit.kernels import launching, pyramid
from quantkit.kernels import pyramid_matmul as kernel
from quantkit.kernels import pyramid_matmul_triton as jit
from quantkit.kernels.tuning import Config

from ..helpers import ptx
from ..helpers.products import PRODUCTS, identity, in_turn, pyramid_weight
from ..helpers.products import pyramid_product as factored
from ..helpers.products import pyramid_table_product as table
from .conftest import error

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 4e-3, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_factored_against_fp64(bits, dtype):
    arguments, weight = factored(bits, 70, 256, 32)
    x = torch.randn(5, 256).to(dtype)
    y = kernel.launch(x, *arguments)
    assert y.dtype == dtype
    assert error(y, x.double() @ weight.T) < TOLERANCE[dtype]
    assert error(kernel.reference(x, *arguments), x.double() @ weight.T) < 1.5 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("in_features", [70, 100, 320])
@pytest.mark.parametrize("name", ["pyramid", "pyramid_table"])
def test_columns_that_fill_no_tile(name, in_features, dtype):
    arguments, weight = PRODUCTS[name].make(67, in_features)
    for rows in (5, 40):
        x = torch.randn(rows, in_features).to(dtype)
        assert error(PRODUCTS[name].launch(x, *arguments), x.double() @ weight.T) < TOLERANCE[dtype]


SIZES = [
    *[(1, 1, 2), (3, 33, 3), (67, 128, 4), (41, 70, 7), (64, 100, 8), (70, 257, 16), (129, 128, 24)],
    *[(130, 128, 32), (65, 256, 64), (300, 96, 100), (7, 128, 256)],
]


@pytest.mark.parametrize(
    ("out_features", "in_features", "dimension", "dtype"),
    in_turn(SIZES, [torch.bfloat16, torch.float16, torch.bfloat16, torch.float32]),
)
def test_identity_gives_the_dequantized_weight_exactly(out_features, in_features, dimension, dtype):
    weight = pyramid_weight(out_features, in_features, dimension, 7 + dimension // 8, 1)
    points, factors = weight.expanded()
    bits = int(points.abs().max()).bit_length() + 1
    arguments = *kernel.transcode(points, factors, bits, out_features), bits, dimension
    expected = weight.dequantize(dtype)
    for rows in torch.eye(in_features, dtype=dtype).split(32)[:3]:
        columns = rows.argmax(1)
        assert torch.equal(kernel.launch(rows, *arguments).T, expected[:, columns])
        assert torch.equal(weight.matmul(rows).T, expected[:, columns])
    many = torch.eye(in_features, dtype=dtype).repeat(-(-40 // in_features), 1)
    assert torch.equal(kernel.launch(many, *arguments)[:in_features].T, expected)


@pytest.mark.parametrize(
    ("pulses", "gain_bits", "dtype"),
    in_turn(
        [(1, 0), (1, 3), (2, 1), (3, 2), (4, 0), (4, 3), (5, 0), (5, 2), (6, 0), (6, 1)],
        [torch.bfloat16, torch.float16, torch.float32],
    ),
)
def test_identity_through_the_table(pulses, gain_bits, dtype):
    for out_features, in_features in ((67, 128), (131, 200)):
        arguments, weight = table(out_features, in_features, pulses, gain_bits)
        expected = weight.dequantize(dtype)
        everything = torch.eye(in_features, dtype=dtype)
        assert torch.equal(kernel.table_launch(everything[-32:], *arguments).T, expected[:, -32:])
        for rows in identity(in_features, dtype, in_features if dtype == torch.bfloat16 else 40):
            assert torch.equal(kernel.table_launch(rows, *arguments).T, expected[:, rows.argmax(1)])
        assert torch.equal(weight.matmul(everything).T, expected)


@pytest.mark.parametrize(
    ("config", "shares", "dimension"),
    in_turn(
        product(
            [(8, 128, 2), (16, 128, 2), (32, 128, 4), (16, 256, 4), (8, 64, 2), (16, 64, 8)],
            [(1, 2), (2, 4), (8, 2), (8, 4)],
        ),
        [8, 12, 5],
    ),
)
def test_every_configuration_agrees(config, shares, dimension, monkeypatch):
    """Shares that get no tile, both orders of columns, runs of rows of all lengths."""
    split_k, pairs = shares
    monkeypatch.setattr(kernel, "pairs", lambda problem, config: pairs)
    arguments, weight = factored(3, 70, 384, dimension)
    x = torch.randn(9, 384).half()
    block_m, block_n, num_warps = config
    y = kernel.launch(x, *arguments, config=Config(block_m, block_n, split_k, num_warps))
    assert error(y, x.double() @ weight.T) < 2e-3


@pytest.mark.parametrize("config", [(8, 128, 2), (32, 256, 4), (16, 64, 8)])
@pytest.mark.parametrize("split_k", [1, 8])
@pytest.mark.parametrize("pairs", [2, 4])
def test_every_configuration_of_the_table_agrees(pairs, split_k, config, monkeypatch):
    monkeypatch.setattr(kernel, "pairs", lambda problem, config: pairs)
    arguments, weight = table(70, 384)
    x = torch.randn(9, 384).half()
    block_m, block_n, num_warps = config
    y = kernel.table_launch(x, *arguments, config=Config(block_m, block_n, split_k, num_warps))
    assert error(y, x.double() @ weight.dequantize(torch.float64).T) < 2e-3


def test_what_would_read_out_of_bounds_is_refused():
    (codes, factors, bits, dimension), _ = factored(3, 16, 128, 8)
    x, up, down = torch.randn(2, 128), torch.randn(16, 4), torch.randn(4, 128)
    for call, message in [
        ((x[:, :0], codes[:, :0].contiguous(), factors[:, :0].contiguous(), bits, dimension), "0 columns"),
        ((torch.randn(2, 129), codes, factors, bits, dimension), "codes are"),
        ((x, codes, factors, 4, dimension), "codes are"),
        ((x, codes.long(), factors, bits, dimension), "codes are"),
        ((x, codes[0], factors, bits, dimension), "codes are of 1 to 8"),
        ((x, codes[:0], factors[:0], bits, dimension), "0 rows"),
        ((x, codes, factors[:1], bits, dimension), "factors are"),
        ((x, codes, factors.T, bits, dimension), "factors are"),
        ((x, codes, factors, bits, 7), "factors are"),
        ((x, codes, factors, bits, 0), "dimension=0"),
        ((x, codes, factors, 9, dimension), "codes are of 1 to 8"),
        ((x.double(), codes, factors, bits, dimension), "takes float16"),
        ((x, codes, factors, bits, dimension, torch.randn(15)), "bias are"),
        ((x, codes, factors, bits, dimension, None, up, down[:, :100]), "down are"),
        ((x, codes, factors, bits, dimension, None, up.half(), down), "up are"),
        ((x, codes, factors, bits, dimension, None, up, None), "both up and down"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel.launch(*call)


def test_what_a_table_would_read_out_of_bounds_is_refused():
    (codes, scales, gains, points, bits, rows), _ = table(20, 128)
    x = torch.randn(2, 128)
    for call, message in [
        ((torch.randn(2, 129), codes, scales, gains, points, bits, rows), "codes are"),
        ((x, codes, scales, gains, points, bits, 25), "codes are"),
        ((x, codes, scales, gains, points, bits, 0), "0 rows"),
        ((x, codes, scales[:100], gains, points, bits, rows), "scales are"),
        ((x, codes, scales, gains[:1], points, bits, rows), "gains are"),
        ((x, codes, scales, gains[:, :32], points, bits, rows), "gains are"),
        ((x, codes, scales, gains, points[:-1], bits, rows), "points are"),
        ((x, codes, scales, gains, points[:0], bits, rows), "gains are"),
        ((x, codes, scales, gains, points, 14, rows), "an index and a gain"),
        ((x, codes, scales, gains, points, 17, rows), "an index and a gain"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel.table_launch(*call)


def test_no_field_reads_beyond_the_tables():
    """Random words instead of fields that a quantizer made: numbers past the last point give zeros."""
    (codes, *others), _ = table(64, 128)
    codes = torch.randint(-(2**31), 2**31, codes.shape).int()
    identity = torch.eye(128)[:32]
    expected = kernel.dequantized_table(codes, *others, 128)
    assert torch.isfinite(expected).all()
    assert torch.equal(kernel.table_launch(identity, codes, *others).T, expected[:, :32])
    beyond = torch.full_like(codes, 0x7FFF7FFF)
    assert not kernel.dequantized_table(beyond, *others, 128).any()


WEIGHTS = {
    "table": (70, 100, 8, 6, 1, "out"),
    "too long a field": (70, 100, 8, 6, 2, "out"),
    "along the outputs": (70, 100, 16, 12, 2, "out"),
    "along the inputs": (70, 100, 16, 12, 2, "in"),
    "long along the inputs": (70, 300, 32, 21, 0, "in"),
    "large": (10, 20, 4, 700, 0, "out"),
    "large along the inputs": (10, 20, 4, 700, 1, "in"),
}


@pytest.mark.parametrize("sizes", WEIGHTS.values(), ids=WEIGHTS)
def test_a_weight_multiplies_in_the_form_that_suits_it(sizes, monkeypatch):
    weight = pyramid_weight(*sizes)
    dense = weight.dequantize()
    x, bias = torch.randn(2, 3, sizes[1]), torch.randn(sizes[0])
    expected = x @ dense.T + bias
    torch.testing.assert_close(weight.matmul(x, bias), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(weight.matmul(torch.eye(sizes[1])).T, dense)
    torch.testing.assert_close(copy.deepcopy(weight).matmul(x, bias), expected, rtol=1e-4, atol=1e-3)
    monkeypatch.setattr(pyramid, "decode", None)  # it is never decoded again
    torch.testing.assert_close(weight.matmul(x, bias), expected, rtol=1e-4, atol=1e-3)
    assert set(weight.state()) == {"codes", "scales", "levels"}


@pytest.mark.parametrize("sizes", [(70, 100, 16, 12, 2, "out"), (70, 100, 16, 12, 2, "in")])
def test_decoding_in_parts_changes_nothing(sizes, monkeypatch):
    weight = pyramid_weight(*sizes)
    monkeypatch.setattr(pyramid_format, "FIELDS_AT_ONCE", 250)
    assert torch.equal(weight.matmul(torch.eye(100)).T, weight.dequantize())


@pytest.mark.parametrize("name", ["table", "along the outputs", "along the inputs"])
def test_a_prepared_weight_compiles_into_one_graph(name):
    weight = pyramid_weight(*WEIGHTS[name])
    x = torch.randn(2, 100)
    with torch.inference_mode():
        weight.matmul(x)
    compiled = torch.compile(lambda x: weight.matmul(x) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), weight.matmul(x) + 1)
    leaf = x.clone().requires_grad_()
    weight.matmul(leaf).sum().backward()  # what was kept from inference mode can be differentiated through
    torch.testing.assert_close(leaf.grad, weight.dequantize().sum(0).expand(2, -1), rtol=1e-4, atol=1e-3)


def test_memory_is_told_of_once(caplog):
    caplog.set_level(logging.INFO, "quantkit")
    for _ in range(2):
        pyramid_weight(64, 32, 32, 9, 0).matmul(torch.randn(1, 32))
    pyramid_weight(64, 32, 8, 3, 0).matmul(torch.randn(1, 32))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith("pyramid D=32 K=9 has no kernel of its own: decoded at load to")


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 103, 120])
@pytest.mark.parametrize("index_bits", [0, 15])
def test_rules_fill_a_gpu_and_leave_no_row_out(index_bits, capability):
    for size in ((4096, 4096), (14336, 4096), (4096, 14336), (256, 128)):
        for rows in (1, 8, 16, 32):
            bits, dimension = (16, 8) if index_bits else (4, 32)
            problem = kernel.Problem(rows, *size, bits, dimension, index_bits, torch.bfloat16, capability)
            config = kernel.rule(problem)
            programs = -(-size[0] // config.block_n) * -(-rows // config.block_m) * config.split_k
            if size[0] * size[1] >= 4096 * 4096:
                assert programs * config.num_warps >= 4 * 132
            assert size[1] // 128 // config.split_k >= 1
            if index_bits:  # 8 rows of a lane are the 8 entries of a vector
                assert config.block_n == 64 * config.num_warps
            assert kernel.pairs(problem, config) == 4 or config.num_warps >= 4
    assert launching.machine(torch.zeros(1)) == {"ASM": False, "INTERPRETED": True}


def test_the_split_of_a_factor_makes_bf16_products_exact():
    """Every fp16, in the assembly and against every code of up to 7 bits: what is rounded once is the true product."""
    bits = np.arange(2**16, dtype=np.uint32)
    bits = bits[np.isfinite(bits.astype(np.uint16).view(np.float16))]
    words = bits | bits[::-1].copy() << np.uint32(16)
    high, low = ptx.run("{ " + jit._split_text("$0", "$1", "$2") + "}", [words], 2, {})
    for shift, half in ((0, bits), (16, bits[::-1].copy())):
        factor = torch.from_numpy(half.astype(np.uint16).view(np.int16).copy()).view(torch.float16).double()
        first, second = (
            torch.from_numpy((part >> np.uint32(shift) << np.uint32(16)).view(np.float32).copy()).double()
            for part in (high, low)
        )
        assert torch.equal(first + second, factor)
        for code in range(-64, 64):
            rest = second * code
            assert torch.equal(rest.float().bfloat16().double(), rest)  # u * low is exact
            expected = (factor.float() * code).bfloat16()
            assert torch.equal((first * code + rest).float().bfloat16(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("pulses", "gain_bits"), [(1, 0), (1, 8), (2, 1), (4, 4), (5, 2), (6, 0), (6, 1)])
def test_the_assembly_of_the_table_gives_the_weight(pulses, gain_bits, dtype):
    """Every field, beside a random one, against the specification."""
    index_bits = pyramid.index_bits(8, pulses)
    bits = index_bits + gain_bits
    fields = torch.arange(2**bits)
    fields = torch.stack([fields, torch.randint(0, 2**bits, fields.shape)])
    scales = 2.0 ** (torch.rand(fields.shape) * 12 - 9)
    scales = scales.half().float()
    points, gains = (
        kernel.point_table(pulses, torch.device("cpu")),
        kernel.gain_table(torch.rand(2**gain_bits).half() + 0.1),
    )
    text = jit.vectors_text(dtype == torch.bfloat16, index_bits, gain_bits)
    pairs = (fields[0] | fields[1] << 16).numpy().astype(np.uint32)
    tables = {"qk_points": points.numpy().view(np.uint32), "qk_gains": gains.flatten().numpy()}
    words = ptx.run(text, [pairs, scales[0].numpy(), scales[1].numpy()], 8, tables)
    words = torch.from_numpy(np.stack(words).astype(np.int64))
    found = torch.stack([words & 0xFFFF, words >> 16]).to(torch.int16).view(dtype)
    entries = (points[fields & 2**index_bits - 1].unsqueeze(1) >> 4 * torch.arange(8).view(8, 1) & 15) - 8
    factors = (gains[fields >> index_bits, entries.square().sum(1)] * scales).half().float()
    assert torch.equal(found, (entries.float() * factors.unsqueeze(1)).to(dtype))
