"""The form of integer weights on a GPU: nothing is lost, and its kernels give what the checkpoint's form gives."""

import itertools

import pytest
import torch

from quantkit.formats.int_group import IntGroupWeight
from quantkit.kernels import int_group_layout as layout
from quantkit.kernels import int_group_matmul as kernel
from quantkit.kernels import launching
from quantkit.kernels.tuning import Config

from ..helpers.products import arranged_arguments as arranged
from ..helpers.products import in_turn
from ..helpers.products import int_group_weight as weight_of
from .conftest import error

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 4e-3, torch.float32: 1e-5}
SHAPES = [(70, 256, 128), (64, 128, 32), (128, 512, 256), (65, 384, 64), (7, 384, 384), (130, 640, 1024)]


@pytest.mark.parametrize("symmetric", [True, False, "whole"])
@pytest.mark.parametrize(("bits", "shape"), itertools.product(range(1, 9), SHAPES))
def test_the_checkpoints_bytes_come_back(bits, shape, symmetric):
    weight = weight_of(bits, *shape, symmetric)
    assert layout.arranges(shape[1], shape[2])
    stream, *form = arranged(weight)
    assert stream.shape[2] == layout.words_of_block(bits, shape[2], weight.zero)
    codes, scales, zeros = layout.restored(stream, *form)
    assert torch.equal(codes, weight.codes)
    assert torch.equal(scales, weight.scales)
    assert zeros is None if symmetric is True else torch.equal(zeros, weight.zeros)


def test_words_of_three_bits_lie_where_the_docstring_says():
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, 8 * 9 + 2 * 1] = 5  # octet 9, lane 1, the lower half
    codes[0, 8 * 15 + 2 * 3 + 1] = 6  # octet 15, lane 3, the upper half
    weight = IntGroupWeight.pack(codes, torch.ones(1, 1).half(), None, 3, 128)
    words = arranged(weight)[0][0, 0, : 3 * 64 * 4].view(3, 64, 4)[:, 0]
    assert words[0].tolist() == [0, 5 << 9, 0, 0]
    assert words[1].tolist() == [0, 0, 0, -(1 << 31)]
    assert words[2].tolist() == [0, 0, 0, -(1 << 31)]


@pytest.mark.parametrize("symmetric", [True, False, "whole"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_decode_against_fp64(bits, dtype, symmetric):
    weight = weight_of(bits, 70, 256, 128, symmetric)
    x = torch.randn(5, 256).to(dtype)
    exact = x.double() @ weight.dequantize(torch.float64).T
    assert error(kernel.launch_arranged(x, *arranged(weight)), exact) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("bits", "pairs", "split_k", "block_m", "group_size"),
    in_turn([(3, 2, 1, 8), (3, 4, 2, 16), (4, 2, 8, 32)] * 2, [32, 64, 128, 256, 1024]),
)
def test_configurations_agree(group_size, bits, pairs, split_k, block_m, monkeypatch):
    monkeypatch.setattr(launching, "pairs", lambda capability, block_m: pairs)
    weight = weight_of(bits, 150, 384 if group_size != 256 else 512, group_size, False)
    x = torch.randn(9, weight.shape[1]).half()
    exact = x.double() @ weight.dequantize(torch.float64).T
    for block_n in (64, 128):
        y = kernel.launch_arranged(x, *arranged(weight), config=Config(block_m, block_n, split_k))
        assert error(y, exact) < 2e-3


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 128), (3, 128), (3, 64), (8, 32), (5, 256)])
def test_every_regime_is_the_checkpoints(bits, group_size, dtype, rows):
    """Few rows, more, and so many (40 of groups that end inside a tile) that the weight is written out."""
    weight = weight_of(bits, 70, 256, group_size, bits != 3)
    x = torch.randn(rows, 256).to(dtype)
    bias, up, down = (torch.randn(*shape).to(dtype) for shape in ((70,), (70, 4), (4, 256)))
    exact = kernel.reference(x.double(), weight.codes, weight.scales, weight.zeros, bits, group_size)
    exact = exact + bias.double() + x.double() @ down.double().T @ up.double().T
    y = kernel.launch_arranged(x, *arranged(weight), bias, up, down)
    assert error(y, exact) < 1.5 * TOLERANCE[dtype]
    assert error(kernel.reference_arranged(x, *arranged(weight), bias, up, down), exact) < 1.5 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "group_size"), [(3, 128), (3, 32), (4, 64), (8, 128)])
def test_identity_gives_the_dequantized_weight_exactly(bits, group_size, dtype):
    weight = weight_of(bits, 67, 256, group_size, True)
    expected = weight.dequantize(dtype)
    for identity in torch.eye(256, dtype=dtype).split(32)[::3]:
        columns = identity.argmax(1)
        assert torch.equal(kernel.launch_arranged(identity, *arranged(weight)).T, expected[:, columns])


def test_what_would_read_out_of_bounds_is_refused():
    weight = weight_of(3, 70, 256, 128, True)
    stream, bits, group_size, zero, rows = arranged(weight)
    x = torch.randn(2, 256)
    for arguments, message in [
        ((x[:, :128], stream, bits, group_size, zero, rows), "stream are"),
        ((x, stream, bits, group_size, zero, rows + 64), "stream are"),
        ((x, stream, bits, group_size, True, rows), "stream are"),
        ((x, stream, 4, group_size, zero, rows), "stream are"),
        ((x, stream.float(), bits, group_size, zero, rows), "stream are"),
        ((x, stream, bits, 48, zero, rows), "no such weight"),
        ((x, stream, 9, group_size, zero, rows), "no such weight"),
        ((x[:, :200], stream, bits, group_size, zero, rows), "no such weight"),
        ((x, stream, bits, group_size, zero, rows, torch.randn(3)), "bias are"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel.launch_arranged(*arguments)
