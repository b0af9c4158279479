"""Paths through the trellis: the specification against all paths, both fast ways against it, and rings of pieces."""

import itertools
import logging
import sys

import pytest
import torch

from quantkit.kernels import trellis, viterbi, viterbi_numba, viterbi_triton
from quantkit.kernels.viterbi import FREE, PIECE, between, encode, reference, search
from quantkit.quantizers.trellis import SPREAD

CPU = torch.device("cpu")


def compiled(x, values, bits, first, last, threads=1):
    arrays = (tensor.numpy() for tensor in (x, values))
    return torch.from_numpy(viterbi_numba.search(*arrays, bits, first.numpy(), last.numpy(), threads))


WAYS = {"reference": reference, "numba": compiled, "triton": viterbi_triton.search}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def values_of(state_bits, bits=None):
    spread = 1.0 if bits is None else SPREAD[bits]
    return trellis.table(state_bits, CPU) / trellis.deviation(state_bits) * spread


def costs(x, values, states):
    return (x.double() - values.double()[states.long()]).square().sum(1)


def ends(count, paths=4):
    """All four kinds of paths: free, with a first ending, with a last one, with both."""
    first, last = torch.randint(count, (2, paths))
    return first.where(torch.arange(paths) % 2 > 0, FREE), last.where(torch.arange(paths) % 4 > 1, FREE)


def assert_paths(states, values, bits, first, last):
    count = len(values) >> bits
    assert states.dtype == torch.int32
    assert int(states.min()) >= 0 and int(states.max()) < len(values)
    assert torch.equal(states[:, 1:] >> bits, states[:, :-1] & count - 1), "a state follows from the one before"
    assert bool(((first < 0) | (states[:, 0] >> bits == first)).all())
    assert bool(((last < 0) | (states[:, -1] & count - 1 == last)).all())


def brute_force(x, values, bits, first, last):
    """The least cost of one path, fp64: all that there are."""
    count, best = len(values) >> bits, torch.inf
    starts = range(len(values)) if first < 0 else range(int(first) << bits, int(first) + 1 << bits)
    starts = torch.tensor([list(starts)]).T
    for symbols in itertools.product(range(1 << bits), repeat=len(x) - 1):
        states = [starts]
        for symbol in symbols:
            states.append(((states[-1] & count - 1) << bits) + symbol)
        paths = torch.cat(states, 1)
        paths = paths if last < 0 else paths[paths[:, -1] & count - 1 == last]
        if len(paths):
            best = min(best, float(costs(x, values, paths).min()))
    return best


@every_way
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_no_path_is_nearer(way, bits):
    values = torch.randn(64)
    for steps in (3, 4):
        x = torch.randn(8, steps)
        first = torch.tensor([FREE, FREE, 5, 0, FREE, FREE, 7, 2])
        last = torch.tensor([FREE, 3, FREE, FREE, 7, FREE, FREE, FREE])
        if bits == 3:  # of 6 bits, so that any last ending can be reached from any first
            last[6:] = torch.tensor([1, 6])
        states = way(x, values, bits, first, last)
        assert_paths(states, values, bits, first, last)
        for i, cost in enumerate(costs(x, values, states).tolist()):
            assert cost == pytest.approx(brute_force(x[i], values, bits, first[i], last[i]), rel=1e-5)


