"""Compiled products on a CPU against each kernel's specification."""

import subprocess
import sys

import pytest
import torch

from quantkit.kernels import codebook_matmul, cpu, hadamard, int_group_matmul, trellis_matmul
from quantkit.kernels.bitpack import pack
from quantkit.kernels.trellis import lines

from .conftest import error

numba_words = pytest.importorskip("quantkit.kernels.numba_words")


def integers(bits, N, K, group_size, zeros):
    groups = -(-K // group_size)
    scales = (torch.rand(groups, N) + 0.5).half()
    offsets = (torch.rand(groups, N) * 2**bits).half() if zeros else None
    offsets = torch.full((1,), 2.0 ** (bits - 1)).half() if zeros == "whole" else offsets
    offsets = torch.rand(groups, N) * 2**bits if zeros == "wide" else offsets
    codes = pack(torch.randint(0, 2**bits, (N, K)), bits)
    return (codes, scales, offsets, bits, group_size), int_group_matmul


def trellis_codes(bits, state_bits, parts, K):
    codes = torch.randint(-(2**31), 2**31 - 1, (sum(lines(parts, bits)), K), dtype=torch.int32)
    steps = torch.randint(100, 256, (len(parts), K), dtype=torch.uint8)
    return (codes, steps, torch.rand(len(parts)), bits, state_bits, parts), trellis_matmul


def codebooks(v, bits, residual_bits, ranges, N, K):
    arguments = []
    for width in (bits, residual_bits):
        codes = pack(torch.randint(0, 1 << width, (-(-N // v), K)), width) if width else None
        arguments += [codes, torch.randn(ranges, 1 << width, v).half() if width else None]
    return (*arguments, N), codebook_matmul


CASES = [
    *[
        (integers, (bits, *shape, zeros))
        for bits in range(1, 9)
        for shape, zeros in (
            ((33, 256, 128), False),
            ((20, 576, 64), True),
            ((17, 333, 32), False),
            ((9, 77, 77), True),
        )
    ],
    *[
        (integers, (bits, *shape, True))
        for bits in (3, 4)
        for shape in ((40, 1000, 100), (64, 384, 384), (21, 1024, 256))
    ],
    *[(integers, (bits, *shape, "whole")) for bits, shape in ((4, (40, 256, 32)), (3, (9, 77, 77)), (8, (5, 300, 64)))],
    *[(integers, (bits, *shape, "wide")) for bits, shape in ((4, (40, 256, 32)), (5, (9, 77, 77)))],
    (integers, (4, 21, 1024, 256, "wide")),
    *[(integers, (2, *shape, False)) for shape in ((18, 200, 128), (3, 5, 64), (1, 130, 1000))],
    *[(trellis_codes, (bits, state_bits, [40], 77)) for bits in range(1, 9) for state_bits in (16, max(8, 2 * bits))],
    *[(trellis_codes, (2, 16, parts, 64)) for parts in ([128, 33], [256, 128, 5], [3])],
    *[(codebooks, (v, 9, 3, 1, 37, 333)) for v in (1, 2, 3, 4, 6, 8, 16)],
    *[
        (codebooks, (4, bits, residual, ranges, 30, 384))
        for bits, residual, ranges in ((12, 0, 1), (16, 0, 1), (5, 7, 3))
    ],
]
each = pytest.mark.parametrize(("make", "arguments"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))


@each
def test_rows_and_products_are_the_specification_s(make, arguments):
    weight, family = make(*arguments)
    K = arguments[3] if make is trellis_codes else arguments[-1] if make is codebooks else arguments[2]
    exact = family.dequantized(*weight, K)
    loops = cpu.compiled(family.COMPILED)
    assert torch.equal(family.unpacked(*weight, K), exact)
    some = torch.full((max(1, len(exact) - 2), K), float("nan"))
    loops.unpack(*weight, some, len(exact) - len(some))
    assert torch.equal(some, exact[-len(some) :])
    x = torch.randn(2, K) + 1
    assert error(loops.multiply(x, *weight), x.double() @ exact.double().T) < 1e-5


@pytest.mark.parametrize("rows", [0, 1, 2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_operators_take_every_number_of_rows_and_type(rows, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "AT_ONCE", 64 * 96)  # several parts
    for weight, family, operator in (
        (*integers(3, 200, 96, 32, True), int_group_matmul.int_group_matmul),
        (*trellis_codes(2, 12, [200], 96), trellis_matmul.trellis_matmul),
        (*codebooks(4, 7, 0, 1, 200, 96), codebook_matmul.codebook_matmul),
    ):
        x, bias = torch.randn(2, rows, 96).to(dtype), torch.randn(200)
        up, down = torch.randn(200, 3).to(dtype), torch.randn(3, 96).to(dtype)
        y = operator(x, *weight, bias, up, down)
        assert y.dtype == dtype and y.shape == (2, rows, 200)
        dense = family.dequantized(*weight, 96).double() + up.double() @ down.double()
        expected = x.double() @ dense.T + bias.double()
        assert not rows or error(y, expected) < (1e-2 if dtype == torch.bfloat16 else 2e-6)


def test_paths(monkeypatch):
    """Few rows are multiplied one by one, more by parts, and without numba by the reference."""
    weight, family = integers(4, 64, 128, 128, False)
    loops, taken = cpu.compiled(family.COMPILED), []
    for name in ("multiply", "unpack"):
        known = getattr(loops, name)
        monkeypatch.setattr(loops, name, lambda *a, name=name, known=known: (taken.append(name), known(*a))[1])
    for rows in (1, loops.FEW, loops.FEW + 1):
        family.int_group_matmul(torch.randn(rows, 128), *weight)
    with cpu.plain():
        family.int_group_matmul(torch.randn(1, 128), *weight)
        assert cpu.compiled(family.COMPILED) is None
    assert taken == ["multiply", "multiply", "unpack"]


def test_wrong_arguments_are_refused_before_anything_is_read():
    for weight, operator in (
        (integers(4, 64, 128, 128, False)[0], int_group_matmul.int_group_matmul),
        (trellis_codes(2, 12, [64], 128)[0], trellis_matmul.trellis_matmul),
        (codebooks(4, 7, 0, 1, 64, 128)[0], codebook_matmul.codebook_matmul),
    ):
        for K in (1, 64, 129, 256):
            with pytest.raises(ValueError, match="take"):
                operator(torch.randn(1, K), *weight)
        with pytest.raises(ValueError, match="take"):
            operator(torch.randn(1, 128), weight[0][:-1], *weight[1:])


def test_gradients_pass_through_unpacked_weights():
    weight, family = integers(4, 64, 128, 128, True)
    x = torch.randn(3, 128, requires_grad=True)
    family.int_group_matmul(x, *weight).sum().backward()
    torch.testing.assert_close(x.grad, family.dequantized(*weight, 128).sum(0).expand(3, -1), atol=1e-4, rtol=1e-4)


def test_books_that_change_are_read_anew():
    weight, family = codebooks(4, 7, 0, 1, 64, 128)
    x = torch.randn(1, 128)
    before = family.codebook_matmul(x, *weight)
    weight[1].mul_(2)
    torch.testing.assert_close(family.codebook_matmul(x, *weight), 2 * before)


def test_threads_share_rows(monkeypatch):
    """Any number of threads gives the same bytes, and every row once."""
    monkeypatch.setattr(numba_words, "SMALL", 0)
    for weight, family in (
        integers(3, 205, 256, 64, True),
        trellis_codes(2, 16, [205], 64),
        codebooks(4, 9, 3, 1, 205, 256),
    ):
        K = 64 if family is trellis_matmul else 256
        x, found, threads = torch.randn(1, K), [], torch.get_num_threads()
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            try:
                found.append((cpu.compiled(family.COMPILED).multiply(x, *weight), family.unpacked(*weight, K)))
            finally:
                torch.set_num_threads(threads)
        assert all(torch.equal(a, found[0][0]) and torch.equal(b, found[0][1]) for a, b in found)


def test_a_forked_process_has_threads_of_its_own():
    code = """
import os, torch
from quantkit.kernels import numba_words
numba_words.SMALL = 0
torch.set_num_threads(2)
from quantkit.kernels.int_group_numba import multiply
weight = torch.zeros(64, 16, dtype=torch.int32), torch.ones(1, 64).half(), None, 4, 128
first = multiply(torch.ones(1, 128), *weight)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(multiply(torch.ones(1, 128), *weight), first) else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("n", [1, 2, 12, 64, 333, 576, 1536, 4096])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotations(n, inverse):
    x, signs = torch.randn(2, n), torch.randint(0, 256, (-(-n // 8),), dtype=torch.uint8)
    exact = hadamard.reference(x.double(), signs, inverse)
    assert error(cpu.compiled(hadamard.COMPILED).rotate(x, signs, inverse), exact) < 1e-6
    assert error(hadamard.rotate(x.bfloat16(), signs, inverse), exact) < 1e-2
    with pytest.raises(ValueError, match="take"):
        hadamard.rotate(torch.randn(1, n + 8), signs, inverse)
