"""A part of a packed weight is that part of the weight; what cannot be divided is refused before anything is read."""

from itertools import pairwise

import pytest
import torch

from quantkit.core.errors import QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.codebook import CodebookWeight
from quantkit.formats.dense import DenseWeight
from quantkit.formats.low_rank import LowRankWeight
from quantkit.formats.rotated import RotatedWeight
from quantkit.formats.scaled import ScaledWeight
from quantkit.serve.sharding import divides, part
from quantkit.serve.stored import joined

from ..helpers.methods import METHODS, layer
from ..helpers.products import int_group_weight

ROWS, COLUMNS = 96, 192
BORDERS = {
    "rtn": ([0, 17, 96], [0, 64, 192]),
    "gptq-half": ([0, 17, 96], [0, 64, 192]),
    "gptq": ([0, 17, 96], [0, 64, 128, 192]),
    "pyramid": ([0, 8, 96], [0, 5, 192]),
    "pyramid-wide": ([0, 32, 96], [0, 7, 192]),
    "pyramid-in": ([0, 5, 96], [0, 16, 192]),
    "trellis": (None, [0, 7, 192]),
    "trellis-in": (None, [0, 16, 192]),
    "vptq": ([0, 3, 96], [0, 50, 192]),
    "vptq-residual": ([0, 4, 96], [0, 50, 192]),
    "vptq-outliers": ([0, 2, 96], None),
    "hadamard-rtn": ([0, 17, 96], None),
    "hadamard-gptq": (None, None),
    "hadamard-pyramid": (None, None),
    "hadamard-vptq": (None, None),
    "hadamard-trellis": (None, None),
    "low-rank-rtn": ([0, 17, 96], [0, 64, 192]),
    "low-rank-gptq": ([0, 17, 96], [0, 64, 192]),
    "sparse": ([0, 17, 96], [0, 5, 192]),
    "hadamard-low-rank-pyramid": (None, None),
}
"""Where each method's weight divides, by outputs and by inputs; None where it does not."""


@pytest.fixture(scope="module")
def weights():
    made = {}

    def get(name) -> QuantizedWeight:
        if name not in made:
            made[name] = METHODS[name].quantize(*layer(ROWS, COLUMNS))
        return made[name]

    return get


def test_each_method_has_borders():
    assert BORDERS.keys() == METHODS.keys()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_parts_are_the_parts_of_the_weight(weights, name, dim):
    weight, borders = weights(name), BORDERS[name][dim]
    if borders is None:
        with pytest.raises(ValueError, match=r"\((outputs|inputs)\)"):
            weight.cut(dim, 0, weight.shape[dim] // 3)
        return
    whole = weight.dequantize()
    for start, stop in pairwise(borders):
        own = weight.cut(dim, start, stop)
        own.validate()
        assert torch.equal(own.dequantize(), whole.narrow(dim, start, stop - start))
        blank = QuantizedWeight.empty(weight.metadata()).cut(dim, start, stop)
        assert blank.metadata() == own.metadata()
        again = QuantizedWeight.from_state(own.metadata(), own.state())
        assert torch.equal(again.dequantize(), own.dequantize())


@pytest.mark.parametrize("name", [name for name, borders in BORDERS.items() if borders[1]])
def test_products_of_row_parallel_parts_add_up(weights, name):
    weight, x = weights(name), torch.randn(3, COLUMNS)
    parts = [(weight.cut(1, *own), own) for own in pairwise(BORDERS[name][1])]
    y = sum(own.map(torch.Tensor.contiguous).matmul(x[:, start:stop]) for own, (start, stop) in parts)
    torch.testing.assert_close(y, weight.matmul(x), atol=1e-4, rtol=1e-4)


def test_scaled_and_dense():
    base = int_group_weight(3, 16, 64, 32, True)
    for weight in (ScaledWeight(base, torch.tensor([4.0])), DenseWeight(torch.randn(16, 64))):
        for dim, (start, stop) in ((0, (3, 9)), (1, (32, 64))):
            own = weight.cut(dim, start, stop)
            assert torch.equal(own.dequantize(), weight.dequantize().narrow(dim, start, stop - start))


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_integers_are_cut_at_groups_that_are_no_tiles_and_within_a_group(bits):
    weight = int_group_weight(bits, 12, 200, 40, False)
    assert torch.equal(weight.cut(1, 40, 120).dequantize(), weight.dequantize()[:, 40:120])
    assert torch.equal(weight.cut(1, 120, 200).dequantize(), weight.dequantize()[:, 120:])
    rows = int_group_weight(bits, 12, 200, 200, True)
    assert torch.equal(rows.cut(1, 33, 77).dequantize(), rows.dequantize()[:, 33:77])
    with pytest.raises(ValueError, match=r"int_group divides between groups of 40, not at 20 and 100 \(inputs\)"):
        weight.cut(1, 20, 100)


def test_vectors_with_an_order_keep_it():
    books = torch.randn(1, 16, 4).half()
    plain = CodebookWeight.pack([torch.randint(0, 16, (5, 30))], [books], 18)
    order = torch.randperm(30).short()
    weight = CodebookWeight(plain.codes, books, 18, 30, scales=torch.rand(30).half() + 1, order=order)
    for start, stop in ((0, 11), (11, 30)):
        own = weight.cut(1, start, stop)
        own.validate()
        assert torch.equal(own.dequantize(), weight.dequantize()[:, start:stop])
    assert torch.equal(weight.cut(0, 8, 18).dequantize(), weight.dequantize()[8:])


def test_rotations_are_cut_between_their_blocks():
    base, signs = int_group_weight(4, 22, 80 * 64, 64, True), torch.randint(0, 256, (640,), dtype=torch.uint8)
    weight = RotatedWeight(int_group_weight(4, 6, 67 * 64, 64, True), signs[: 67 * 8])  # 67 blocks: no C of order 268
    for start, stop in ((0, 64), (64 * 66, 64 * 67)):
        own = weight.cut(1, start, stop)
        own.validate()
        torch.testing.assert_close(own.dequantize(), weight.dequantize()[:, start:stop])
    with pytest.raises(ValueError, match="mixes all of a block of 64"):
        weight.cut(1, 0, 32)
    with pytest.raises(ValueError, match=r"mixes all of a block of 5120 \(inputs\)"):
        RotatedWeight(base, signs).cut(1, 0, 2560)


def test_corrections_keep_the_other_factor():
    base = int_group_weight(4, 16, 64, 32, True)
    weight = LowRankWeight(base, torch.randn(16, 3).half(), torch.randn(3, 64).half())
    assert weight.cut(0, 4, 8).down is weight.down
    assert weight.cut(1, 0, 32).up is weight.up


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (4, 17)])
def test_no_such_features(start, stop):
    with pytest.raises(ValueError, match="are none of 16"):
        int_group_weight(4, 16, 64, 32, True).cut(0, start, stop)


