"""Time of a GPU launch as a model would see it: replayed in a CUDA graph, over weights that do not fit the cache."""

import statistics
from collections.abc import Callable, Sequence

import torch

_IN_A_ROW = 4


def seconds_per_call(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median seconds of one call, when the calls (each on tensors of its own) run one after the other.

    Args:
        calls: what to time, on the current device; together they should touch more memory than its cache holds.
        repeats: how often the graph that holds all of them is timed.
    """
    for call in calls:  # compiles, and allocates what is allocated once
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # keeps the GPU busy while the next replays are handed over
        start.record()
        for _ in range(_IN_A_ROW):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls) / _IN_A_ROW)
    return statistics.median(times[2:])
