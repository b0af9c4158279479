"""The Triton kernel, through the interpreter, against an fp64 product with the dequantized weight."""

import os
import subprocess
import sys

import pytest
import torch

from quantkit.formats.int_group import IntGroupWeight
from quantkit.kernels import int_group_matmul as kernel


def weight_of(bits, out_features, in_features, group_size, symmetric):
    groups = -(-in_features // group_size)
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8)
    scales = (torch.rand(out_features, groups) + 0.5).half()
    zeros = None if symmetric else (torch.rand(out_features, groups) * 2**bits).half()
    return IntGroupWeight.pack(codes, scales, zeros, bits, group_size)


def arguments(weight):
    return weight.codes, weight.scales, weight.zeros, weight.bits, weight.group_size


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """`torch.empty` hands out NaN, so that an output element that no program writes is seen."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_error_against_fp64(bits, symmetric, dtype):
    weight = weight_of(bits, 70, 320, 128, symmetric)
    x = torch.randn(5, 320).to(dtype)
    exact = x.double() @ weight.dequantize(torch.float64).T
    for function in (kernel.launch, kernel.reference):
        y = function(x, *arguments(weight))
        assert y.dtype == dtype
        assert (y.double() - exact).norm() / exact.norm() < (2e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 33, 65])
def test_any_number_of_rows(rows):
    weight = weight_of(3, 65, 136, 64, True)
    x = torch.randn(rows, 136)
    torch.testing.assert_close(
        kernel.launch(x, *arguments(weight)), kernel.reference(x, *arguments(weight)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size"), [(1, 1, 8), (3, 33, 8), (64, 100, 48), (67, 257, 257), (2, 640, 96)]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_identity_gives_the_dequantized_weight_exactly(bits, out_features, in_features, group_size):
    weight = weight_of(bits, out_features, in_features, group_size, bits % 2 == 0)
    identity = torch.eye(in_features)
    expected = weight.dequantize()
    assert torch.equal(kernel.launch(identity, *arguments(weight)).T, expected)
    assert torch.equal(kernel.reference(identity, *arguments(weight)).T, expected)
    assert torch.equal(weight.matmul(identity).T, expected)


def test_leading_dimensions_strides_and_no_rows():
    weight = weight_of(4, 40, 128, 32, False)
    x = torch.randn(2, 3, 256)[..., ::2]
    assert not x.is_contiguous()
    y = kernel.launch(x, *arguments(weight))
    assert y.shape == (2, 3, 40)
    torch.testing.assert_close(y, kernel.reference(x, *arguments(weight)), rtol=1e-4, atol=1e-4)
    assert kernel.launch(torch.randn(0, 128), *arguments(weight)).shape == (0, 40)


def test_two_runs_are_identical():
    weight = weight_of(3, 64, 256, 128, True)
    x = torch.randn(7, 256).half()
    assert torch.equal(kernel.launch(x, *arguments(weight)), kernel.launch(x, *arguments(weight)))


def test_what_would_read_out_of_bounds_is_refused():
    weight = weight_of(3, 16, 128, 64, True)
    x = torch.randn(2, 128)
    codes, scales, zeros, bits, group_size = arguments(weight)
    for call, message in [
        ((x[:, :60], codes, scales, zeros, bits, group_size), "codes are"),
        ((x, codes, scales, zeros, 4, group_size), "codes are"),
        ((x, codes.long(), scales, zeros, bits, group_size), "codes are"),
        ((x, codes, scales[:8], zeros, bits, group_size), "scales are"),
        ((x, codes, scales, scales[:, :1], bits, group_size), "zeros are"),
        ((x, codes, scales, zeros, bits, 0), "at least one column"),
        ((x, codes, scales, zeros, 9, group_size), "1 to 8"),
        ((x.double(), codes, scales, zeros, bits, group_size), "takes float16"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel.launch(*call)


@pytest.mark.parametrize("symmetric", [True, False])
def test_is_a_proper_torch_operator(symmetric):
    weight = weight_of(3, 16, 128, 64, symmetric)
    for x in (torch.randn(2, 128), torch.randn(2, 3, 128).half()):
        torch.library.opcheck(torch.ops.quantkit.int_group_matmul.default, (x, *arguments(weight)))


def test_compiles_into_one_graph():
    weight = weight_of(3, 16, 128, 64, True)
    x = torch.randn(2, 128)
    compiled = torch.compile(lambda x: weight.matmul(x) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), weight.matmul(x) + 1)


_COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from quantkit.kernels import int_group_matmul as launcher
from quantkit.kernels import int_group_matmul_triton as kernel

CASES = (2, False, "bf16", 16), (3, True, "fp16", 64), (4, False, "fp16", 16), (8, True, "bf16", 64)
for bits, zeros, dtype, block_m in CASES:
    constants = {"BITS": bits, "HAS_ZEROS": zeros, "BLOCK_M": block_m, "BLOCK_N": 64, "UPCAST": False}
    constants |= {f"TAIL_{b}": 0 for b in (8, 4, 2, 1)}
    types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
    types |= {"codes_ptr": "*i32", "scales_ptr": "*fp16", "zeros_ptr": "*fp16"}
    names = kernel.int_group_matmul_kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in types}
    source = ASTSource(kernel.int_group_matmul_kernel, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=launcher.OPTIONS)
    assert binary.asm["cubin"]
    print("shared", binary.metadata.shared)
"""


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_for_gpus_ahead_of_time(arch, tmp_path):
    """No GPU needed: Triton's own compiler and assembler, and the shared memory fits the smallest target."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", _COMPILE, str(arch)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
    shared = [int(line.split()[1]) for line in result.stdout.splitlines()]
    assert len(shared) == 4
    assert max(shared) <= 101376
