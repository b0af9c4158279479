"""The path through a bitshift trellis that is nearest to given numbers, found exactly; and rings of such paths.

`search` minimises sum (x_i - values[s_i])^2 over all s with s_(i+1) = (s_i 2^K + symbol) mod 2^L, by Viterbi's
algorithm (IEEE Transactions on Information Theory, 1967): for each ending of L - K bits the cheapest path so far is
kept. It costs 2^L sums a number, on a GPU in Triton, on a CPU in numba, and in torch's own operations where neither is
installed.

`encode` closes paths to rings (`trellis`). A ring is cut into pieces. What a path passes
through at a cut is found first, by a free search over the numbers within `reach` of it; then each piece is searched
between its two cuts, all in one batch. Choices further than some multiple of L / K apart hardly depend on each other,
so that this is as good as a search over the whole ring (`evals/trellis_codes.py` has the loss), costs
1 + 2 reach / piece of it, and needs memory for pieces only. A piece's ends can also be given (`between`), to replace a
part of a ring.
"""

import logging
from functools import lru_cache

import torch
from torch import Tensor

from quantkit.kernels import self_check
from quantkit.kernels.trellis import PLACES, ring_length

PIECE, PIECE_ON_GPU = 512, 256
"""Numbers of a piece of a ring, at least, where the ring has so many; shorter where pieces run side by side."""
FREE = -1
"""An end of a path that may be any."""
_BYTES = 2**28  # of scratch memory that a batch may take; on a GPU, where a path takes a multiprocessor, more:
_BYTES_ON_GPU = 2**31
logger = logging.getLogger(__name__)


