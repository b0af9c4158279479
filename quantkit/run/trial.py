"""How long a run would take on this device, by packing two narrow layers with each of its quantizers.

A quantizer's time on a layer [out, in] is taken for a(in) + b(in) * out: what is done once for the Hessian, and what is
done for every row. Calibration is counted in multiplications, whose pace one product tells.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F

from quantkit.core.protocols import Needs, Quantizer
from quantkit.core.stats import LayerStats
from quantkit.models.experts import place
from quantkit.run.packing import Pack
from quantkit.run.processes import Together

FEW, ROWS = 8, (64, 256)
"""Rows of the narrow layers of a trial: of the one that factors the Hessian, and of those that tell a row's time."""
LONG = 1.0
"""Seconds of a trial after which none with more rows is made."""
PACE = 0.5
"""Of a large product's multiplications a second that a block reaches, with attention and norms between products."""
WIDEST = 4096
"""Columns of a trial; wider layers are taken to cost in^3 for the Hessian and in^2 a row."""


def rounding_seconds(
    layers: Mapping[str, tuple[Quantizer, tuple[int, ...]]],
    device: torch.device,
    processes: int = 1,
    felt: bool = False,
) -> float:
    """Seconds that all layers' rounding takes.

    Args:
        layers: name -> (quantizer, shape [out_features, in_features]).
        device: where.
        processes: that share out the layers of a stage. The last layer of a module, such as an attention's output, is
            taken to be a stage by itself.
        felt: whether it is known what outputs are worth, as after a reverse pass.
    """
    known: dict[tuple[Quantizer, int], tuple[float, float]] = {}
    stages: dict[tuple[str, ...], dict[str, float]] = {}
    last = {name.rpartition(".")[0]: name for name in layers}
    for name, (quantizer, (rows, columns)) in layers.items():
        tried = min(columns, WIDEST)
        if (quantizer, tried) not in known:
            known[quantizer, tried] = _tried(quantizer, tried, device, felt)
        once, a_row = known[quantizer, tried]
        ratio = columns / tried
        module, experts = name.rpartition(".")[0], place(name)
        stage = (module, str(last[module] == name)) if experts is None else (experts[0], experts[2])
        stages.setdefault(stage, {})[name] = once * ratio**3 + a_row * ratio**2 * rows
    return sum(
        max(sum(costs[name] for name in Together(rank, processes).share(costs)) for rank in range(processes))
        for costs in stages.values()
    )


def _tried(quantizer: Quantizer, columns: int, device: torch.device, felt: bool) -> tuple[float, float]:
    """(seconds for the Hessian, seconds a row) of a layer with so many columns."""

    def taken(rows: int) -> float:
        weight = torch.randn(rows, columns, device=device)
        known = stats.of_layer("layer", torch.eye(rows, device=device)) if stats is not None and felt else stats
        return _seconds(partial(Pack({"layer": quantizer}), "layer", weight, known), device)

    reads = quantizer.needs > Needs.NOTHING
    for _ in range(2):  # the first compiles
        stats = _stats(columns, device) if reads else None
        first = taken(FEW)
    for rows in (FEW, ROWS[0]):  # the statistics know their factors from here on
        few = taken(rows)
        if few > LONG:
            few = taken(rows)  # what many rows take may have been compiled just now
        if few > LONG:
            return max(0.0, first - few * FEW / rows), few / rows
    a_row = max(0.0, taken(ROWS[1]) - few) / (ROWS[1] - ROWS[0])
    return max(0.0, first - a_row * FEW), a_row


def _stats(columns: int, device: torch.device) -> LayerStats:
    """Statistics of inputs [tokens, columns] of which a few directions are strong."""
    strong = torch.randn(columns, 8, device=device)
    hessian = torch.eye(columns, device=device) + strong @ strong.T / 8
    return LayerStats(hessian, hessian, columns)


def pass_seconds(multiplications: float, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds for so many multiplications in products of many tokens."""
    x, weight = (torch.randn(1024, 1024, dtype=dtype, device=device) for _ in range(2))
    F.linear(x, weight)
    return multiplications * _seconds(lambda: F.linear(x, weight), device) / 1024**3 / PACE


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.monotonic()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - start
