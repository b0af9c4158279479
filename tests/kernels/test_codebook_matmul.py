"""The codebook's Triton kernels through the interpreter, with and without their assembly, against fp64."""

import logging
from itertools import product

import pytest
import torch

from quantkit.formats import codebook as codebook_format
from quantkit.formats.codebook import CodebookWeight
from quantkit.kernels import codebook_matmul as kernel
from quantkit.kernels import codebook_rule as rules
from quantkit.kernels import launching
from quantkit.kernels.tuning import Config

from ..helpers import ptx
from ..helpers.products import codebook_arguments as arguments_of
from ..helpers.products import codebook_weight as weight_of
from ..helpers.products import in_turn
from .conftest import error

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 4e-3, torch.float32: 1e-5}
DTYPES = list(TOLERANCE)


@pytest.fixture
def machine(monkeypatch):
    """Runs the kernels as a GPU would, with their assembly; returns what runs it."""
    found = ptx.Machine()
    found.install(monkeypatch)
    monkeypatch.setattr(launching, "machine", lambda tensor: {"ASM": True, "INTERPRETED": True})
    return found


def source(weight, x, config=None):
    problem = kernel.problem_of(x, weight.books, weight.residual_books, weight.shape[0])
    return rules.lookup(problem, config or rules.rule(problem)).source


def test_dequantized_is_the_equation():
    weight = weight_of(13, 300, 3, 5, 4, ranges=2)
    (codes, books), (more, more_books) = (
        (kernel.unpack(words, (books.shape[1] - 1).bit_length(), 300).long(), books) for words, books in weight.stages()
    )
    width = rules.range_width(300, 2)
    for n, k in ((0, 0), (12, 299), (7, width - 1), (7, width), (1, 130)):
        g, j = divmod(n, 3)
        expected = books[k // width, codes[g, k], j].float() + more_books[k // width, more[g, k], j].float()
        assert kernel.dequantized(*arguments_of(weight), 300)[n, k] == expected


@pytest.mark.parametrize(
    ("v", "dtype", "assembly"),
    [
        *[(v, torch.bfloat16, True) for v in range(1, 17)],
        *[(v, torch.bfloat16, False) for v in (1, 2, 3, 4, 5, 6, 8, 11, 16)],
        *in_turn(product((1, 3, 6, 16), [torch.float16]), [False, True]),
        *in_turn(product((2, 4, 8), [torch.float32]), [True, False]),
    ],
)
def test_every_vector_length(v, assembly, dtype, request):
    if assembly:
        request.getfixturevalue("machine")
    for K, bits, residual_bits in ((256, 4, 0), (128, 7, 3)) if assembly else ((256, 4, 0), (130, 5, 3)):
        weight = weight_of(5 * v + 1, K, v, bits, residual_bits)
        exact = weight.dequantize(torch.float64)
        for rows in (3, 40):
            x = torch.randn(rows, K).to(dtype)
            y = kernel.launch(x, *arguments_of(weight))
            assert y.dtype == dtype
            assert error(y, x.double() @ exact.T) < TOLERANCE[dtype]
        if assembly:
            assert source(weight, x.half()) == "shared"


@pytest.mark.parametrize("bits", range(1, 17))
def test_every_width_of_codes(bits, machine):
    for K in (128, 200):
        weight = weight_of(9, K, 2, bits)
        x = torch.randn(2, K).half()
        assert error(kernel.launch(x, *arguments_of(weight)), x.double() @ weight.dequantize(torch.float64).T) < 2e-3


SIZES = [
    *[(1, 1, 2, 3, 0, 1), (65, 128, 4, 8, 0, 1), (40, 256, 6, 12, 0, 1), (70, 70, 3, 6, 0, 1)],
    *[(50, 384, 4, 8, 0, 2), (33, 256, 8, 8, 8, 1), (20, 512, 8, 9, 4, 3), (16, 130, 5, 7, 2, 2)],
    *[(24, 128, 1, 2, 0, 1), (24, 128, 2, 4, 0, 1), (24, 128, 8, 16, 0, 1), (30, 256, 7, 13, 0, 2)],
]


@pytest.mark.parametrize("assembly", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "v", "bits", "residual_bits", "ranges", "dtype"),
    in_turn(SIZES, [torch.bfloat16, torch.float16, torch.bfloat16, torch.float32]),
)
def test_identity_gives_the_dequantized_weight_exactly(N, K, v, bits, residual_bits, ranges, assembly, dtype, request):
    if assembly:
        request.getfixturevalue("machine")
    weight = weight_of(N, K, v, bits, residual_bits, ranges)
    expected = weight.dequantize(dtype)
    for identity in torch.eye(K, dtype=dtype).split(32)[:2]:
        y = kernel.launch(identity, *arguments_of(weight))
        assert torch.equal(y.T, expected[:, identity.argmax(1)])
    many = torch.eye(K, dtype=dtype).repeat(-(-40 // K), 1)
    assert torch.equal(kernel.launch(many, *arguments_of(weight))[:K].T, expected)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33])
