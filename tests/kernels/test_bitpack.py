import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.kernels.bitpack import pack, planes, row_words, unpack


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize(("rows", "columns"), [(1, 33), (63, 4100), (545, 128), (7, 320), (2, 1), (3, 704)])
def test_round_trip(bits, rows, columns):
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8 if bits <= 8 else torch.int32)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, row_words(columns, bits))
    assert torch.equal(unpack(words, bits, columns), codes)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 5), columns=st.integers(1, 700), seed=st.integers(0, 10**6))
def test_round_trip_of_any_shape(bits, rows, columns, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack(pack(codes, bits), bits, columns), codes)


@pytest.mark.parametrize("bits", range(1, 17))
def test_packing_is_dense(bits):
    assert row_words(4096, bits) * 32 == 4096 * bits
    for columns in (320, 704, 4100):
        padding = row_words(columns, bits) * 32 - columns * bits
        assert 0 <= padding < 4 * 32 * len(planes(bits)), "at most one word a lane and plane"


def test_layout_is_the_documented_one():
    """k = 8 * (P * r + p) + 2 * lane + half stands in word lane * b + r at bits b * p + 16 * half."""
    for bits in (1, 2, 4, 8, 16):
        fields = 16 // bits
        for k in (0, 1, 2, 7, 8, 63, 127):
            codes = torch.zeros(1, 128, dtype=torch.uint8)
            codes[0, k] = 1
            octet, lane, half = k // 8, k % 8 // 2, k % 2
            words = pack(codes, bits)[0]
            assert words.nonzero().tolist() == [[lane * bits + octet // fields]]
            shift = bits * (octet % fields) + 16 * half
            assert words[lane * bits + octet // fields].item() & 0xFFFFFFFF == 1 << shift


def test_golden_words():
    codes = (torch.arange(128) % 8).to(torch.uint8).unsqueeze(0)
    assert pack(codes, 3)[0].tolist() == GOLDEN_3BIT
    assert planes(3) == (2, 1)
    assert planes(7) == (4, 2, 1)


# Column k holds k % 8, so every pair of a lane is (2 * lane, 2 * lane + 1): codes 0,1 / 2,3 / 4,5 / 6,7.
GOLDEN_3BIT = [0x55550000] * 2 + [-0x00005556] * 2 + [0x55550000] * 2 + [-0x00005556] * 2 + [0, 0, -1, -1]


def test_wrong_row_length_is_refused():
    with pytest.raises(ValueError, match="take 12"):
        unpack(torch.zeros(1, 11, dtype=torch.int32), 3, 128)
    with pytest.raises(ValueError, match="1 to 16"):
        planes(17)
