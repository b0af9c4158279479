"""The rotation: its matrices, the reference, and the Triton kernel through the interpreter against fp64."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from quantkit.kernels import hadamard, launching
from quantkit.kernels.hadamard import factors, launch, paley, random_signs, reference, rotate, sizes, unpack_signs

from ..helpers.products import in_turn

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
UNKNOWN = {92, 116, 156, 172, 188, 236}
"""Orders that could be a core and for which Paley's constructions give no matrix."""


def assert_rounded_once(y, exact):
    """y is `exact` rounded to its type, but for an error that is small beside that of rounding."""
    assert y.isfinite().all()
    rounded = exact.to(y.dtype).double()
    floor = exact.norm() * 1e-6
    assert (y.double() - exact).norm() <= 1.02 * (rounded - exact).norm() + floor
    unit = torch.finfo(y.dtype).eps / 2
    typical = exact.square().mean().sqrt()
    assert ((y.double() - exact).abs() <= 1.001 * unit * exact.abs() + max(2**-15, 8 * unit) * 0.1 * typical).all()


def matrix_of(n, signs):
    """R in fp64, from its definition."""
    blocks, core, power = factors(n)
    matrix = torch.ones(1, 1)
    while len(matrix) < power:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    block = torch.kron(paley(core) if core > 1 else torch.ones(1, 1), matrix).double() / math.sqrt(core * power)
    return torch.kron(torch.eye(blocks), block) * unpack_signs(signs, n)


def test_known_cores_are_hadamard():
    for order in range(4, hadamard.LARGEST_CORE + 1, 4):
        matrix = paley(order)
        if matrix is not None:
            assert matrix.abs().eq(1).all()
            assert torch.equal(matrix @ matrix.T, order * torch.eye(order))
    assert {order for order in range(12, hadamard.LARGEST_CORE + 1, 8) if paley(order) is None} == UNKNOWN
    assert all(paley(order) is None for order in (0, 1, 2, 3, 6, 10, 13))


def test_the_largest_known_block_is_taken():
    expected = {
        1: (1, 1, 1), 7: (7, 1, 1), 12: (1, 12, 1), 14: (7, 1, 2), 64: (1, 1, 64), 172: (43, 1, 4), 3072: (1, 12, 256),
        4096: (1, 1, 4096), 5120: (1, 20, 256), 11008: (43, 1, 256), 14336: (1, 28, 512), 18944: (1, 148, 128),
        25600: (1, 100, 256), 28672: (1, 28, 1024), 29568: (231, 1, 128),
    }  # fmt: skip
    assert {n: tuple(factors(n)) for n in expected} == expected
    assert all(f.blocks * f.size == n for n in range(1, 3000) for f in [factors(n)])


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 14, 16, 20, 28, 48, 56, 64, 68, 96, 100, 112, 148, 172, 244, 256, 320])
def test_reference_multiplies_by_an_orthogonal_matrix(n):
    signs = random_signs(n, 5)
    matrix = matrix_of(n, signs)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))
    x = torch.randn(5, n, dtype=torch.float64)
    torch.testing.assert_close(reference(x, signs), x @ matrix.T)
    torch.testing.assert_close(reference(x, signs, True), x @ matrix)
    torch.testing.assert_close(reference(x.float(), signs), (x @ matrix.T).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 9, 1000, 4096, 3072, 11008, 14336, 18944, 28672, 65536])
def test_the_inverse_undoes(n):
    x, signs = torch.randn(2, 3, n), random_signs(n, 1)
    y = rotate(x, signs)
    assert y.shape == x.shape
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(y, signs, True), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate(rotate(x, signs, inverse=True), signs), x, rtol=1e-5, atol=1e-5)