def assert_as_near(way, state_bits, bits, steps):
    values = values_of(state_bits, bits)
    x, (first, last) = torch.randn(4, steps), ends(len(values) >> bits)
    states = way(x, values, bits, first, last)
    assert_paths(states, values, bits, first, last)
    specified = costs(x, values, reference(x, values, bits, first, last))
    torch.testing.assert_close(costs(x, values, states), specified, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_numba_finds_paths_as_near(bits):
    assert_as_near(compiled, 16, bits, 18 if bits == 1 else 9)
    if bits in (1, 2, 3, 4, 6):  # a compiled search each
        assert_as_near(compiled, 12, bits, 150)


@pytest.mark.parametrize(
    ("state_bits", "bits", "steps"),
    [
        *[(8, 1, 70), (8, 2, 70), (8, 3, 40), (8, 4, 35), (9, 3, 40), (10, 5, 10), (10, 2, 40), (12, 6, 6)],
        *[(14, 7, 4), (16, 8, 2), (16, 1, 16), (16, 2, 8), (16, 4, 4)],
    ],
)
def test_the_kernel_finds_paths_as_near(state_bits, bits, steps):
    """Several blocks of endings, and ways that are not all unrolled, among them."""
    assert_as_near(viterbi_triton.search, state_bits, bits, steps)


def test_launches_of_the_kernel_fit_a_multiprocessor():
    for bits, state_bits in itertools.product(range(1, 9), range(8, 17)):
        if 2 * bits > state_bits:
            continue
        constants, options = viterbi_triton.sizes(bits, 1 << state_bits)
        assert constants["COUNT"] % constants["BLOCK"] == 0 == 2**bits % constants["UNROLL"]
        assert constants["BLOCK"] >= max(2**bits, 32 * options["num_warps"] // 2)
        assert options["num_warps"] * 32 * options["maxnreg"] <= 65536
        assert 2**16 % options["num_warps"] == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@every_way
def test_no_number_leads_out_of_bounds(way):
    values = values_of(8)
    x = torch.randn(3, 40)
    x[0, 5], x[1, 7], x[2] = torch.nan, torch.inf, -torch.inf
    states = way(x, values, 2, *ends(64, 3))
    assert int(states.min()) >= 0 and int(states.max()) < 256


@every_way
def test_the_first_of_equal_ways_is_taken(way):
    free = torch.full((1,), FREE)
    states = way(torch.zeros(1, 20), torch.ones(256), 2, free, free)
    assert bool((states == 0).all())


@pytest.mark.parametrize("way", [reference, viterbi_triton.search], ids=["reference", "triton"])
def test_batches_that_memory_splits_give_the_same(way, monkeypatch):
    monkeypatch.setattr(viterbi, "_search", way)
    values, x = values_of(8), torch.randn(5, 8)
    first, last = ends(64, 5)
    whole = search(x, values, 2, first, last)
    assert torch.equal(whole, way(x, values, 2, first, last))
    for paths in (1, 3):
        monkeypatch.setattr(viterbi, "_BYTES", paths * 8 * 64)
        assert torch.equal(search(x, values, 2, first, last), whole)
    assert torch.equal(search(x[:, ::2], values, 2), search(x[:, ::2].clone(), values, 2))
    assert torch.equal(search(x, values, 2, first.int(), None), search(x, values, 2, first))


def test_numba_gives_the_same_in_batches_and_threads(monkeypatch):
    values, x = values_of(12), torch.randn(9, 100)
    first, last = ends(1024, 9)
    whole = search(x, values, 2, first, last)
    assert torch.equal(whole, search(x, values, 2, first, last))
    monkeypatch.setattr(viterbi, "_BYTES", 1)
    assert torch.equal(whole, search(x, values, 2, first, last))
    assert torch.equal(whole, compiled(x, values, 2, first, last, threads=3))


def test_without_numba_torch_searches_and_says_so_once(monkeypatch, caplog):
    values, x = values_of(8), torch.randn(3, 40)
    first, last = ends(64, 3)
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it now fails
    monkeypatch.delitem(sys.modules, viterbi_numba.__name__)
    viterbi.has_numba.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            found = [search(x, values, 2, first, last) for _ in range(2)]
    finally:
        viterbi.has_numba.cache_clear()
    assert [record.name for record in caplog.records] == [viterbi.__name__]
    assert "pip install numba" in caplog.text
    assert all(torch.equal(states, reference(x, values, 2, first, last)) for states in found)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_pieces_of_rings(bits):
    """In the order of places the first bits of a state are those of the place itself."""
    values, count = values_of(12), 1 << 12 - bits
    x, (above, below) = torch.randn(4, 50), ends(count)
    states = between(x, values, bits, above, below)
    assert torch.equal(states[:, :-1] >> bits, states[:, 1:] & count - 1)
    assert bool(((above < 0) | (states[:, -1] >> bits == above)).all())
    assert bool(((below < 0) | (states[:, 0] & count - 1 == below)).all())
    free = between(x, values, bits)
    assert bool((costs(x, values, free) <= costs(x, values, states) * (1 + 1e-5)).all())
    assert torch.equal(free[2:], between(x[2:], values, bits, None, torch.full((2,), FREE)))


def loss(x, values, symbols, bits):
    """Of rings, the mean squared error over numbers, by the codes as they are stored."""
    codes = trellis.pack_rings(symbols, bits)
    states = trellis.states(codes, bits, (len(values) - 1).bit_length())
    count = len(values) >> bits
    assert torch.equal(trellis.unpack_rings(codes, bits), symbols)
    assert torch.equal(states & (1 << bits) - 1, symbols.int())
    assert torch.equal(states.roll(-1, 0) & count - 1, states >> bits), (
        "windows that overlap, around the ring's end too"
    )
    return float((x - values[states[: x.shape[1]].long()].T).square().mean())


@pytest.mark.parametrize("bits", range(1, 9))
def test_rings_are_windows_of_what_is_stored(bits):
    values = values_of(12 if bits <= 6 else 16, bits)
    steps = 90 if bits < 7 else 40  # no whole number of words
    x = torch.randn(3, steps)
    symbols = encode(x, values, bits, 32)
    assert symbols.dtype == torch.uint8
    assert symbols.shape == (trellis.ring_length(steps), 3)
    assert loss(x, values, symbols, bits) < (0, 0.35, 0.12, 0.04, 0.015, 0.004, 0.002, 0.001, 0.001)[bits]


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 100, 1000])
def test_rings_of_any_length(n):
    """Shorter than what is looked at around a cut, than a piece, and no multiple of one."""
    values, x = values_of(12, 2), torch.randn(5, n)
    for piece in (1, 32, 100, PIECE):
        _, pieces = viterbi._cuts(trellis.ring_length(n), 2, piece, torch.device("cpu"))
        places = torch.cat([own.flatten() for own, *_ in pieces]).sort().values
        assert torch.equal(places, torch.arange(trellis.ring_length(n)))
        sizes = [len(part) for own, *_ in pieces for part in own]
        assert all(size % 32 == 0 for size in sizes) and max(sizes) - min(sizes) in (0, 32)
        assert len(sizes) == 1 or min(sizes) >= piece - 31
        symbols = encode(x, values, 2, piece)
        assert loss(x, values, symbols, 2) < 0.12
        assert torch.equal(symbols, encode(x, values, 2, piece)), "the same each time"
        for i in (0, 4):
            assert torch.equal(symbols[:, i : i + 1], encode(x[i : i + 1], values, 2, piece)), "rings are on their own"


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_rings_are_nearly_the_nearest(bits):
    """Against a search with each of all endings as the ring's first and last."""
    values, x = values_of(12, bits), torch.randn(2, 256)
    every = torch.arange(4096 >> bits)
    best = [costs(ring, values, between(ring.expand(len(every), -1), values, bits, every, every)).min() for ring in x]
    assert 1 - 1e-5 < loss(x, values, encode(x, values, bits), bits) / (float(sum(best)) / x.numel()) < 1.02


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_pieces_are_as_good_as_whole_rings(bits):
    values, x = values_of(12, bits), torch.randn(4, 2048)
    whole = loss(x, values, encode(x, values, bits, 2048), bits)
    assert loss(x, values, encode(x, values, bits), bits) < 1.002 * whole
    assert loss(x, values, encode(x, values, bits, 256), bits) < 1.01 * whole


def test_the_kernel_encodes_the_same_rings(monkeypatch):
    values, x = values_of(8, 2), torch.randn(2, 64)
    monkeypatch.setattr(viterbi, "_search", viterbi_triton.search)
    by_kernel = encode(x, values, 2, 32)
    monkeypatch.setattr(viterbi, "_search", reference)
    assert torch.equal(by_kernel, encode(x, values, 2, 32))


@pytest.mark.parametrize(
    ("state_bits", "bits", "bar"), [(12, 2, 0.0735), (12, 3, 0.0200), (12, 4, 0.0055), (16, 2, 0.0690)]
)
def test_gaussian_numbers(state_bits, bits, bar):
    """The bounds of rate-distortion theory are 0.0625, 0.0156 and 0.0039."""
    values, x = values_of(state_bits, bits), torch.randn(8, 4096)
    assert 4.0**-bits < loss(x, values, encode(x, values, bits), bits) < 1.02 * bar
