"""The trellis' Triton kernels, through the interpreter, and their assembly, against the dequantized weight."""

from itertools import product

import numpy as np
import pytest
import torch

from quantkit.formats.trellis import TrellisWeight
from quantkit.kernels import launching, trellis
from quantkit.kernels import trellis_matmul as kernel
from quantkit.kernels import trellis_matmul_triton as jit
from quantkit.kernels.tuning import Config
from quantkit.models.linear import QuantizedLinear

from ..helpers import ptx
from ..helpers.products import identity, in_turn
from ..helpers.products import trellis_product as make
from .conftest import error

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 4e-3, torch.float32: 1e-6}
DTYPES = torch.bfloat16, torch.float16, torch.bfloat16, torch.float32
OPERATOR = torch.ops.quantkit.trellis_matmul
FORMS = [(bits, state_bits) for bits in range(1, 9) for state_bits in (16, 12, 8)]
SIZES = [
    *[(1, 1, 2), (1, 33, 8), (7, 300, 1), (32, 16, 4), (33, 70, 2), (33, 144, 3), (129, 100, 5), (129, 128, 8)],
    *[(128, 128, 7), (128, 40, 6), (270, 65, 2), (270, 80, 3), (128, 512, 2)],
]
"""(out_features, in_features, bits)."""


@pytest.mark.parametrize(("bits", "state_bits", "dtype"), in_turn(FORMS, DTYPES))
def test_against_fp64(bits, state_bits, dtype):
    arguments, weight = make(70, 160, bits, state_bits)
    for rows in (5, 40) if state_bits < 16 else (5, 14, 40):
        x = torch.randn(rows, 160).to(dtype)
        y = kernel.launch(x, *arguments)
        assert y.dtype == dtype
        assert error(y, x.double() @ weight.T) < TOLERANCE[dtype]
    assert error(kernel.reference(x, *arguments), x.double() @ weight.T) < 1.5 * TOLERANCE[dtype]


