"""Small products of every family against fp64, for `self_check`: even and odd shapes, both half types, 1 and 17 rows.

Each function yields one `Case` after the other; where that was not done before it compiles three to a dozen kernels, at
0.5 to 2.5 s each. An error is the largest of any element, in units of the root mean square of all, so that one wrong
element in thousands is seen.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import (
    codebook_matmul,
    hadamard,
    int_group_layout,
    int_group_matmul,
    kv_attention,
    pyramid,
    pyramid_matmul,
    trellis,
    trellis_matmul,
    viterbi,
)
from quantkit.kernels.bitpack import pack
from quantkit.kernels.self_check import Case

HALF, BRAIN = torch.float16, torch.bfloat16
MOST = {HALF: 5e-3, BRAIN: 4e-2}
"""Largest error by the inputs' type: of numbers up to five times their mean square, rounded two or three times."""
EVEN, ODD = (256, 1024), (131, 331)
"""(out_features, in_features): whole tiles in two shares of K, and neither a whole tile nor a pair."""
PROBLEMS = ((EVEN, BRAIN, 1), (EVEN, HALF, 17), (ODD, BRAIN, 17), (ODD, HALF, 1))
"""(shape, type, rows): each pair of values of two of them once."""
MANY = (ODD, HALF, 250)
"""So many rows that the weight is written out, and torch multiplies."""
_NAMES = {HALF: "fp16", BRAIN: "bf16"}
_INT_GROUP = int_group_matmul.launch, int_group_matmul.dequantized
_INT_GROUP_ARRANGED = int_group_matmul.launch_arranged, int_group_matmul.dequantized_arranged
_TRELLIS = trellis_matmul.launch, trellis_matmul.dequantized
_CODEBOOK = codebook_matmul.launch, codebook_matmul.dequantized
_PYRAMID = pyramid_matmul.launch, pyramid_matmul.dequantized
_TABLE = pyramid_matmul.table_launch, pyramid_matmul.dequantized_table


class _Random:
    """Numbers from a generator of its own, on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator("cpu").manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cpu", dtype=torch.float32).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device="cpu", dtype=torch.float32).to(self.device)

    def codes(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device="cpu").to(self.device)


def _off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.square().mean().sqrt())


def _product(
    name: str, problem: Any, random: _Random, ways: tuple[Callable, Callable], weight: tuple, *known: int
) -> Case:
    """A weight's product by the first of `ways`; the second dequantizes it, and takes `known` too."""
    (N, K), dtype, rows = problem
    x = random.normal(rows, K).to(dtype)
    exact = x.double() @ ways[1](*weight, *known).double().T
    found = ways[0](x, *weight)
    return Case(f"{name}, {N} x {K}, {rows} rows in {_NAMES[dtype]}", _off(found, exact), MOST[dtype])


