"""Which packed layers of a model run unpacked on a CPU, where a packed product can be slower than a dense one.

A layer is unpacked once, at its first product on a CPU, and keeps the dense weight beside the packed one, which is what
is saved and what moves to a GPU. By default each layer takes the faster way that memory allows.
"""

import logging
from collections.abc import Callable
from contextvars import ContextVar

import psutil
import torch
from torch import nn

from quantkit.core.errors import QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.kernels.cpu import has_numba
from quantkit.models.linear import QuantizedLinear

logger = logging.getLogger(__name__)

ASKED: ContextVar[bool | None] = ContextVar("unpack", default=None)
"""What `quantkit.load` was asked for, while transformers loads."""
OVERHEAD = 2**20
"""Weights that a dense product reads in the time that a call of a packed one takes beside its loops."""
MEMORY_FRACTION = 0.5
"""Fraction of the free memory that unpacked weights may take unasked."""


def choose_unpacked(
    model: nn.Module,
    unpack: bool | None = None,
    free: Callable[[], int] = lambda: psutil.virtual_memory().available,
) -> int:
    """Decides which packed layers run unpacked on a CPU, and logs what that costs; does nothing on a GPU.

    Args:
        model: with packed layers.
        unpack: True for all, False for none, None for those that are slower packed, as far as memory allows.
        free: bytes of free memory.

    Returns:
        Bytes that the unpacked weights will take.

    Raises:
        QuantkitError: True, and the weights do not fit into the free memory.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if not layers or next(layers[0].buffers()).is_cuda:
        return 0
    itemsize = getattr(model, "dtype", torch.float32).itemsize
    slower = {layer: slowdown(layer.packed) for layer in layers}
    available = free()
    if unpack:
        chosen, needed = set(layers), sum(_weights(layer) * itemsize for layer in layers)
        if needed > available:
            raise QuantkitError(
                f"unpacking all {len(layers)} packed layers takes {_size(needed)}, and {_size(available)} are free; "
                "leave unpack out, and what fits is unpacked, or give unpack=False"
            )
    else:
        budget = MEMORY_FRACTION * available if unpack is None else 0
        chosen = set()
        for layer in sorted(layers, key=lambda layer: -slower[layer]):
            if slower[layer] > 1 and _weights(layer) * itemsize <= budget:
                chosen.add(layer)
                budget -= _weights(layer) * itemsize
    for layer in layers:
        layer.unpacked = layer in chosen
    taken = sum(_weights(layer) * itemsize for layer in chosen)
    _log(layers, chosen, slower, taken)
    return taken


def _log(layers: list, chosen: set, slower: dict, taken: int) -> None:
    total = sum(_weights(layer) for layer in layers)

    def mean(part: list) -> float:
        """Mean time of these layers' products, relative to dense ones."""
        return sum(_weights(layer) * (1 if layer in chosen else slower[layer]) for layer in part) / total

    if chosen:
        packed = sum(_weights(layer) * slower[layer] for layer in chosen) / sum(map(_weights, chosen))
        logger.info(
            "on a CPU %d of %d packed layers are unpacked at their first use (%s beside the packed weights): packed, "
            "a token would take them about %.1f times a dense layer's time; unpack=False keeps them packed",
            *(len(chosen), len(layers), _size(taken), packed),
        )
    if mean(layers) > 1.05:
        cure = "unpack=True unpacks them" if has_numba() else "install numba, which has fast packed products"
        logger.warning(
            "on a CPU this model's packed layers take about %.1f times the time of dense ones a token; %s",
            *(mean(layers), cure),
        )


def slowdown(weight: QuantizedWeight) -> float:
    """Time of a packed layer's product with one row on a CPU, in times of a dense one's, calls included."""
    return weight.cpu_slowdown + OVERHEAD / (weight.shape[0] * weight.shape[1])


def _weights(layer: QuantizedLinear) -> int:
    return layer.out_features * layer.in_features


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
