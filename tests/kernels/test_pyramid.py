"""The numbering of the pyramid codebook: a bijection, whatever the size."""

from itertools import product
from math import comb

import pytest
import torch

from quantkit.kernels.pyramid import count, decode, encode, index_bits, limbs


def closed_form(dimension, pulses):
    """Choose which j coordinates are not 0, their signs, and how the pulses fall on them."""
    if pulses == 0:
        return 1
    return sum(2**j * comb(dimension, j) * comb(pulses - 1, j - 1) for j in range(1, min(dimension, pulses) + 1))


def test_counts():
    known = {(2, 3): 12, (3, 2): 18, (8, 2): 128, (8, 4): 2816, (8, 6): 27008, (8, 8): 157184}
    known |= {(16, 8): 30316544, (16, 16): 148348809216}
    for (dimension, pulses), expected in known.items():
        assert count(dimension, pulses) == expected
    for dimension, pulses in product((1, 2, 5, 17, 64), (1, 2, 9, 40)):
        assert count(dimension, pulses) == closed_form(dimension, pulses)
        assert 2 ** (index_bits(dimension, pulses) - 1) < count(dimension, pulses) <= 2 ** index_bits(dimension, pulses)


@pytest.mark.parametrize(
    ("dimension", "pulses"), [(1, 5), (2, 1), (2, 3), (3, 2), (4, 4), (5, 6), (8, 4), (8, 6), (16, 4)]
)
def test_every_number_names_one_point(dimension, pulses):
    numbers = torch.arange(count(dimension, pulses)).unsqueeze(-1)
    points = decode(numbers, dimension, pulses)
    assert (points.abs().sum(-1) == pulses).all()
    assert len(torch.unique(points, dim=0)) == len(points)
    assert torch.equal(encode(points, pulses), numbers)


@pytest.mark.parametrize(("dimension", "pulses"), [(16, 23), (32, 21), (32, 48), (64, 42), (64, 190), (100, 300)])
def test_numbers_of_many_limbs(dimension, pulses):
    where = torch.randint(0, dimension, (200, pulses))
    points = torch.zeros(200, dimension, dtype=torch.int64).scatter_add_(1, where, torch.ones_like(where))
    points[0], points[1] = 0, 0
    points[0, 0], points[1, -1] = pulses, -pulses
    points *= torch.where(torch.rand(200, dimension) < 0.5, -1, 1)
    numbers = encode(points.view(10, 20, dimension), pulses)
    assert numbers.shape == (10, 20, limbs(dimension, pulses))
    assert torch.equal(decode(numbers, dimension, pulses).view(200, dimension).long(), points)
    exact = [sum(int(part) << 32 * i for i, part in enumerate(number)) for number in numbers.view(200, -1)]
    assert all(0 <= number < count(dimension, pulses) for number in exact)
    last = count(dimension, pulses) - 1
    ends = torch.tensor([[n >> 32 * i & 0xFFFFFFFF for i in range(limbs(dimension, pulses))] for n in (0, last)])
    assert torch.equal(encode(decode(ends, dimension, pulses), pulses), ends)


def test_numbers_beyond_the_last_are_refused():
    with pytest.raises(ValueError, match="not below 2816"):
        decode(torch.tensor([[2816]]), 8, 4)
    with pytest.raises(ValueError, match="not below"):
        decode(torch.tensor([[0, 2**31]]), 32, 21)