class TestPart:
    weight = int_group_weight(4, 12, 128, 32, True)

    def test_of_each_rank(self):
        whole = self.weight.dequantize()
        for rank in range(4):
            own = part("q", self.weight, (3, 128), rank, 4).dequantize()
            assert torch.equal(own, whole[3 * rank : 3 * rank + 3])
            own = part("o", self.weight, (12, 32), rank, 4).dequantize()
            assert torch.equal(own, whole[:, 32 * rank : 32 * rank + 32])
        assert part("o", self.weight, (12, 128), 2, 4) is self.weight

    def test_neighbours_hold_the_same_where_parts_are_few(self):
        starts = [part("k", self.weight, (6, 128), rank, 4).dequantize() for rank in range(4)]
        assert torch.equal(starts[0], starts[1]) and torch.equal(starts[2], starts[3])
        assert torch.equal(torch.cat(starts[1:3]), self.weight.dequantize())

    thirds = int_group_weight(4, 12, 192, 64, True)

    def test_what_cannot_be_shared_is_refused_with_what_can(self):
        blank = QuantizedWeight.empty(self.thirds.metadata())
        with pytest.raises(
            QuantkitError, match=r"down: 192 inputs cannot be shared by 4 ranks: .*groups of 64"
        ) as error:
            part("down", blank, (12, 48), 1, 4)
        assert str(error.value).endswith("a tensor_parallel_size of 1, 3, 6 or 12 would do for this layer")

    @pytest.mark.parametrize("shape", [(5, 128), (4, 128), (12, 256)])
    def test_a_weight_of_another_shape(self, shape):
        with pytest.raises(QuantkitError, match=r"q is \[12, 128\] in the checkpoint"):
            part("q", self.weight, shape, 0, 2)

    def test_divides(self):
        assert [count for count in range(1, 9) if divides(self.thirds, 1, count)] == [1, 3, 6]
        assert not divides(METHODS["trellis"].quantize(*layer(32, 64)), 0, 2)


def test_joined_lays_neighbours_side_by_side():
    one, other = int_group_weight(4, 8, 64, 32, True), int_group_weight(3, 4, 64, 32, True)
    found = joined([one, one, other, one])
    assert [weight.shape[0] for weight in found] == [16, 4, 8]
    whole = torch.cat([weight.dequantize() for weight in (one, one, other, one)])
    assert torch.equal(torch.cat([weight.dequantize() for weight in found]), whole)
