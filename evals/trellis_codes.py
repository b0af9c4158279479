"""Why the trellis code is as it is: ways to compute values, closing rings, states and what a beam would lose.

    python -m quantkit.evals.trellis_codes [--quick] [--json FILE]

1. Ways to make a number out of a state of 16 (12) bits: mean squared error on N(0, 1) at the best scale for each, and
   the instructions a weight, sm_90, from a word of the ring to an operand of the tensor core, counted in a loop that
   does nothing else.
2. Rings against paths with free ends, by the length of the ring and of the pieces it is searched in.
3. States of an exact search, and beams that keep as many of 2^16 (each with its own history): error and sums a weight.

Samples are the same in all rows. Published ways are computed from their papers' formulas.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels import trellis, viterbi
from quantkit.quantizers.trellis import SPREAD


def _word(states: Tensor, multiplier: int, increment: int) -> Tensor:
    return (states.long() * multiplier + increment) & 0xFFFFFFFF


def _bytes(words: Tensor) -> Tensor:
    return sum((words >> shift & 255).float() for shift in (0, 8, 16, 24)) - 510  # type: ignore[return-value]


def _halves(words: Tensor) -> Tensor:
    """3INST: a sum of two fp16."""
    words = (words & 0x8FFF8FFF) ^ 0x3B603B60
    return sum((words >> shift & 0xFFFF).to(torch.int16).view(torch.float16).float() for shift in (0, 16))  # type: ignore[return-value]


def _quantiles(states: Tensor) -> Tensor:
    """A Gaussian of 2^L values in random order."""
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(0))
    return torch.special.ndtri((order.double() + 0.5) / len(states)).float()


FAMILIES: dict[str, Callable[[Tensor], Tensor]] = {
    "quantkit: two bf16, added by the tensor core": trellis.evaluate,
    "3INST: two fp16 (QTIP)": lambda states: _halves(_word(states, 89226354, 64248484)),
    "1MAD: sum of four bytes (QTIP)": lambda states: _bytes(_word(states, 34038481, 76625530)),
    "mul1: sum of four bytes, no increment": lambda states: _bytes(_word(states, 0xCBAC1FED, 0)),
    "table of 2^L quantiles": _quantiles,
}
"""Name -> values of states."""


@triton.jit
def _decode(words_ptr, table_ptr, out_ptr, COUNT: tl.constexpr, FAMILY: tl.constexpr):
    """COUNT weights (2 bits each) of every word as operands, xor-ed together so that none is left out."""
    place = tl.program_id(0) * 128 + tl.arange(0, 128)
    words = tl.load(words_ptr + place)
    found = words
    for i in tl.static_range(0, COUNT, 2):
        one, two = (words >> (2 * i)) & 0xFFFF, (words >> (2 * i + 2)) & 0xFFFF
        if FAMILY == 0:
            found ^= ((one * -1640531535 + 0x3D4D51C4) & -2113830401) ^ 0x3F803F80
            found ^= ((two * -1640531535 + 0x3D4D51C4) & -2113830401) ^ 0x3F803F80
        else:
            found ^= _pair(one, two, table_ptr, FAMILY)
        words += found & 1  # another word for every pair, as in a loop over columns
    tl.store(out_ptr + place, found)


@triton.jit
def _sum_of_bytes(words):
    total = tl.inline_asm_elementwise(
        "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [words, 0x01010101, -510], tl.int32, True, 1
    )
    return total.to(tl.float16)


@triton.jit
def _sum_of_halves(words):
    words = (words & -1879076865) ^ 0x3B603B60
    low = words.to(tl.int16).to(tl.float16, bitcast=True)
    return low + (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _pair(one, two, table_ptr, FAMILY: tl.constexpr):
    """Two weights as the halves of an operand."""
    if FAMILY == 1:
        a, b = _sum_of_halves(one * 89226354 + 64248484), _sum_of_halves(two * 89226354 + 64248484)
    elif FAMILY == 2:
        a, b = _sum_of_bytes(one * 34038481 + 76625530), _sum_of_bytes(two * 34038481 + 76625530)
    elif FAMILY == 3:
        a, b = _sum_of_bytes(one * -877912083), _sum_of_bytes(two * -877912083)
    else:
        a, b = tl.load(table_ptr + one), tl.load(table_ptr + two)
    low = a.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (b.to(tl.int16, bitcast=True).to(tl.int32) << 16)


def instructions(family: int) -> float:
    """SASS instructions of sm_90 that each further weight takes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    counts = []
    for count in (8, 16):
        source = ASTSource(
            _decode,
            {"words_ptr": "*i32", "table_ptr": "*fp16", "out_ptr": "*i32", "COUNT": "constexpr", "FAMILY": "constexpr"},
            {"COUNT": count, "FAMILY": family},
            {(i,): [["tt.divisibility", 16]] for i in range(3)},
        )
        sass = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["sass"]
        counts.append(sum(bool(re.search(r"\b[A-Z][A-Z0-9]+", line)) and "NOP" not in line for line in _code(sass)))
    return (counts[1] - counts[0]) / 8


