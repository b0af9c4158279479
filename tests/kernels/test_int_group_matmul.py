"""The Triton kernels, through the interpreter, against an fp64 product with the dequantized weight."""

import itertools

import pytest
import torch

from quantkit.formats.int_group import IntGroupWeight
from quantkit.kernels import int_group_matmul as kernel
from quantkit.kernels import launching
from quantkit.kernels.tuning import Config

from .conftest import error

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 4e-3, torch.float32: 1e-5}


def weight_of(bits, out_features, in_features, group_size, symmetric):
    groups = -(-in_features // group_size)
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8)
    scales = (torch.rand(groups, out_features) + 0.5).half()
    zeros = None if symmetric else (torch.rand(groups, out_features) * 2**bits).half()
    return IntGroupWeight.pack(codes, scales, zeros, bits, group_size)


def arguments(weight):
    return weight.codes, weight.scales, weight.zeros, weight.bits, weight.group_size


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("rows", "in_features"), [(5, 320), (5, 96), (40, 256)], ids=["ragged", "short", "many rows"])
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


@pytest.mark.parametrize("rows", range(1, 34))
def test_any_number_of_rows(rows):
    weight = weight_of(3, 65, 128, 64, True)
    x = torch.randn(rows, 128).half()
    exact = x.double() @ weight.dequantize(torch.float64).T
    assert error(kernel.launch(x, *arguments(weight)), exact) < 2e-3


@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size"),
    [(1, 1, 8), (3, 33, 8), (64, 100, 48), (67, 257, 257), (2, 640, 96), (129, 128, 32), (65, 256, 64), (7, 384, 384)],
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_identity_gives_the_dequantized_weight_exactly(dtype, bits, out_features, in_features, group_size):
    weight = weight_of(bits, out_features, in_features, group_size, bits % 2 == 0)
    expected = weight.dequantize(dtype)
    for identity in torch.eye(in_features, dtype=dtype).split(32):
        columns = identity.argmax(1)
        assert torch.equal(kernel.launch(identity, *arguments(weight)).T, expected[:, columns])
        assert torch.equal(weight.matmul(identity).T, expected[:, columns])


@pytest.mark.parametrize("block_m", [8, 16, 32])
@pytest.mark.parametrize("split_k", [1, 2, 8])
@pytest.mark.parametrize("pairs", [2, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 1024])
def test_every_configuration_agrees(group_size, pairs, split_k, block_m, monkeypatch):
    """Shares that get no tile, groups wider and narrower than a tile, both orders of columns."""
    monkeypatch.setattr(launching, "pairs", lambda capability, block_m: pairs)
    weight = weight_of(3, 70, 640, group_size, False)
    x = torch.randn(9, 640).half()
    exact = x.double() @ weight.dequantize(torch.float64).T
    y = kernel.launch(x, *arguments(weight), config=Config(block_m, 64, split_k))
    assert error(y, exact) < 2e-3


@pytest.mark.parametrize(("rows", "in_features"), [(3, 256), (3, 200), (50, 256), (200, 256)])
@pytest.mark.parametrize("rank", [0, 1, 16, 70])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bias_and_low_rank_correction(dtype, rank, rows, in_features):
    weight = weight_of(4, 70, in_features, 64, True)
    x, bias = torch.randn(rows, in_features).to(dtype), torch.randn(70).to(dtype)
    up, down = (
        (torch.randn(70, rank).to(dtype), (torch.randn(rank, in_features) / 16).to(dtype)) if rank else (None,) * 2
    )
    exact = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    if rank:
        exact += x.double() @ down.double().T @ up.double().T
    else:
        up = down = None
    y = kernel.launch(x, *arguments(weight), bias, up, down)
    assert error(y, exact) < 1.5 * TOLERANCE[dtype]
    assert error(kernel.reference(x, *arguments(weight), bias, up, down), exact) < 1.5 * TOLERANCE[dtype]


def test_split_k_adds_the_correction_once():
    weight = weight_of(4, 70, 1024, 128, True)
    x, bias = torch.randn(3, 1024).half(), torch.full((70,), 1000.0).half()
    one, four = (kernel.launch(x, *arguments(weight), bias, config=Config(8, 64, split)) for split in (1, 4))
    torch.testing.assert_close(one, four, rtol=1e-3, atol=0.5)


