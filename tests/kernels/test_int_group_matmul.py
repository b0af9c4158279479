"""The Triton kernels, through the interpreter, against an fp64 product with the dequantized weight."""

import itertools
from dataclasses import replace

import pytest
import torch

from quantkit.kernels import int_group_matmul as kernel
from quantkit.kernels import launching
from quantkit.kernels.tuning import Config

from ..helpers.products import identity, in_dtypes, in_turn
from ..helpers.products import int_group_arguments as arguments
from ..helpers.products import int_group_weight as weight_of
from .conftest import error

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 4e-3, torch.float32: 1e-5}
HALF, BRAIN, SINGLE = TOLERANCE


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched."""
    names = []
    for name in ("_decode", "_gemm", "_write_out"):
        original = getattr(kernel, name)
        monkeypatch.setattr(
            kernel, name, lambda *args, name=name, original=original: names.append(name) or original(*args)
        )
    return names


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_decode_against_fp64(bits, dtype, symmetric, launched):
    weight = weight_of(bits, 70, 256, 128, symmetric)
    x = torch.randn(5, 256).to(dtype)
    exact = x.double() @ weight.dequantize(torch.float64).T
    y = kernel.launch(x, *arguments(weight))
    assert launched == ["_decode"]
    assert y.dtype == dtype
    assert error(y, exact) < TOLERANCE[dtype]
    assert error(kernel.reference(x, *arguments(weight)), exact) < 1.5 * TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("bits", "in_features", "rows", "by"),
    [(4, 256, 5, "_decode"), (5, 128, 20, "_decode"), (5, 200, 5, "_gemm"), (4, 256, 300, "_write_out")],
)
def test_zeros_in_fp32(bits, in_features, rows, by, launched):
    weight = weight_of(bits, 70, in_features, 32, False)
    weight = replace(weight, zeros=weight.zeros.float() + torch.rand(weight.zeros.shape) * 1e-3)
    weight.validate()
    x = torch.randn(rows, in_features).half()
    y = kernel.launch(x, *arguments(weight))
    assert launched == [by]
    assert error(y, x.double() @ weight.dequantize(torch.float64).T) < 2e-3


@pytest.mark.parametrize(
    ("bits", "dtype", "rows", "in_features"),
    in_turn(in_dtypes([(1,), (3,), (2,), (4,), (5,), (7,), (6,), (8,)]), [5, 5, 40], [320, 96, 256]),
)
def test_gemm_against_fp64(rows, in_features, bits, dtype, launched):
    if dtype == torch.float32:
        rows = 5  # more rows of fp32 are a dense product
    weight = weight_of(bits, 70, in_features, 128, bits % 2 == 0)
    x = torch.randn(rows, in_features).to(dtype)
    exact = x.double() @ weight.dequantize(torch.float64).T
    y = kernel.launch(x, *arguments(weight))
    assert launched == ["_gemm"]
    assert y.dtype == dtype
    # weights are rounded to x's dtype, and so is the result: two roundings
    assert error(y, exact) < 1.5 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "in_features"), [(2, 256), (3, 256), (3, 200), (4, 384), (8, 130)])
def test_dense_against_the_reference(bits, in_features, dtype, launched):
    weight = weight_of(bits, 70, in_features, 64, bits == 3)
    x = torch.randn(200, in_features).to(dtype)
    y = kernel.launch(x, *arguments(weight))
    assert launched == ["_write_out"]
    torch.testing.assert_close(y, kernel.reference(x, *arguments(weight)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size", "bits", "dtype"),
    in_turn(
        [
            *[(1, 1, 8), (3, 33, 8), (64, 100, 48), (67, 257, 257), (2, 640, 96), (129, 128, 32)],
            *[(65, 256, 64), (7, 384, 384)],
        ]
        * 3,
        [2, 3, 4, 8, 3, 4],
        [BRAIN, BRAIN, BRAIN, BRAIN, HALF, SINGLE],
    ),
)
def test_identity_gives_the_dequantized_weight_exactly(out_features, in_features, group_size, bits, dtype):
    weight = weight_of(bits, out_features, in_features, group_size, bits % 2 == 0)
    expected = weight.dequantize(dtype)
    for rows in identity(in_features, dtype):
        columns = rows.argmax(1)
        assert torch.equal(kernel.launch(rows, *arguments(weight)).T, expected[:, columns])
    everything = torch.eye(in_features, dtype=dtype)
    assert torch.equal(weight.matmul(everything).T, expected)


@pytest.mark.parametrize(
    ("block_m", "split_k", "pairs", "group_size"),
    in_turn(
        [(8, 1, 2), (8, 2, 4), (8, 8, 2), (16, 1, 4), (16, 2, 2), (16, 8, 4), (32, 1, 2), (32, 2, 4), (32, 8, 2)] * 2,
        [32, 64, 128, 256, 1024],
    ),
)
def test_every_configuration_agrees(group_size, pairs, split_k, block_m, monkeypatch):
    """Shares that get no tile, groups wider and narrower than a tile, both orders of columns."""
    monkeypatch.setattr(launching, "pairs", lambda capability, block_m: pairs)
    weight = weight_of(3, 70, 384, group_size, False)
    x = torch.randn(9, 384).half()
    exact = x.double() @ weight.dequantize(torch.float64).T
    y = kernel.launch(x, *arguments(weight), config=Config(block_m, 64, split_k))
    assert error(y, exact) < 2e-3


def test_what_would_read_out_of_bounds_is_refused():
    weight = weight_of(3, 16, 128, 64, True)
    x = torch.randn(2, 128)
    codes, scales, zeros, bits, group_size = arguments(weight)
    up, down = torch.randn(16, 4), torch.randn(4, 128)
    for call, message in [
        ((x[:, :0], codes[:, :0].contiguous(), scales[:0], zeros, bits, group_size), "x has 0 columns"),
        ((x[:, :60], codes, scales, zeros, bits, group_size), "codes are"),
        ((x, codes, scales, zeros, 4, group_size), "codes are"),
        ((x, codes.long(), scales, zeros, bits, group_size), "codes are"),
        ((x, codes, scales[:, :8], zeros, bits, group_size), "scales are"),
        ((x, codes, scales.T, zeros, bits, group_size), "scales are"),
        ((x, codes, scales, scales[:1], bits, group_size), "zeros are"),
        ((x, codes, scales, zeros, bits, 0), "at least one column"),
        ((x, codes, scales, zeros, 9, group_size), "1 to 8"),
        ((x.double(), codes, scales, zeros, bits, group_size), "takes float16"),
        ((x, codes, scales, zeros, bits, group_size, torch.randn(15)), "bias are"),
        ((x, codes, scales, zeros, bits, group_size, None, up, down[:, :100]), "down are"),
        ((x, codes, scales, zeros, bits, group_size, None, up.half(), down), "up are"),
        ((x, codes, scales, zeros, bits, group_size, None, up, down[:3]), "down are"),
        ((x, codes, scales, zeros, bits, group_size, None, up, None), "both up and down"),
        ((x, codes, scales, zeros, bits, group_size, None, up[0], down), "up are"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel.launch(*call)


def test_the_rule_fills_a_gpu_and_names_launches_apart():
    sizes = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672), (256, 128), (152064, 896)]
    keys = set()
    for (N, K), M in itertools.product(sizes, (1, 8, 16, 32)):
        problem = kernel.Problem(M, N, K, 3, 128, torch.float16)
        config = kernel.rule(problem)
        programs = -(-N // config.block_n) * -(-M // config.block_m) * config.split_k
        assert config.block_m >= M
        if N * K >= 4096 * 4096:
            assert programs >= 132
        assert K // 128 // config.split_k >= 1
        keys.add(problem.key())
    assert len(keys) == len(sizes) * 3  # 1 and 8 rows are one launch


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 103, 120])
def test_sizes_respect_a_gpus_registers_and_memory(capability):
    """What was found by compiling: Blackwell's own instructions want 64 rows of W, small GPUs fewer stages."""
    for M, bits, group_size in itertools.product((1, 8, 16, 32), range(1, 9), (32, 64, 128)):
        problem = kernel.Problem(M, 4096, 4096, bits, group_size, torch.bfloat16, capability)
        config = kernel.rule(problem)
        own = capability // 10 == 10 and M > 8
        assert config.block_m == 8 if own and bits == 3 else config.block_m >= M
        if own and bits != 3:
            assert config.block_n == 64
        if capability in (86, 120) and bits == 8:
            assert config.num_stages == 2
    ragged = kernel.Problem(40, 4096, 4096, 4, 48, torch.bfloat16, capability)
    assert kernel.gemm_rule(ragged).num_stages == 1