def _code(sass: str) -> list[str]:
    """Lines that hold an instruction."""
    return [line for line in sass.splitlines() if line.rstrip().endswith(";") or re.search(r";\s*(/\*|$)", line)]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        what: the code, or how it is searched.
        state_bits, bits: L and K.
        mse: mean squared error a weight.
        cost: instructions a weight, or sums a weight.
    """

    what: str
    state_bits: int
    bits: int
    mse: float
    cost: float | None


def error(x: Tensor, values: Tensor, bits: int, spread: tuple[float, ...]) -> float:
    """The least mean squared error of x, fp32 [paths, n], over scales of the values, fp32 [2^L]."""
    unit = values / values.square().mean().sqrt()
    found = []
    for scale in spread:
        states = viterbi.search(x, unit * scale, bits)
        found.append(float((x - unit[states.long()] * scale).square().mean()))
    return min(found)


def families(x: Tensor, quick: bool) -> Iterator[Row]:
    """The first table, of x, fp32 [paths, n]: codes by their values."""
    for state_bits in (12,) if quick else (16, 12):
        states = torch.arange(1 << state_bits)
        for family, (name, values) in enumerate(FAMILIES.items()):
            for bits in (2, 3, 4):
                spread = tuple(SPREAD[bits] * factor for factor in (0.97, 1.0, 1.03))
                cost = instructions(family) if bits == 2 and state_bits == (12 if quick else 16) else None
                yield Row(name, state_bits, bits, error(x, values(states), bits, spread), cost)


def rings(x: Tensor, quick: bool) -> Iterator[Row]:
    """The second table, of x, fp32 [paths, n], as rings; the cost is in numbers searched a number."""
    state_bits = 12 if quick else 16
    for bits in (1, 2, 3, 4):
        values = trellis.table(state_bits, x.device) / trellis.deviation(state_bits) * SPREAD[bits]
        for length, pieces in ((512, (512, 256)), (2048, (2048, 512, 256))):
            paths = x.reshape(-1, length)
            free = viterbi.search(paths, values, bits)
            found = float((paths - values[free.long()]).square().mean())
            yield Row(f"free ends, {length}", state_bits, bits, found, 1.0)
            for piece in pieces:
                symbols = viterbi.encode(paths, values, bits, piece)
                states = trellis.states(trellis.pack_rings(symbols, bits), bits, state_bits)
                found = float((paths.T - values[states.long()]).square().mean())
                cost = 1 + 2 * viterbi.reach(bits) / piece
                yield Row(f"rings of {length}, pieces of {piece}", state_bits, bits, found, cost)


def beam(x: Tensor, values: Tensor, bits: int, kept_bits: int) -> Tensor:
    """Numbers for x [paths, n] from a beam of 2^kept_bits: one path for each last kept_bits bits of the history."""
    ways, count = 1 << bits, 1 << (kept_bits - bits)
    history = torch.arange(count).repeat(len(x), 1)
    cost, kept, choices = torch.zeros(len(x), count), len(values) // ways - 1, []
    for column in x.unbind(1):
        states = ((history << bits).unsqueeze(2) | torch.arange(ways)).flatten(1)
        found = values[states]
        total = cost.repeat_interleave(ways, 1) + found * (found - 2 * column.unsqueeze(1))
        cost, chosen = total.view(len(x), ways, count).min(1)
        place = chosen * count + torch.arange(count)
        choices.append((place, states.gather(1, place)))
        history = choices[-1][1] & kept
    numbers, u = torch.empty_like(x), cost.argmin(1, keepdim=True)
    for i in range(x.shape[1] - 1, -1, -1):
        place, states = choices[i]
        numbers[:, i] = values[states.gather(1, u)].squeeze(1)
        u = place.gather(1, u) >> bits
    return numbers


def searches(x: Tensor, quick: bool) -> Iterator[Row]:
    """The third table, of x, fp32 [paths, n]: ways to search; the cost is in sums a number."""
    for bits in (2, 3):
        for state_bits in (8, 10, 12) if quick else (8, 10, 12, 14, 16):
            values = trellis.table(state_bits, x.device) / trellis.deviation(state_bits) * SPREAD[bits]
            states = viterbi.search(x, values, bits)
            found = float((x - values[states.long()]).square().mean())
            yield Row(f"all of 2^{state_bits} states", state_bits, bits, found, 2.0**state_bits)
        values = trellis.table(16, x.device) / trellis.deviation(16) * SPREAD[bits]
        for kept in (8, 10) if quick else (8, 10, 12, 13):
            found = float((x[:16] - beam(x[:16], values, bits, kept)).square().mean())
            yield Row(f"a beam of 2^{kept}", 16, bits, found, 2.0**kept)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples and states")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    x = torch.randn(16 if arguments.quick else 64, 512, generator=torch.Generator().manual_seed(3))
    x = x / x.square().mean().sqrt()
    record = {}
    for title, rows in (("values", families), ("rings", rings), ("searches", searches)):
        print(f"\n| {title} | L | K | MSE | cost |\n|---|---|---|---|---|")
        found = []
        for row in rows(x, arguments.quick):
            found.append(asdict(row))
            cost = "" if row.cost is None else f"{row.cost:.2f}"
            print(f"| {row.what} | {row.state_bits} | {row.bits} | {row.mse:.5f} | {cost} |", flush=True)
        record[title] = found
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