def test_leading_dimensions_strides_and_no_rows():
    weight = weight_of(4, 40, 128, 32, False)
    for x in (torch.randn(2, 3, 256)[..., ::2], torch.randn(3, 2, 128).transpose(0, 1), torch.randn(6, 300)[:, :128]):
        y = kernel.launch(x.half(), *arguments(weight))
        assert y.shape == (*x.shape[:-1], 40)
        assert error(y, x.half().double() @ weight.dequantize(torch.float64).T) < 2e-3
    assert kernel.launch(torch.randn(0, 128), *arguments(weight)).shape == (0, 40)
    assert kernel.launch(torch.randn(2, 0, 128), *arguments(weight)).shape == (2, 0, 40)


@pytest.mark.parametrize("split_k", [1, 4])
def test_two_runs_are_identical(split_k):
    weight = weight_of(3, 64, 1024, 128, True)
    x = torch.randn(7, 1024).half()
    first, second = (kernel.launch(x, *arguments(weight), config=Config(8, 64, split_k)) for _ in range(2))
    assert torch.equal(first, second)


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


@pytest.mark.parametrize("symmetric", [True, False])
def test_is_a_proper_torch_operator(symmetric):
    weight = weight_of(3, 16, 128, 64, symmetric)
    for x in (torch.randn(2, 128), torch.randn(2, 3, 128).half()):
        torch.library.opcheck(torch.ops.quantkit.int_group_matmul.default, (x, *arguments(weight)))
        extra = torch.randn(16).to(x.dtype), torch.randn(16, 4).to(x.dtype), torch.randn(4, 128).to(x.dtype)
        torch.library.opcheck(torch.ops.quantkit.int_group_matmul.default, (x, *arguments(weight), *extra))


def test_compiles_into_one_graph():
    weight = weight_of(3, 16, 128, 64, True)
    x = torch.randn(2, 128)
    compiled = torch.compile(lambda x: weight.matmul(x) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), weight.matmul(x) + 1)


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


@pytest.mark.parametrize("rows", [3, 50, 200])
def test_a_bias_may_have_a_wider_type_than_x(rows):
    weight = weight_of(4, 40, 256, 128, True)
    x, bias = torch.randn(rows, 256).half(), torch.randn(40)
    exact = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    assert error(kernel.launch(x, *arguments(weight), bias), exact) < 3e-3


def test_gradients_flow_through_the_packed_weight():
    """To x, the bias and the low-rank correction, as through a dense linear of the same weight."""
    weight = weight_of(3, 24, 128, 32, False)
    x, bias, up, down = (torch.randn(*shape) for shape in ((2, 5, 128), (24,), (24, 4), (4, 128)))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, bias, up, down)]
    y = kernel.int_group_matmul(leaves[0], *arguments(weight), *leaves[1:])
    twins = [tensor.clone().requires_grad_() for tensor in (x, bias, up, down)]
    dense = torch.nn.functional.linear(twins[0], weight.dequantize(), twins[1]) + (twins[0] @ twins[3].T) @ twins[2].T
    torch.testing.assert_close(y, dense, rtol=1e-4, atol=1e-3)
    loss = torch.randn_like(y)
    (y * loss).sum().backward()
    (dense * loss).sum().backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-4, atol=1e-3)
    alone = x.clone().requires_grad_()
    kernel.int_group_matmul(alone, *arguments(weight)).sum().backward()
    torch.testing.assert_close(alone.grad, weight.dequantize().sum(0).expand_as(x), rtol=1e-4, atol=1e-3)


def test_autocast_does_not_reach_inside():
    weight = weight_of(3, 24, 128, 32, False)
    x = torch.randn(4, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = weight.matmul(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, weight.matmul(x))


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 103, 120])
def test_sizes_respect_a_gpus_registers_and_memory(capability):
    """What was found by compiling: Blackwell's own instructions want 64 rows of W, small GPUs fewer stages."""
    for M, bits, group_size in itertools.product((1, 8, 16, 32), range(1, 9), (32, 64, 128)):
        problem = kernel.Problem(M, 4096, 4096, bits, group_size, torch.bfloat16, capability)
        config = kernel.rule(problem)
        assert config.block_m >= M
        if capability // 10 == 10 and M > 8:
            assert config.block_n == 64
        if capability in (86, 120) and bits == 8:
            assert config.num_stages == 2
    ragged = kernel.Problem(40, 4096, 4096, 4, 48, torch.bfloat16, capability)
    assert kernel.gemm_rule(ragged).num_stages == 1
