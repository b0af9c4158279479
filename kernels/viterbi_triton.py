"""The exact search of `viterbi` on a GPU: one program a path, all of its steps in one launch.

    cost'[u] = min over t < 2^K of cost[s >> K] + v_s (v_s - 2 x),    s = t 2^(L-K) + u

A program keeps the costs of the 2^(L-K) endings twice, old and new, in global memory (128 KiB at K=2, L=16, which
caches hold), with a barrier after each step. It takes up to `BLOCK` endings at once, a tensor [runs, 2^K] whose rows
have the states that they come from in common: a lane has neighbours in a row, loads their values together and the cost
before them once, and compares the ways t in order, in registers. The choices, a byte each, go to global memory; at the
end the program goes back through them, a chain of one load a step that a launch of its own could not shorten.

Values are loaded, not computed from the state: that would take twice the instructions (13 a state and step at K=2).
Instructions a state and step in the machine code for sm_90, L=16:

    K               1     2     3     4     5     6     7     8
    instructions   7.0   6.2   7.2   8.3   8.0   7.1   6.7   6.4

A model for an H100 at 1.7 GHz, not measured: 3,200 cycles a step at K=2 for the instructions, 4,100 for 256 KiB of
values where all come from L2 at 64 bytes a cycle, so 2.4 us a step and 0.2 us back, for any number of paths up to the
132 multiprocessors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
"""Endings that a program takes at once, at most."""


@triton.jit(do_not_specialize=["steps"])  # one binary for any number of steps
def search_kernel(
    x_ptr, values_ptr, first_ptr, last_ptr, states_ptr, cost_ptr, choice_ptr, steps,
    BITS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A path: x_ptr and states_ptr [paths, steps], cost_ptr [paths, 2, COUNT], choice_ptr [paths, steps, COUNT]."""
    WAYS: tl.constexpr = 2**BITS
    path = tl.program_id(0).to(tl.int64)
    x_ptr += path * steps
    states_ptr += path * steps
    cost_ptr += path * (2 * COUNT)
    choice_ptr += path * steps * COUNT
    first = tl.load(first_ptr + path)
    flat = tl.arange(0, BLOCK)
    for start in range(0, COUNT, BLOCK):
        tl.store(cost_ptr + start + flat, tl.where((first < 0) | (first == start + flat), 0.0, float("inf")))
    tl.debug_barrier()

    run = tl.arange(0, BLOCK // WAYS)[:, None]
    ending = run * WAYS + tl.arange(0, WAYS)[None, :]
    run = tl.max_contiguous(run, [1, 1])  # or Triton gives lanes neighbouring runs, and moves them to those of `ending`
    for step in range(steps):
        old_ptr = cost_ptr + (step & 1) * COUNT
        new_ptr = cost_ptr + (1 - (step & 1)) * COUNT
        double = 2 * tl.load(x_ptr + step)
        # sums would outgrow their precision; no ending is much dearer than another, or infinite, once it can be reached
        base = tl.load(old_ptr, mask=(step & 31) == 31, other=0.0)
        for start in range(0, COUNT, BLOCK):
            best = tl.full((BLOCK // WAYS, WAYS), float("inf"), tl.float32)
            chosen = tl.full((BLOCK // WAYS, WAYS), 0, tl.int32)
            for some in range(0, WAYS, UNROLL):
                for place in tl.static_range(UNROLL):
                    t = some + place
                    cost = tl.load(old_ptr + (t * COUNT + start) // WAYS + run)
                    value = tl.load(values_ptr + t * COUNT + start + ending, eviction_policy="evict_first")
                    found = cost + value * (value - double)
                    better = found < best
                    best = tl.where(better, found, best)
                    chosen = tl.where(better, t, chosen)
            tl.store(new_ptr + start + ending, best - base)
            tl.store(choice_ptr + start + ending, chosen.to(tl.uint8))
        choice_ptr += COUNT
        tl.debug_barrier()  # all costs are there, and the old ones can be overwritten

    cost_ptr += (steps & 1) * COUNT
    u, least = 0, float("inf")
    for start in range(0, COUNT, BLOCK):
        here, place = tl.min(tl.load(cost_ptr + start + flat), 0, return_indices=True)
        u = tl.where(here < least, start + place, u)
        least = tl.minimum(here, least)
    last = tl.load(last_ptr + path).to(tl.int32)
    u = tl.where(last < 0, u, last)
    for step in range(steps - 1, -1, -1):
        choice_ptr -= COUNT
        state = tl.load(choice_ptr + u).to(tl.int32) * COUNT + u
        tl.store(states_ptr + step, state)
        u = state >> BITS


def sizes(bits: int, states: int) -> tuple[dict[str, int], dict[str, int]]:
    """What the kernel is compiled for, and Triton's options.

    A lane takes 4 endings of a block, or 2 where they are few; the fewer the warps, the more loads each has under way.
    """
    count = states >> bits
    warps = max(1, min(32, count // 64))
    constants = {"BITS": bits, "COUNT": count, "BLOCK": min(count, _BLOCK), "UNROLL": min(1 << bits, 256 // warps)}
    return constants, {"num_warps": warps, "num_stages": 1, "maxnreg": min(255, 2048 // warps)}


def search(x: Tensor, values: Tensor, bits: int, first: Tensor, last: Tensor) -> Tensor:
    """As `viterbi.reference`: x fp32 [paths, steps] -> int32 states [paths, steps].

    All tensors are contiguous, on one GPU or on a CPU under Triton's interpreter.

    Args:
        x: the numbers.
        values: fp32 [2^L].
        bits: K.
        first, last: int64 [paths], or `viterbi.FREE` for any.
    """
    paths, steps = x.shape
    constants, options = sizes(bits, len(values))
    states = torch.empty(paths, steps, dtype=torch.int32, device=x.device)
    cost = torch.empty(paths, 2, constants["COUNT"], dtype=torch.float32, device=x.device)
    choice = torch.empty(paths, steps, constants["COUNT"], dtype=torch.uint8, device=x.device)
    with torch.cuda.device_of(x):
        search_kernel[(paths,)](x, values, first, last, states, cost, choice, steps, **constants, **options)
    return states
