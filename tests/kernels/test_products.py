"""What every product with a packed weight must do, the same for all: a new family is a row of PRODUCTS."""

import pytest
import torch

from ..helpers.products import PRODUCTS, in_turn
from .conftest import error

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 4e-3}

pytestmark = pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33])
def test_any_number_of_rows(product, rows):
    """About the ends of blocks of 8, 16 and 32, behind which another kernel begins."""
    arguments, weight = product.make(65, 128)
    x = torch.randn(rows, 128).half()
    assert error(product.launch(x, *arguments), x.double() @ weight.T) < 2e-3


@pytest.mark.parametrize(
    ("rows", "whole", "rank", "dtype"),
    in_turn(
        [
            *[(3, True, 0), (3, False, 1), (3, False, 16), (3, True, 70), (50, True, 0), (50, True, 1), (50, True, 70)],
            *[(200, True, 16), (3, True, 0)],
        ],
        [*TOLERANCE],
    ),
)
def test_bias_and_low_rank_correction(product, dtype, rows, whole, rank):
    """Which scales of the weight leave alone; a bias may have a wider type than x."""
    in_features = 256 if whole else product.columns
    arguments, weight = product.make(70, in_features)
    x, bias = torch.randn(rows, in_features).to(dtype), torch.randn(70)
    exact, up, down = x.double() @ weight.T + bias.double(), None, None
    if rank:
        bias = bias.to(dtype)
        up, down = torch.randn(70, rank).to(dtype), (torch.randn(rank, in_features) / 16).to(dtype)
        exact += x.double() @ down.double().T @ up.double().T
    assert error(product.launch(x, *arguments, bias, up, down), exact) < 1.5 * TOLERANCE[dtype]
    assert error(product.reference(x, *arguments, bias, up, down), exact) < 1.5 * TOLERANCE[dtype]


def test_split_k_adds_the_bias_once_and_gives_the_same_bits_every_time(product):
    arguments, _ = product.make(70, 640)
    x, bias = torch.randn(3, 640).half(), torch.full((70,), 1000.0).half()
    one, four, again = (product.launch(x, *arguments, bias, config=product.config(split)) for split in (1, 4, 4))
    torch.testing.assert_close(one, four, rtol=1e-3, atol=0.5)
    assert torch.equal(four, again)
    assert torch.equal(one, product.launch(x, *arguments, bias, config=product.config(1)))


def test_leading_dimensions_strides_and_no_rows(product):
    arguments, weight = product.make(40, 128)
    for x in (torch.randn(2, 3, 256)[..., ::2], torch.randn(3, 2, 128).transpose(0, 1), torch.randn(6, 300)[:, :128]):
        y = product.launch(x.half(), *arguments)
        assert y.shape == (*x.shape[:-1], 40)
        assert error(y, x.half().double() @ weight.T) < 2e-3
    assert product.launch(torch.randn(0, 128), *arguments).shape == (0, 40)
    assert product.launch(torch.randn(2, 0, 128), *arguments).shape == (2, 0, 40)


def test_is_a_proper_torch_operator(product):
    arguments, _ = product.make(16, 128)
    for x in (torch.randn(2, 128), torch.randn(2, 3, 128).half()):
        torch.library.opcheck(product.operator.default, (x, *arguments))
        extra = torch.randn(16).to(x.dtype), torch.randn(16, 4).to(x.dtype), torch.randn(4, 128).to(x.dtype)
        torch.library.opcheck(product.operator.default, (x, *arguments, *extra))


def test_compiles_into_one_graph(product):
    arguments, weight = product.make(24, 128)
    x = torch.randn(4, 128)
    compiled = torch.compile(lambda x: product.operator(x, *arguments) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), x @ weight.float().T + 1, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_the_packed_weight(product):
    """To x, the bias and the low-rank correction, as through a dense linear of the same weight."""
    arguments, weight = product.make(24, 128)
    x, bias, up, down = (torch.randn(*shape) for shape in ((2, 5, 128), (24,), (24, 4), (4, 128)))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, bias, up, down)]
    y = product.operator(leaves[0], *arguments, *leaves[1:])
    twins = [tensor.clone().requires_grad_() for tensor in (x, bias, up, down)]
    dense = torch.nn.functional.linear(twins[0], weight.float(), twins[1]) + (twins[0] @ twins[3].T) @ twins[2].T
    torch.testing.assert_close(y, dense, rtol=1e-4, atol=1e-3)
    loss = torch.randn_like(y)
    (y * loss).sum().backward()
    (dense * loss).sum().backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-4, atol=1e-3)
    alone = x.clone().requires_grad_()
    product.operator(alone, *arguments).sum().backward()
    torch.testing.assert_close(alone.grad, weight.float().sum(0).expand_as(x), rtol=1e-4, atol=1e-3)


def test_autocast_does_not_reach_inside(product):
    arguments, _ = product.make(24, 128)
    x = torch.randn(4, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = product.operator(x, *arguments)
    assert y.dtype == torch.float32
    assert torch.equal(y, product.operator(x, *arguments))