def test_any_number_of_rows(rows, machine):
    weight = weight_of(65, 128, 4, 8)
    x = torch.randn(rows, 128).half()
    assert error(kernel.launch(x, *arguments_of(weight)), x.double() @ weight.dequantize(torch.float64).T) < 2e-3


@pytest.mark.parametrize(
    ("v", "bits", "residual_bits", "ranges", "block_m", "split_k", "pairs"),
    in_turn(
        [(4, 8, 0, 1), (6, 12, 0, 2), (8, 8, 8, 1), (8, 16, 0, 1), (2, 4, 0, 3), (3, 6, 5, 2)] * 3,
        [8, 16, 32, 16, 32],
        [1, 8, 2, 8],
        [2, 4, 4, 2, 2, 4, 2],
    ),
)
def test_every_configuration_agrees(v, bits, residual_bits, ranges, block_m, split_k, pairs, machine, monkeypatch):
    """Shares that get no tile or parts of several ranges, both orders of columns, books in shared and global memory."""
    monkeypatch.setattr(launching, "pairs", lambda capability, block_m: pairs)
    weight = weight_of(37, 384, v, bits, residual_bits, ranges)
    x = torch.randn(11, 384).half()
    config = Config(block_m, 64, split_k, num_warps=4, num_stages=3)
    y = kernel.launch(x, *arguments_of(weight), config=config)
    assert error(y, x.double() @ weight.dequantize(torch.float64).T) < 2e-3
    assert bits < 16 or source(weight, x, config) == "global"


@pytest.mark.parametrize("residual_bits", [0, 8])
def test_codes_are_asked_for_before_tables_are_filled(residual_bits, machine):
    """Each program's first ones, of all its rows, and nothing but codes."""
    weight = weight_of(130, 640, 2, 8, residual_bits)
    kernel.launch(torch.randn(3, 640).half(), *arguments_of(weight), config=Config(8, 64, 3, num_warps=4, num_stages=2))
    lines = 3 * 128 // 128 * (2 if residual_bits else 1)  # three tiles of 16 bytes a bit, by lines of 128 bytes
    assert [addresses is None for addresses in machine.asked] == (lines * [False] + [True]) * 2 * 3
    asked = torch.cat([torch.tensor(addresses) for addresses in machine.asked if addresses is not None])
    for codes in (weight.codes, weight.residual_codes) if residual_bits else (weight.codes,):
        first, words = codes.data_ptr(), codes.shape[1]
        own = (asked >= first) & (asked < first + codes.nbytes)
        row, byte = (asked[own] - first) // (4 * words), (asked[own] - first) % (4 * words)
        for share in range(3):  # of two tiles, of 128 bytes a row each
            assert set(row[byte == 2 * share * 128].tolist()) == set(range(65))
        asked = asked[~own]
    assert not len(asked)


def test_stages_with_ranges_of_their_own():
    weight = weight_of(20, 512, 4, 6, 5, ranges=1, residual_ranges=4)
    x = torch.randn(4, 512).half()
    assert error(kernel.launch(x, *arguments_of(weight)), x.double() @ weight.dequantize(torch.float64).T) < 2e-3


