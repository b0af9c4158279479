"""The pyramid codebook P(D, K): integer points with D coordinates and |y_1| + ... + |y_D| = K, numbered.

    N(d, k) = N(d - 1, k) + N(d, k - 1) + N(d - 1, k - 1),    N(d, 0) = 1,  N(0, k > 0) = 0

points exist (Fischer, "A pyramid vector quantizer", IEEE Trans. IT 32(4), 1986). Coordinate by coordinate, with d left
behind the present one and k pulses not yet placed, a point is preceded by those with a smaller |v| here, and +v stands
before -v:

    number += 0                                                        v = 0
              N(d, k) + 2 (S(d, k-1) - S(d, k-|v|)) + [v < 0] N(d, k-|v|)   else,     S(d, k) = sum of N(d, j), j <= k

Numbers have as many bits as they need: they are kept as limbs of 32 bits, lowest first, in int64 tensors.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from quantkit.kernels.caching import kept

LIMB = 32


@lru_cache
def _counts(dimension: int, pulses: int) -> list[list[int]]:
    """N(d, k) for d = 0..dimension and k = 0..pulses."""
    table = [[1] + [0] * pulses]
    for _ in range(dimension):
        above, row = table[-1], [1]
        for k in range(1, pulses + 1):
            row.append(above[k] + row[k - 1] + above[k - 1])
        table.append(row)
    return table


def count(dimension: int, pulses: int) -> int:
    """N(dimension, pulses), the size of the codebook."""
    return _counts(dimension, pulses)[dimension][pulses]


def index_bits(dimension: int, pulses: int) -> int:
    """Bits of a field that holds every number: ceil(log2 N)."""
    return (count(dimension, pulses) - 1).bit_length()


def limbs(dimension: int, pulses: int) -> int:
    """Limbs of a number."""
    return max(1, -(-index_bits(dimension, pulses) // LIMB))


@kept
def _tables(dimension: int, pulses: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """N and S as limbs: int64 [dimension, pulses + 1, limbs]; one limb more than a number, for sums."""
    counts = np.array(_counts(dimension, pulses)[:dimension], dtype=object)
    sums = counts.cumsum(axis=1)
    size = limbs(dimension, pulses) + 1

    def cut(values: np.ndarray) -> Tensor:
        parts = [(values >> (LIMB * i)) & (2**LIMB - 1) for i in range(size)]
        return torch.from_numpy(np.stack(parts, axis=-1).astype(np.int64)).to(device)

    return cut(counts), cut(sums)


def _carry(values: Tensor) -> Tensor:
    """Brings every limb but the last into [0, 2^32); the last keeps the sign."""
    for i in range(values.shape[-1] - 1):
        values[..., i + 1] += values[..., i] >> LIMB
        values[..., i] &= 2**LIMB - 1
    return values


def encode(points: Tensor, pulses: int) -> Tensor:
    """Numbers of points.

    Args:
        points: integers [..., dimension], each with sum |y| = pulses.
        pulses: K.

    Returns:
        int64 [..., limbs], each limb in [0, 2^32).
    """
    dimension = points.shape[-1]
    counts, sums = _tables(dimension, pulses, points.device)
    number = torch.zeros(*points.shape[:-1], counts.shape[-1], dtype=torch.int64, device=points.device)
    left = torch.full(points.shape[:-1], pulses, dtype=torch.int64, device=points.device)
    for i in range(dimension):
        d = dimension - 1 - i
        value = points[..., i].long()
        after = left - value.abs()
        passed = counts[d, left] + 2 * (sums[d, (left - 1).clamp_min(0)] - sums[d, after])
        passed += (value < 0).unsqueeze(-1) * counts[d, after]
        number += torch.where((value != 0).unsqueeze(-1), passed, 0)
        _carry(number)
        left = after
    return number[..., :-1]


def decode(numbers: Tensor, dimension: int, pulses: int) -> Tensor:
    """The inverse of `encode`.

    Args:
        numbers: int64 [..., limbs].

    Returns:
        int16 [..., dimension]; on the meta device, where numbers have no values, on the meta device.

    Raises:
        ValueError: a number is not below N(dimension, pulses).
    """
    if numbers.is_meta:
        return numbers.new_empty(*numbers.shape[:-1], dimension, dtype=torch.int16)
    counts, sums = _tables(dimension, pulses, numbers.device)
    rest = torch.nn.functional.pad(numbers, (0, 1))
    whole = [count(dimension, pulses) >> (LIMB * i) & (2**LIMB - 1) for i in range(rest.shape[-1])]
    if bool((_sign(rest - torch.tensor(whole, device=rest.device)) >= 0).any()):
        raise ValueError(f"an index is not below {count(dimension, pulses)}, the points of P({dimension}, {pulses})")
    left = torch.full(rest.shape[:-1], pulses, dtype=torch.int64, device=rest.device)
    points = torch.zeros(*rest.shape[:-1], dimension, dtype=torch.int16, device=rest.device)
    for i in range(dimension):
        d = dimension - 1 - i
        beyond = rest - counts[d, left]  # the number among the points with v != 0
        nonzero = _sign(_carry(beyond)) >= 0
        before = sums[d, (left - 1).clamp_min(0)]
        # The largest |v| whose first point is not beyond the number, by bisection on what is left after it.
        low, high = torch.zeros_like(left), (left - 1).clamp_min(0)
        for _ in range(int(left.max()).bit_length() if left.numel() else 0):
            middle = (low + high) // 2
            fits = _sign(_carry(beyond - 2 * (before - sums[d, middle]))) >= 0
            low, high = torch.where(fits, low, (middle + 1).minimum(high)), torch.where(fits, middle, high)
        inside = _carry(beyond - 2 * (before - sums[d, high]))
        flipped = _carry(inside - counts[d, high])
        negative = _sign(flipped) >= 0
        value = torch.where(nonzero, torch.where(negative, high - left, left - high), 0)
        points[..., i] = value.to(torch.int16)
        rest = torch.where(nonzero.unsqueeze(-1), torch.where(negative.unsqueeze(-1), flipped, inside), rest)
        left = left - value.abs()
    return points


def _sign(values: Tensor) -> Tensor:
    """The sign of numbers whose limbs are carried, or differences of such: that of the highest limb that is not 0."""
    weights = 2 ** torch.arange(values.shape[-1], device=values.device)
    return (values.sign() * weights).sum(-1)
