"""Time of a GPU launch as a model would see it: replayed in a CUDA graph, over weights that do not fit the cache."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_IN_A_ROW = 4
_DISTINCT_BYTES = 2**28


class Replays:
    """Calls that are replayed one after the other as one CUDA graph.

    Args:
        calls: each on tensors of its own, on the current device; together they should touch more memory than its cache
            holds (`copies`).

    Attributes:
        results: what the calls return, tensors that each replay writes anew.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        for call in calls:  # compiles, and allocates what is allocated once
            call()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.results = [call() for call in calls]

    def replay(self) -> None:
        """Runs all calls once."""
        self._graph.replay()
        torch.cuda.synchronize()

    def seconds(self, repeats: int = 20) -> float:
        """Median seconds of one call, of so many rounds."""
        times = []
        for _ in range(repeats + 2):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._graph.replay()  # keeps the GPU busy while the next replays are handed over
            start.record()
            for _ in range(_IN_A_ROW):
                self._graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / len(self.results) / _IN_A_ROW)
        return statistics.median(times[2:])


def seconds_per_call(calls: Sequence[Callable[[], Any]], repeats: int = 20) -> float:
    """Median seconds of one call, when the calls run one after the other; see `Replays`."""
    return Replays(calls).seconds(repeats)


def copies(nbytes: int, least: int = 8, most: int = 256) -> int:
    """How many distinct tensors of so many bytes no cache holds together."""
    return min(most, max(least, _DISTINCT_BYTES // nbytes + 1))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def four_copies() -> None:
        for _ in range(4):
            target.copy_(source)

    return 4 * 2 * size / statistics.median([timed(device, four_copies)[0] for _ in range(7)][2:])


def timed(device: torch.device, function: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds until the device is done, result) of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result