@pytest.mark.parametrize("assembly", [False, True])
def test_bias_and_low_rank_correction(assembly, request):
    if assembly:
        request.getfixturevalue("machine")
    weight = weight_of(50, 256, 4, 8)
    up, down, bias = torch.randn(50, 7).half(), torch.randn(7, 256).half(), torch.randn(50)
    for rows in (4, 40):
        x = torch.randn(rows, 256).half()
        exact = x.double() @ (weight.dequantize(torch.float64) + up.double() @ down.double()).T + bias.double()
        assert error(kernel.launch(x, *arguments_of(weight), bias, up, down), exact) < 3e-3


def test_what_would_read_out_of_bounds_is_refused():
    weight, x = weight_of(20, 256, 4, 6, 5, ranges=2), torch.randn(3, 256).half()
    codes, books, more, more_books = weight._stages
    for call, message in [
        ((x[:, :128], codes, books, more, more_books, 20), "do not divide|codes are"),
        ((x, codes, books, more, more_books, 24), "codes are"),
        ((x, codes[:, :-1], books, more, more_books, 20), "codes are"),
        ((x, codes, books[:, :63], more, more_books, 20), "power of two"),
        ((x, codes, books[:1], more, more_books[:0], 20), "do not divide"),
        ((x, codes, books.float(), more, more_books, 20), "books are"),
        ((x, codes, books, more[:3], more_books, 20), "residual_codes are"),
        ((x, codes, books, more, more_books[..., :3].contiguous(), 20), "residual_books are"),
        ((x, codes, books, more, None, 20), "both residual_codes"),
        ((x.double(), codes, books, None, None, 20), "takes float16"),
        ((x[:, :0], codes, books, None, None, 20), "x has 0 columns"),
        ((x, codes, books, None, None, 20, torch.randn(19)), "bias are"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel.launch(*call)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_format_multiplies_with_scales_order_and_outliers(dtype):
    main, outliers = weight_of(21, 120, 4, 6, 5), weight_of(21, 10, 2, 8)
    weight = CodebookWeight(
        *main._stages[:2],
        21,
        130,
        *main._stages[2:],
        torch.rand(130).half() + 0.5,
        torch.randperm(130).short(),
        outliers,
    )
    weight.validate()
    x, bias = torch.randn(2, 3, 130).to(dtype), torch.randn(21)
    exact = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    assert error(weight.matmul(x, bias), exact) < 2 * TOLERANCE[dtype]


def test_large_books_are_warned_of_with_the_expected_speed(caplog):
    codebook_format._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        codebook_format._warn(4, 8, 0, 1, 90)
        codebook_format._warn(8, 8, 8, 1, 90)
        codebook_format._warn(6, 12, 0, 1, 90)
        assert not caplog.records
        codebook_format._warn(8, 16, 0, 1, 90)
        codebook_format._warn(8, 16, 0, 1, 90)
    (record,) = caplog.records
    assert (
        "1024 KiB" in record.getMessage() and "L2" in record.getMessage() and "times the speed" in record.getMessage()
    )


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
def test_tables_fit_where_they_are_put(capability):
    """Static shared memory of 48 KiB at most, all of it within the GPU's, and the fewest conflicts among banks."""
    for v, bits, residual_bits in [(2, 4, 0), (3, 6, 0), (4, 8, 0), (6, 12, 0), (8, 8, 8), (8, 16, 0), (5, 9, 3)]:
        for rows in (1, 16, 32):
            problem = rules.Problem(
                rows, 4096, 4096, v, bits, residual_bits, 1, int(residual_bits > 0), torch.bfloat16, capability
            )
            config = rules.rule(problem)
            found = rules.lookup(problem, config)
            assert rules.runs(found.table(problem), problem, config)
            assert found.table(problem) <= 49152
            assert (found.source == "shared") == (bits < 16)
            if (v, bits, rows) == (4, 8, 1):
                assert found.copies * 2 * 4 == 128  # no two lanes of a load meet in a bank