@pytest.mark.parametrize(("out_features", "in_features", "bits", "dtype"), in_turn(SIZES, DTYPES))
def test_identity_gives_the_dequantized_weight_exactly(out_features, in_features, bits, dtype):
    """Windows around the rings' ends among them; few rows of x and many, of all columns in bf16."""
    arguments, weight = make(out_features, in_features, bits)
    expected = weight.to(dtype)
    for few in torch.eye(in_features, dtype=dtype).split(32)[:: max(1, in_features // 40)]:
        assert torch.equal(kernel.launch(few, *arguments).T, expected[:, few.argmax(1)])
    for rows in identity(in_features, dtype, in_features if dtype == torch.bfloat16 else 64):
        many = kernel.launch(rows.repeat(-(-40 // len(rows)), 1), *arguments)
        assert torch.equal(many[: len(rows)].T, expected[:, rows.argmax(1)])


@pytest.mark.parametrize(
    ("split_k", "config", "bits", "in_features"),
    in_turn(product([1, 5], [(8, 1), (8, 4), (16, 2), (16, 8), (32, 4)]), [2, 3], [384, 290]),
)
def test_every_configuration_agrees(bits, in_features, split_k, config):
    """Shares of unequal length and those that get no tile."""
    arguments, weight = make(100, in_features, bits)
    x = torch.randn(9, in_features).bfloat16()
    block_m, num_warps = config
    y = kernel.launch(x, *arguments, config=Config(block_m, kernel.BLOCK_N, split_k, num_warps))
    assert error(y, x.double() @ weight.T) < 4e-3


@pytest.mark.parametrize(
    ("bits", "rows", "split_k"), in_turn(2 * [(1, 1), (2, 8), (3, 2), (4, 5), (2, 9), (5, 3)], [1, 2, 3, 7])
)
def test_chunks_read_ahead(bits, rows, split_k):
    """Shares of many tiles, of one, and of none; every column's product is exactly that of the column alone."""
    arguments, weight = make(128, 768, bits)
    x = torch.randn(rows, 768).bfloat16()
    config = Config(8 if rows <= 8 else 16, kernel.BLOCK_N, split_k, 4)
    problem = kernel.Problem(rows, 128, 768, bits, 16, x.dtype)
    assert kernel.chunks(problem, config) == (4 if bits <= 4 else 2)
    assert error(kernel.launch(x, *arguments, config=config), x.double() @ weight.T) < 4e-3
    columns = torch.arange(rows) * 131 % 768
    one = torch.zeros(rows, 768).bfloat16()
    one[torch.arange(rows), columns] = 1
    assert torch.equal(kernel.launch(one, *arguments, config=config).T, weight[:, columns].bfloat16())


@pytest.mark.parametrize(("parts", "bits"), [([128, 256, 70], 3), ([256, 128], 2), ([384, 1], 3)])
def test_weights_side_by_side(parts, bits):
    """Each keeps its rings, steps and scale: exactly the outputs that it has alone, whichever kernel runs."""
    arguments, weight = make(parts, 96, bits)
    codes, scales, scale, *form, _ = arguments
    pieces = zip(parts, codes.split(trellis.lines(parts, bits)), scales.split(1), scale.split(1), strict=True)
    alone = [(own, steps, factor, *form, [part]) for part, own, steps, factor in pieces]
    for rows in (3, 40):
        x = torch.randn(rows, 96).bfloat16()
        y = kernel.launch(x, *arguments)
        assert error(y, x.double() @ weight.T) < 4e-3
        assert torch.equal(y, torch.cat([kernel.launch(x, *one) for one in alone], dim=1))
        assert torch.equal(kernel.reference(x, *arguments), torch.cat([kernel.reference(x, *one) for one in alone], 1))
    torch.library.opcheck(OPERATOR.default, (torch.randn(2, 96), *arguments))


@pytest.mark.parametrize("rows", [1, 9])
def test_shares_hold_the_rows_that_exist_alone(rows, monkeypatch):
    arguments, weight = make(130, 512)
    x, taken, empty = torch.randn(rows, 512).half(), [], torch.empty

    def keep(*size, **how):
        taken.append(empty(*size, **how))
        return taken[-1]

    monkeypatch.setattr(torch, "empty", keep)
    y = kernel.launch(x, *arguments, config=Config(8, 128, 2, 4))
    assert error(y, x.double() @ weight.T) < 2e-3
    partial = next(tensor for tensor in taken if tensor.dtype == torch.float32)
    written = ~partial.view(2, -(-rows // 8), 2, 8, 128).isnan()  # rows of W, of x, shares
    assert torch.equal(written.any(-1), written.all(-1))
    assert int(written.all(-1).sum()) == 2 * 2 * rows


def test_what_does_not_begin_with_a_word(monkeypatch):
    """Steps and x are read by words: moved for a launch, and steps once where a weight is prepared."""
    (codes, scales, scale, *form), _ = make(40, 128)
    moved = torch.zeros(129, dtype=torch.uint8)[1:].view(1, 128).copy_(scales)
    x = torch.randn(3, 144).half()[:, 1:129]
    assert moved.data_ptr() % 4 and x.data_ptr() % 4
    wanted, given, fused = kernel.launch(x.contiguous(), codes, scales, scale, *form), [], kernel._fused

    def seen(rows, codes, scales, *others):
        given.extend([rows, scales])
        fused(rows, codes, scales, *others)

    monkeypatch.setattr(kernel, "_fused", seen)
    assert torch.equal(kernel.launch(x, codes, moved, scale, *form), wanted)
    assert not any(tensor.data_ptr() % 4 for tensor in given)
    linear = QuantizedLinear(TrellisWeight(codes, moved, scale, *form))
    linear.packed.prepare()
    assert linear.scales.data_ptr() % 4 == 0 and torch.equal(linear.scales, scales)
    assert linear.packed.scales is linear.scales


def test_what_would_read_out_of_bounds_is_refused():
    (codes, scales, scale, *form), _ = make(40, 128, 3)
    x, up, down = torch.randn(2, 128), torch.randn(40, 4), torch.randn(4, 128)
    for call, message in [
        ((x[:, :0], codes[:, :0], scales, scale, *form), "0 columns"),
        ((torch.randn(2, 129), codes, scales, scale, *form), "codes are"),
        ((x, codes, scales, scale, 4, 16, [40]), "codes are"),
        ((x, codes, scales, scale, 3, 16, [65]), "codes are"),
        ((x, codes, scales, scale, 3, 16, [0]), "has rows"),
        ((x, codes, scales, scale, 0, 16, [40]), "bits=0"),
        ((x, codes, scales, scale, 9, 16, [40]), "bits=9"),
        ((x, codes, scales, scale, 3, 7, [40]), "state_bits=7"),
        ((x, codes, scales, scale, 3, 17, [40]), "state_bits=17"),
        ((x, codes.long(), scales, scale, *form), "codes are"),
        ((x, codes[:-1], scales, scale, *form), "codes are"),
        ((x, codes[0], scales, scale, *form), "codes are"),
        ((x, codes.T.contiguous().T, scales, scale, *form), "codes are"),
        ((x, codes, scales, scale.half(), *form), "scale are"),
        ((x, codes, scales, scale[0], *form), "scale are"),
        ((x, codes, scales[0], scale, *form), "scales are"),
        ((x, codes, scales.int(), scale, *form), "scales are"),
        ((x, codes, scales, scale, 3, 16, []), "has rows"),
        ((x, codes, scales, scale, 3, 16, [-128, 168]), "has rows"),
        ((x, codes, scales, scale, 3, 16, [8, 32]), "multiples of 128"),
        ((x.double(), codes, scales, scale, *form), "takes float16"),
        ((x, codes, scales, scale, *form, torch.randn(39)), "bias are"),
        ((x, codes, scales, scale, *form, None, up, down[:, :100]), "down are"),
        ((x, codes, scales, scale, *form, None, up.half(), down), "up are"),
        ((x, codes, scales, scale, *form, None, up, None), "both up and down"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel.launch(*call)


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 103, 120])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rules_fill_a_gpu_and_leave_no_row_out(dtype, capability):
    for size in ((4096, 4096), (14336, 4096), (4096, 14336), (256, 128), (300, 100)):
        for rows in (1, 8, 16, 32):
            problem = kernel.Problem(rows, *size, 2, 16, dtype, capability)
            config = kernel.rule(problem)
            programs = -(-size[0] // config.block_n) * -(-rows // config.block_m) * config.split_k
            if size[0] * size[1] >= 4096 * 4096:
                assert programs * config.num_warps >= 7 * 132
            fewest = 2 if config.block_m == 8 else 4
            assert config.split_k == 1 or size[1] // 128 // config.split_k >= fewest
            assert config.num_warps * 32 * kernel.registers(problem, config) <= 65536
    assert launching.machine(torch.zeros(1)) == {"ASM": False, "INTERPRETED": True}


@pytest.mark.parametrize(("bits", "state_bits"), FORMS)
def test_the_assembly_of_a_run_gives_its_pairs(bits, state_bits):
    """Runs of every state, from words on, against the specification's halves."""
    ring = torch.randint(-(2**31), 2**31, (16 * bits, 2**12)).int()
    states = trellis.states(ring, bits, state_bits).view(-1, 16, 2**12)[::2].long()  # those that begin with a word
    count = jit.words_of_run(bits, state_bits, False)
    words = [ring.roll(-i, 0)[::bits].flatten().numpy().view(np.uint32) for i in range(count)]
    found = ptx.run(jit.run_text(bits, state_bits), words, 16, {})
    pairs = (states * trellis.MULTIPLIER + trellis.INCREMENT) & trellis.MASK ^ trellis.FLIP
    assert torch.equal(torch.from_numpy(np.stack(found).astype(np.int64)), pairs.transpose(0, 1).flatten(1))


@pytest.mark.parametrize(("dtype", "parts"), [(torch.float16, 2), (torch.float32, 3)])
def test_parts_of_x_are_exact(dtype, parts):
    """Every fp16 times a step, and as many fp32."""
    bits = torch.arange(2**16)
    values = bits.to(torch.int16).view(torch.float16).float() if parts == 2 else torch.randn(2**16) * 2.0 ** (bits % 99)
    values = values[values.isfinite()]
    if parts == 2:
        values = values * trellis.step(bits[: len(values)] % 256)
    words = ptx.run(jit.split_text(parts), [values.numpy()], parts, {})
    halves = [torch.from_numpy((word << np.uint32(16)).view(np.float32).copy()) for word in words]
    assert all((word >> np.uint32(16) == word & np.uint32(0xFFFF)).all() for word in words)
    assert torch.equal(sum(half.double() for half in halves), values.double())


@pytest.mark.parametrize(
    ("bits", "state_bits", "dtype"),
    in_turn([(1, 16), (2, 16), (3, 16), (7, 16), (8, 16), (3, 12), (4, 8), (2, 16), (3, 12)], [*TOLERANCE]),
)
def test_kernels_with_their_assembly_give_the_same(bits, state_bits, dtype, monkeypatch):
    arguments, _ = make(150, 160, bits, state_bits)
    few, many = torch.randn(5, 160).to(dtype), torch.randn(40, 160).to(dtype)
    plain = kernel.launch(few, *arguments), kernel.launch(many, *arguments)
    ptx.Machine().install(monkeypatch)
    monkeypatch.setattr(launching, "machine", lambda tensor: {"ASM": True, "INTERPRETED": True})
    assert torch.equal(kernel.launch(few, *arguments), plain[0])
    assert torch.equal(kernel.launch(many, *arguments), plain[1])
