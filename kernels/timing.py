"""Time of a GPU launch as a model would see it: replayed in a CUDA graph, over weights that do not fit the cache."""

import statistics
from collections.abc import Callable, Sequence

import torch


def seconds_per_call(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median seconds of one call, when the calls (each on tensors of its own) run one after the other.

    Args:
        calls: what to time; together they should touch more memory than the GPU's cache holds.
        repeats: replays of the graph that holds all of them.
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
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[2:])