def _int_group(device: torch.device) -> Iterator[Case]:
    """All kernels of few rows; 2, 3 and 8 bits as well as 4."""
    random = _Random(device)
    for problem, bits, group_size in (
        *((problem, 4, 128) for problem in (*PROBLEMS, MANY, (EVEN, BRAIN, 64))),
        *((PROBLEMS[0], bits, 128) for bits in (2, 3, 8)),
        (PROBLEMS[1], 3, 64),
    ):
        N, K = problem[0]
        codes = pack(random.codes(0, 1 << bits, N, K).int(), bits)
        groups = -(-K // group_size), N
        scales, zeros = (random.uniform(*groups) + 0.5).half(), (random.uniform(*groups) * 2**bits).half()
        weight = codes, scales, None if bits == 3 else zeros, bits, group_size
        yield _product(f"int{bits} g{group_size}", problem, random, _INT_GROUP, weight, K)


def _int_group_arranged(device: torch.device) -> Iterator[Case]:
    """The form that a GPU holds, which has whole tiles alone."""
    random = _Random(device)
    N, K = EVEN
    for bits, group_size, dtype, rows in (
        (4, 128, BRAIN, 1),
        (3, 64, HALF, 17),
        (3, 128, BRAIN, 1),
        (2, 128, HALF, 250),
    ):
        codes = pack(random.codes(0, 1 << bits, N, K).int(), bits)
        groups = K // group_size, N
        scales, zeros = (random.uniform(*groups) + 0.5).half(), (random.uniform(*groups) * 2**bits).half()
        stream = int_group_layout.arranged(codes, scales, zeros, bits, group_size)
        weight = stream, bits, group_size, int_group_layout.STORED, N
        yield _product(f"int{bits} g{group_size}", (EVEN, dtype, rows), random, _INT_GROUP_ARRANGED, weight, K)


def _trellis(device: torch.device) -> Iterator[Case]:
    """2 bits, and 3 and 4."""
    random = _Random(device)
    for problem, bits in (*((problem, 2) for problem in (*PROBLEMS, MANY)), (PROBLEMS[0], 3), (PROBLEMS[0], 4)):
        N, K = problem[0]
        codes = random.codes(-(2**31), 2**31, sum(trellis.lines([N], bits)), K).int()
        scales = random.codes(208, 256, 1, K).to(torch.uint8)
        weight = codes, scales, random.uniform(1) + 0.1, bits, 16, [N]
        yield _product(f"trellis K={bits}", problem, random, _TRELLIS, weight, K)


def _codebook(device: torch.device) -> Iterator[Case]:
    """Vectors of 4 from 256, which lie in several copies, and two codebooks that are added."""
    random = _Random(device)
    for problem, v, bits, more in (*((problem, 4, 8, 0) for problem in (*PROBLEMS, MANY)), (PROBLEMS[0], 8, 8, 8)):
        N, K = problem[0]
        stages: list[Tensor | None] = []
        for width in (bits, more):
            codes = pack(random.codes(0, 1 << width, -(-N // v), K).int(), width) if width else None
            stages += [codes, random.normal(1, 1 << width, v).half() if width else None]
        name = f"codebook v={v} {bits}{f'+{more}' if more else ''} bits"
        yield _product(name, problem, random, _CODEBOOK, (*stages, N), K)


def _pyramid(device: torch.device) -> Iterator[Case]:
    """Points as integers of 4 bits with a factor a group of 32."""
    random = _Random(device)
    for problem in (*PROBLEMS, MANY):
        N, K = problem[0]
        factors = (random.uniform(-(-N // 32), K) / 2 + 0.01).half()
        weight = *pyramid_matmul.transcode(random.codes(-8, 8, len(factors), K, 32), factors, 4, N), 4, 32
        yield _product("pyramid integers", problem, random, _PYRAMID, weight, K)


def _pyramid_table(device: torch.device) -> Iterator[Case]:
    """Points of 8 with 6 pulses, and a gain of one bit."""
    random = _Random(device)
    levels = torch.tensor([0.7, 1.3], device=device, dtype=HALF)
    index_bits = pyramid.index_bits(8, 6)
    table = pyramid_matmul.point_table(6, device)
    for problem in (*PROBLEMS, MANY):
        N, K = problem[0]
        fields = random.codes(0, pyramid.count(8, 6), -(-N // 8), K) | random.codes(0, 2, -(-N // 8), K) << index_bits
        scales = pyramid_matmul.lane_order((random.uniform(K) + 0.5).half())
        weight = pack(fields.int(), index_bits + 1), scales, pyramid_matmul.gain_table(levels), table, index_bits + 1, N
        yield _product("pyramid table", problem, random, _TABLE, weight, K)


def _rotation(device: torch.device) -> Iterator[Case]:
    """A block of a power of two, one with a core, and many blocks; forth and back."""
    random = _Random(device)
    for n, dtype, rows, inverse in (
        *((4096, BRAIN, 1, False), (4096, HALF, 17, True), (320, BRAIN, 17, True), (320, HALF, 1, False)),
        *((1376, BRAIN, 17, False), (1376, HALF, 1, True)),
    ):
        x, signs = random.normal(rows, n).to(dtype), hadamard.random_signs(n, 0).to(device)
        found, exact = hadamard.launch(x, signs, inverse), hadamard.reference(x.double(), signs, inverse)
        yield Case(f"rotation of {n}, {rows} rows in {_NAMES[dtype]}", _off(found, exact), MOST[dtype])


def _attention(device: torch.device) -> Iterator[Case]:
    """4 and 2 bits, with and without corrections, one query of a head and five."""
    random = _Random(device)
    for bits, size, rank, rows, dtype in ((4, 128, 0, 1, BRAIN), (2, 64, 4, 5, HALF), (2, 128, 4, 1, HALF)):
        tokens, heads = 256, (1, 2)
        k, v = (random.codes(0, 256, *heads, tokens, size * bits // 8).to(torch.uint8) for _ in "kv")
        step = 2.0**-bits
        k_grid = (step * (random.uniform(*heads, 4, size) + 0.5)).half(), (random.uniform(*heads, 4, size) - 1).half()
        shape = *heads, tokens, size // 64
        v_grid = (step * (random.uniform(*shape) + 0.5)).half(), (random.uniform(*shape) - 1).half()
        packed = kv_attention.Packed(k, *k_grid, v, *v_grid, bits, bits)
        if rank:
            packed = packed._replace(
                down=(random.uniform(*heads, size, rank) - 0.5).half(), up=random.normal(*heads, tokens, rank).half()
            )
        buffer = kv_attention.Plain(*(random.normal(*heads, 37, size).half() for _ in "kv"))
        q = random.normal(*heads, rows, size).to(dtype)
        found = kv_attention.packed_attention(q, packed, size**-0.5, buffer, splits=2)
        keys = _decoded(k, bits) * k_grid[0].repeat_interleave(64, 2) + k_grid[1].repeat_interleave(64, 2)
        if packed.up is not None and packed.down is not None:
            keys = keys + packed.up.double() @ packed.down.double().mT
        values = _decoded(v, bits) * v_grid[0].repeat_interleave(64, 3) + v_grid[1].repeat_interleave(64, 3)
        keys, values = (torch.cat([a, b.double()], 2) for a, b in zip((keys, values), buffer, strict=True))
        exact = (q.double() @ keys.mT * size**-0.5).softmax(-1) @ values
        name = f"attention on {bits} bits, {size} channels, rank {rank}, {rows} queries in {_NAMES[dtype]}"
        yield Case(name, _off(found, exact), MOST[BRAIN])  # queries and probabilities are rounded, and sums are small


def _decoded(packed: Tensor, bits: int) -> Tensor:
    """Codes of 2 or 4 bits as fp64: field f of word w belongs to channel f W + w."""
    words = packed.view(torch.int16).long() & 0xFFFF
    shifts = bits * torch.arange(16 // bits, device=packed.device).unsqueeze(1)
    return (words.unsqueeze(-2) >> shifts & (1 << bits) - 1).flatten(-2).double()


def _search(device: torch.device) -> Iterator[Case]:
    """Free paths and paths between given ends: valid ones, and as near as the reference's."""
    from quantkit.kernels import viterbi_triton  # Triton exists on Linux alone

    random = _Random(device)
    for state_bits, bits, steps in ((12, 2, 40), (10, 3, 33), (8, 4, 24)):
        values = trellis.table(state_bits, device) / trellis.deviation(state_bits)
        count = len(values) >> bits
        x, ends = random.normal(4, steps), random.codes(0, count, 2, 4)
        free = torch.full_like(ends[0], viterbi.FREE)
        even = torch.arange(4, device=device) % 2 == 0
        first, last = torch.where(even, free, ends[0]), torch.where(even.roll(1, 0), ends[1], free)
        found, wanted = (way(x, values, bits, first, last) for way in (viterbi_triton.search, viterbi.reference))
        costs = [(x.double() - values.double()[states.long()]).square().sum(1) for states in (found, wanted)]
        follow = bool((found[:, 1:] >> bits == found[:, :-1] & count - 1).all())
        begin = bool(((first < 0) | (found[:, 0] >> bits == first)).all())
        end = bool(((last < 0) | (found[:, -1] & count - 1 == last)).all())
        error = float((costs[0] / costs[1] - 1).abs().max()) if follow and begin and end else math.inf
        yield Case(f"search of 2^{state_bits} states at {bits} bits", error, 1e-4)


def _experts(device: torch.device, trellises: bool) -> Iterator[Case]:
    """Some experts out of a few, in the form of files and in that of a GPU; two rows with two choices each, and one."""
    random = _Random(device)
    chosen, (N, K), experts = torch.tensor([2, 0, 1, 2], device=device), EVEN, 3
    for bits, dtype, rows, arranged in ((3, BRAIN, 2, False), (4, HALF, 1, True), (2, BRAIN, 2, True)):
        x = random.normal(rows, K).to(dtype)
        if trellises:
            weight: Any = (
                random.codes(-(2**31), 2**31, experts, trellis.ring_length(N) * bits // 32, K).int(),
                random.codes(200, 256, experts, 1, K).to(torch.uint8), random.uniform(experts, 1) + 0.5, bits, 16, N,
            )  # fmt: skip
            ways: tuple[Callable, Callable] = trellis_matmul.launch_experts, trellis_matmul.reference_experts
        else:
            codes = pack(random.codes(0, 1 << bits, experts * N, K).int(), bits).view(experts, N, -1)
            scales = (random.uniform(experts, K // 128, N) + 0.5).half()
            streams = [int_group_layout.arranged(c, s, None, bits, 128) for c, s in zip(codes, scales, strict=True)]
            weight = (torch.stack(streams), None) if arranged else (codes, scales)
            weight = *weight, None, bits, 128, N, False
            ways = int_group_matmul.launch_experts, int_group_matmul.reference_experts
        found, exact = ways[0](x, chosen, *weight), ways[1](x.float(), chosen, *weight)
        form = "trellis codes" if trellises else f"integers, {'tiles' if arranged else 'rows'}"
        name = f"experts of {bits} bits, {form}, {rows} rows in {_NAMES[dtype]}"
        yield Case(name, _off(found, exact.double()), MOST[dtype])


FAMILIES = {
    "int_group_matmul": _int_group,
    "int_group_arranged_matmul": _int_group_arranged,
    "trellis_matmul": _trellis,
    "int_group_experts": partial(_experts, trellises=False),
    "trellis_experts": partial(_experts, trellises=True),
    "codebook_matmul": _codebook,
    "pyramid_matmul": _pyramid,
    "pyramid_table_matmul": _pyramid_table,
    "rotate": _rotation,
    "kv_attention": _attention,
    "viterbi_search": _search,
}
