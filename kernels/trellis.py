"""The bitshift trellis code: weights as overlapping windows of a ring of bits, their values computed, not stored.

A ring holds `bits` K bits for each of its places; its length is a multiple of 32. Weight n is a function of the L =
`state_bits` bits from place n on, around the ring's end where need be, the lowest bit first (QTIP, arXiv 2406.11235,
section 3; tail-biting):

    state = (ring >> K n) mod 2^L
    word = (MULTIPLIER * state + INCREMENT) mod 2^32
    value = bf16(low half) + bf16(high half),   halves of (word & MASK) ^ FLIP

Multiplication scatters the state's bits over the word; mask and flip leave a sign, two bits of an exponent and the
fraction in each half: both lie in +-[1/8, 2), and their sum is close to Gaussian. A tensor core that multiplies both
halves by the same number of x adds them without another instruction. The mask is that of bf16, which fp16 and fp32
hold as well. `evals/trellis_codes.py` compares codes.

Rings run along the outputs of a weight [out_features, in_features], one for each column. Stored: int32 [words,
in_features], bit i of a ring being bit i % 32 of word i // 32. Each column has a step, a byte c that stands for

    step(c) = (16 + c % 16) / 16 * 2^(c // 16 - 15)

with five significant bits, so that a product with a number of fp16 is exact in two bf16. Weights over the same inputs
can lie side by side: rings, steps and scales of the first, then those of the next.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from quantkit.kernels.caching import kept

MULTIPLIER, INCREMENT, MASK, FLIP = 0x9E3779B1, 0x3D4D51C4, 0x81FF81FF, 0x3F803F80
PLACES = 32
"""The length of rings is a multiple of it, so that they are whole words."""
STATE_BITS = (8, 16)
"""The fewest and the most."""


def ring_length(out_features: int) -> int:
    """Places of a ring for so many weights."""
    return -(-out_features // PLACES) * PLACES


def evaluate(states: Tensor) -> Tensor:
    """The values of states, integers [...] -> fp32 [...], before scaling."""
    words = ((states.long() * MULTIPLIER + INCREMENT) & MASK) ^ FLIP
    low = (words << 16).to(torch.int32)  # the upper half of an fp32 is a bf16
    high = (words & 0xFFFF0000).to(torch.int32)
    return low.view(torch.float32) + high.view(torch.float32)


@kept
def table(state_bits: int, device: torch.device) -> Tensor:
    """fp32 [2^state_bits]: the values of all states."""
    return evaluate(torch.arange(1 << state_bits)).to(device)


@lru_cache
def deviation(state_bits: int) -> float:
    """The root of the mean square of all values."""
    return float(table(state_bits, torch.device("cpu")).double().square().mean().sqrt())


def pack_rings(symbols: Tensor, bits: int) -> Tensor:
    """Symbols uint8 [places, columns], K bits each -> int32 [words, columns]."""
    places, columns = symbols.shape
    shifts = torch.arange(bits, device=symbols.device).view(1, bits, 1)
    stream = ((symbols.unsqueeze(1).long() >> shifts) & 1).reshape(places * bits // 32, 32, columns)
    words = (stream << torch.arange(32, device=symbols.device).view(1, 32, 1)).sum(1)
    return words.to(torch.int32)


def unpack_rings(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_rings`: int32 [words, columns] -> uint8 [places, columns]."""
    words, columns = codes.shape
    stream = (codes.unsqueeze(1) >> torch.arange(32, device=codes.device).view(1, 32, 1)) & 1
    stream = stream.reshape(words * 32 // bits, bits, columns)
    return (stream << torch.arange(bits, device=codes.device).view(1, bits, 1)).sum(1).to(torch.uint8)


def states(codes: Tensor, bits: int, state_bits: int) -> Tensor:
    """int32 [places, columns]: the state at each place of each ring of int32 [words, columns]."""
    words = len(codes)
    wide = codes.long() & 0xFFFFFFFF
    wide = wide | (wide.roll(-1, 0) << 32)  # a window begins in one word and ends in the next at most
    first = bits * torch.arange(words * 32 // bits, device=codes.device)
    windows = wide[first // 32] >> (first % 32).unsqueeze(1)
    return (windows & (1 << state_bits) - 1).to(torch.int32)


def step(codes: Tensor) -> Tensor:
    """The steps of codes, uint8 [...] -> fp32 [...]."""
    codes = codes.int()
    return torch.ldexp(1 + (codes & 15) / 16, (codes >> 4) - 15)


def nearest_step(wanted: Tensor) -> Tensor:
    """The codes, uint8 [...], of the steps that are nearest to fp32 numbers [...], in their ratio."""
    steps = step(torch.arange(256, device=wanted.device))
    return torch.bucketize(wanted, (steps[1:] * steps[:-1]).sqrt()).to(torch.uint8)


def lines(parts: Sequence[int], bits: int) -> list[int]:
    """Words of the rings of parts with so many outputs."""
    return [ring_length(part) * bits // 32 for part in parts]


def dequantized(
    codes: Tensor, scales: Tensor, scale: Tensor, bits: int, state_bits: int, parts: Sequence[int]
) -> Tensor:
    """The specification of the weight, on any device: fp32 [sum of parts, in_features], value * step * scale.

    Args:
        codes: int32 [words of all parts, in_features].
        scales: uint8 [parts, in_features], the columns' steps.
        scale: fp32 [parts], of all values.
        bits, state_bits: K and L.
        parts: outputs of each part.
    """
    values, factors = table(state_bits, codes.device), step(scales)
    found = []
    for i, rings in enumerate(codes.split(lines(parts, bits))):
        known = values[states(rings, bits, state_bits)[: parts[i]].long()]
        found.append(known * factors[i] * scale[i])
    return found[0] if len(found) == 1 else torch.cat(found)