def test_signs_are_stored_as_bits():
    for n in (1, 7, 8, 9, 100):
        signs = torch.randint(0, 2, (n,)) * 2.0 - 1
        packed = hadamard.pack_signs(signs)
        assert packed.dtype == torch.uint8
        assert packed.shape == (-(-n // 8),)
        assert torch.equal(unpack_signs(packed, n), signs)
        assert torch.equal(unpack_signs(packed, n, torch.float64), signs.double())
    assert hadamard.pack_signs(torch.tensor([1, -1, 1, 1, 1, 1, 1, 1, -1])).tolist() == [2, 1]
    assert torch.equal(random_signs(100, 3), random_signs(100, 3))
    assert not torch.equal(random_signs(100, 3), random_signs(100, 4))


def test_signs_of_a_seed_never_change():
    """Layers fed by the same tensor must share the rotation of their statistics, whenever they are quantized."""
    assert random_signs(40, 7).tolist() == [74, 120, 181, 30, 73]


@pytest.mark.parametrize(
    ("size", "inverse", "dtype"),
    in_turn(
        itertools.product(
            [
                *[(2, 17), (6, 3), (9, 3), (12, 17), (16, 1), (56, 3), (96, 3), (148, 1), (172, 3), (256, 17)],
                *[(768, 3), (736, 1), (896, 1), (1184, 1), (2048, 3), (4096, 1)],
            ],
            [False, True],
        ),
        DTYPES,
    ),
)
def test_kernel_against_fp64(size, inverse, dtype):
    """As a few rows are spread over programs, and as many rows are."""
    n, rows = size
    signs = random_signs(n, 2)
    x = torch.randn(rows, n).to(dtype)
    exact = reference(x.double(), signs, inverse)
    for chosen in {sizes(rows, n, dtype), sizes(2**20, n, dtype)}:
        y = launch(x, signs, inverse, chosen)
        assert y.dtype == dtype
        assert_rounded_once(y, exact)
    assert_rounded_once(reference(x, signs, inverse), exact)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("n", [5120, 11008, 14336, 28672, 65536])
def test_kernel_on_long_rows(n, inverse):
    signs = random_signs(n, 2)
    x = torch.randn(1, n).half()
    x[0, 3] = 1000.0  # an outlier, which is what rotations are for
    exact = reference(x.double(), signs, inverse)
    chosen = sizes(1 if inverse else 2**20, n, x.dtype)
    assert_rounded_once(launch(x, signs, inverse, chosen), exact)


@pytest.mark.parametrize("order", [order for order in range(12, hadamard.LARGEST_CORE, 8) if order not in UNKNOWN])
def test_kernel_makes_every_core(order):
    """One wrong entry would change a result by more than rounding does."""
    signs = random_signs(order, 0)
    x = torch.randn(2, order).half()
    chosen = sizes(2**20, order, x.dtype)
    assert_rounded_once(launch(x, signs, order % 16 == 4, chosen), reference(x.double(), signs, order % 16 == 4))


def test_results_do_not_depend_on_rows_beside():
    signs = random_signs(256, 0)
    x = torch.randn(40, 256).bfloat16()
    chosen = sizes(2**20, 256, x.dtype)
    assert chosen.block_v == 16
    y = launch(x, signs, chosen=chosen)
    assert torch.equal(launch(x[3:], signs, chosen=chosen), y[3:])


def test_leading_dimensions_strides_and_no_rows():
    signs = random_signs(96, 0)
    wide = torch.full((6, 300), float("nan"))
    wide[:, 100:196] = torch.randn(6, 96)
    for x in (
        torch.randn(2, 3, 192)[..., ::2], torch.randn(3, 2, 96).transpose(0, 1), wide[:, 100:196], wide[::2, 100:196],
        torch.randn(96, 4).T, torch.randn(96), torch.randn(1, 96).expand(5, 96), torch.randn(2, 0, 96),
        torch.randn(0, 96),
    ):  # fmt: skip
        for function in (launch, rotate):
            y = function(x.half(), signs)
            assert y.shape == x.shape
            assert y.is_contiguous()
            torch.testing.assert_close(y, reference(x.half().double(), signs).half())


def test_inputs_are_left_alone():
    for n in (9, 64):
        x, signs = torch.randn(3, n), random_signs(n, 0)
        before = x.clone()
        for inverse in (False, True):
            rotate(x, signs, inverse)
            launch(x, signs, inverse)
        assert torch.equal(x, before)


@pytest.mark.parametrize("function", [launch, reference, rotate])
def test_what_would_read_out_of_bounds_is_refused(function):
    x, signs = torch.randn(2, 96), random_signs(96, 0)
    for call, message in [
        ((x[:, :90], signs[:11]), "signs are"),
        ((x, signs[:11]), "signs are"),
        ((x, signs.int()), "signs are"),
        ((x, signs[None]), "signs are"),
        ((x, signs.repeat(2)[::2]), "signs are"),
        ((x[:, :0], signs[:0]), "at least one feature"),
        ((x[0, 0], signs), "at least one feature"),
        ((x.int(), signs), "takes float16"),
        ((x, signs.to("meta")), "in one place"),
    ]:
        if function is rotate and call[1].is_meta:
            continue  # torch itself refuses
        with pytest.raises(ValueError, match=message):
            function(*call)


@pytest.mark.parametrize("n", [9, 96, 256])
def test_is_a_proper_torch_operator(n):
    signs = random_signs(n, 0)
    for x in (torch.randn(2, n, requires_grad=True), torch.randn(2, 3, n).half(), torch.randn(n, 4).T):
        for inverse in (False, True):
            torch.library.opcheck(torch.ops.quantkit.rotate.default, (x, signs, inverse))


def test_compiles_into_one_graph():
    x, signs = torch.randn(2, 96), random_signs(96, 0)
    compiled = torch.compile(lambda x: rotate(rotate(x, signs) + 1, signs, True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), x + rotate(torch.ones(96), signs, True))


@pytest.mark.parametrize("inverse", [False, True])
def test_the_gradient_is_rotated_back(inverse):
    signs = random_signs(24, 0)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, signs, inverse), x)
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, signs, inverse), x)