def reach(bits: int) -> int:
    """Numbers on either side of a cut that decide what passes through it."""
    return max(32, 192 // bits)


def encode(x: Tensor, values: Tensor, bits: int, piece: int | None = None) -> Tensor:
    """Rings for the rows of x.

    Args:
        x: fp32 [rings, n]; places beyond n, up to a whole number of words, may hold anything.
        values: fp32 [2^L], of all states; 2 K <= L.
        bits: K.
        piece: numbers that are searched at once, at least; None for what suits the device.

    Returns:
        uint8 [places, rings] symbols, as `trellis.pack_rings` takes them.
    """
    places, count = ring_length(x.shape[1]), len(values) >> bits
    x = torch.nn.functional.pad(x.float(), (0, places - x.shape[1]))
    piece = piece or (PIECE_ON_GPU if x.is_cuda else PIECE)
    near, pieces = _cuts(places, bits, piece, x.device)
    cuts = between(x[:, near].flatten(0, 1), values, bits)[:, near.shape[1] // 2] & count - 1
    cuts = cuts.view(len(x), -1)
    symbols = torch.empty(len(x), places, dtype=torch.uint8, device=x.device)
    for own, here, following in pieces:
        above, below = cuts[:, following].flatten(), cuts[:, here].flatten()
        states = between(x[:, own].flatten(0, 1), values, bits, above, below)
        symbols[:, own.flatten()] = (states & (1 << bits) - 1).to(torch.uint8).view(len(x), -1)
    return symbols.T.contiguous()


@lru_cache
def _cuts(
    places: int, bits: int, piece: int, device: torch.device
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Where a ring is cut.

    Returns:
        (places around each cut [cuts, 2 * reach], pieces by their length: their places [pieces, n], the cuts at which
        they begin, the cuts that follow them).
    """
    words = places // PLACES
    count = max(1, words // max(1, piece // PLACES))
    edges = PLACES * (words * torch.arange(count + 1) // count)
    around = reach(bits) if places > PLACES else places // 2  # goes around a short ring more than once
    near = (edges[:-1].unsqueeze(1) + torch.arange(-around, around)) % places
    sizes, pieces = edges.diff(), []
    for size in sizes.unique().tolist():
        here = (sizes == size).nonzero().flatten()
        own = edges[here].unsqueeze(1) + torch.arange(size)
        pieces.append((own.to(device), here.to(device), ((here + 1) % count).to(device)))
    return near.to(device), pieces


def between(x: Tensor, values: Tensor, bits: int, above: Tensor | None = None, below: Tensor | None = None) -> Tensor:
    """States of pieces of rings.

    Args:
        x: fp32 [pieces, n], in the order of the ring's places.
        values: fp32 [2^L].
        bits: K.
        above: int [pieces], the L - K bits that follow the pieces in their rings; None for any.
        below: int [pieces], the first L - K bits of the pieces; None for any.

    Returns:
        int32 [pieces, n].
    """
    return search(x.flip(1), values, bits, above, below).flip(1)


def search(x: Tensor, values: Tensor, bits: int, first: Tensor | None = None, last: Tensor | None = None) -> Tensor:
    """The nearest paths.

    Args:
        x: fp32 [paths, n].
        values: fp32 [2^L], on x's device; 2 K <= L.
        bits: K, 1 to 8.
        first: int [paths], the L - K bits from which paths start; None, or FREE, for any.
        last: int [paths], the L - K bits in which they end, likewise.

    Returns:
        int32 [paths, n] states.
    """
    free = torch.full((len(x),), FREE, dtype=torch.int64, device=x.device)
    first, last = free if first is None else first.long(), free if last is None else last.long()
    size = max(1, (_BYTES_ON_GPU if x.is_cuda else _BYTES) // (x.shape[1] * (len(values) >> bits)))
    parts = zip(x.contiguous().split(size), first.split(size), last.split(size), strict=True)
    return torch.cat([_search(own, values, bits, *ends) for own, *ends in parts])


def _search(x: Tensor, values: Tensor, bits: int, first: Tensor, last: Tensor) -> Tensor:
    if x.is_cuda and torch.version.hip is None and self_check.trusted("viterbi_search", x.device):
        from quantkit.kernels import viterbi_triton

        return viterbi_triton.search(x, values, bits, first, last)
    if x.is_cpu and has_numba():
        from quantkit.kernels import viterbi_numba

        numbers, table, start, end = (tensor.numpy() for tensor in (x, values, first, last))
        return torch.from_numpy(viterbi_numba.search(numbers, table, bits, start, end, torch.get_num_threads()))
    return reference(x, values, bits, first, last)


def reference(x: Tensor, values: Tensor, bits: int, first: Tensor, last: Tensor) -> Tensor:
    """The specification of `search`, on any device: x fp32 [paths, steps] -> int32 states [paths, steps].

    Args:
        x: the numbers.
        values: fp32 [2^L].
        bits: K.
        first, last: int64 [paths], FREE for any.
    """
    paths, steps = x.shape
    ways, count = 1 << bits, len(values) >> bits
    cost = torch.where(first < 0, 0.0, torch.inf).unsqueeze(1).repeat(1, count)
    known = (first >= 0).nonzero().flatten()
    cost[known, first[known]] = 0
    choice = torch.empty(steps, paths, count, dtype=torch.uint8, device=x.device)
    for step in range(steps):
        found = cost.repeat_interleave(ways, dim=1) + values * (values - 2 * x[:, step : step + 1])
        cost, chosen = found.view(paths, ways, count).min(1)
        cost -= cost.amin(1, keepdim=True)
        choice[step] = chosen
    states = torch.empty(steps, paths, dtype=torch.int32, device=x.device)
    u = torch.where(last < 0, cost.argmin(1), last)
    for step in range(steps - 1, -1, -1):
        state = choice[step].gather(1, u.unsqueeze(1)).squeeze(1).long() * count + u
        states[step], u = state, state >> bits
    return states.T.contiguous()


@lru_cache
def has_numba() -> bool:
    """Whether searches on a CPU are compiled; says once what they would gain by it."""
    try:
        import numba  # noqa: F401
    except ImportError:
        logger.warning("trellis codes are searched for by torch; `pip install numba` makes that many times as fast")
        return False
    return True