def test_autocast_does_not_reach_inside():
    x, signs = torch.randn(4, 96), random_signs(96, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = rotate(x, signs)
    assert y.dtype == torch.float32
    assert torch.equal(y, rotate(x, signs))


def test_sizes_spread_few_rows_and_respect_registers():
    """What was found by compiling: more elements a lane are spilled; what is moved must fit 99 KiB of shared memory."""
    for n in (2, 9, 12, 96, 256, 896, 1024, 3072, 4096, 5120, 8960, 11008, 14336, 18944, 24576, 28672, 64512, 65536):
        _, core, power = factors(n)
        for dtype, rows in itertools.product(DTYPES, (1, 2, 17, 300, 2**20)):
            chosen = sizes(rows, n, dtype)
            columns = chosen.block_v * chosen.inner
            assert power % chosen.inner == 0
            assert core == 1 or min(columns, chosen.block_g, chosen.block_k) >= 16
            read = chosen.together * columns
            assert chosen.together == 1 or (power // chosen.inner) % chosen.together == 0
            assert read * max(chosen.block_g, chosen.block_k) <= (128 if core > 1 else 64) * 32 * chosen.num_warps
            assert columns * chosen.block_g * 4 <= 64 * 1024
            assert chosen.programs(rows, n) * columns * chosen.block_g >= rows * n
    programs = {n: sizes(1, n, torch.float16).programs(1, n) for n in (4096, 11008, 14336, 18944, 65536)}
    assert programs == {4096: 4, 11008: 43, 14336: 8, 18944: 10, 65536: 16}
    programs = {n: sizes(2**20, n, torch.float16).programs(4096, n) for n in (1024, 4096, 14336, 28672)}
    assert programs == {1024: 1024, 4096: 4096, 14336: 4096, 28672: 8192}


COMPILED = """
import re
from dataclasses import replace
from quantkit.evals import kernel_build, kernel_families
for arch in (80, 90):
    builds = [*kernel_families.rotation(arch, True), *kernel_families.trellis(arch, True)]
    for kernel in ("rotate 4096 M=1 bf16", "trellis multiply K=2 L=16 M=8 bf16")[: 1 + (arch >= 90)]:
        build = next(build for build in builds if build.name.startswith(kernel))
        pdl = arch >= 90
        binary = kernel_build.compile_build(replace(build, constants=build.constants | {"PDL": pdl}))
        text = binary.asm["ptx"]
        order = re.findall(r"griddepcontrol\\.\\w+|ld\\.global\\S*|st\\.global\\S*|atom\\S+|red\\.\\S+", text)
        print(kernel.split()[0], arch, *order)
"""


def test_dependent_launches_wait_before_they_read_or_write_what_others_do():
    """As they are compiled; codes and steps of the weight alone are read before."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    lines = {tuple(line.split()[:2]): line.split()[2:] for line in result.stdout.splitlines()}
    assert set(lines) == {("rotate", "80"), ("rotate", "90"), ("trellis", "90")}, result.stderr
    for (_, arch), order in lines.items():
        assert sum(text.startswith("griddepcontrol") for text in order) == 0 or arch == "90"
    rotate, trellis = lines["rotate", "90"], lines["trellis", "90"]
    assert rotate[:2] == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    wait = trellis.index("griddepcontrol.wait")
    assert wait == 12  # four chunks: two lines of codes each, and steps
    assert all(text.startswith("ld.global") for text in trellis[:wait])
    assert sum(text.startswith("griddepcontrol") for text in rotate + trellis) == 3


def test_dependent_launches_are_asked_for():
    device = torch.zeros(1)
    assert launching.dependent(device) == {"PDL": False}
    launching.overlap(True)
    try:
        assert launching.dependent(device) == {"PDL": False}  # no GPU

        class OnGPU:
            is_cuda, device = True, "cuda"

        for capability, wanted in ((80, {"PDL": False}), (90, {"PDL": True, "launch_pdl": True})):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(launching, "properties", lambda device, found=capability: (found, 132, "a GPU"))
                assert launching.dependent(OnGPU()) == wanted
    finally:
        launching.overlap(False)
