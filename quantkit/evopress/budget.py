"""Budgets that users have, as bytes that the searched layers may take.

Every stored byte counts: the rest of the model (embedding, norms, head, packed or dense) and the files' headers come
first, and what is left is the layers'. A model that is to fit a device beside its cache and activations leaves room for
those:

    weights + KV cache (context x batch) + activations (the longest prompt in one pass) + reserve <= device
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Quantizer
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.scaled import ScaledWeight
from quantkit.io.files import parse_json
from quantkit.models.plan import Plan
from quantkit.models.structure import linear_weight
from quantkit.run.recipe import core

if TYPE_CHECKING:
    from quantkit.io.source import Source

HEADER_BYTES = 160
"""Bytes of a tensor's entry in a safetensors header, at most, and of what the index says of it."""
TENSORS = 8
"""Tensors of a packed layer, at most."""


@dataclass(frozen=True)
class Budget:
    """What a model may cost.

    Attributes:
        amount: "bits": per weight of the searched layers; "bytes": of all weight files; "weights": fraction of the
            searched layers' weights that are not zero; "latency": milliseconds in the layers' kernels, for one token;
            "blocks": how many stay.
        kind: which of these.
        timings: microseconds by format and shape, for a latency; see `read_timings`.
    """

    amount: float
    kind: Literal["bits", "bytes", "weights", "latency", "blocks"]
    timings: Mapping[tuple[str, int, int], float] | None = None

    def units(self, source: Source | None, layers: Sequence[str], fixed: Plan | None = None) -> int:
        """What the searched layers may cost, in units of `cost`.

        Args:
            source: the full-precision model; not read for a number of blocks.
            layers: their names.
            fixed: quantizers of layers that are packed too, and not searched.
        """
        factor, rest = self._scale(source, layers, fixed or {})
        return int(self.amount * factor) - rest

    def _scale(self, source: Source | None, layers: Sequence[str], fixed: Plan) -> tuple[float, int]:
        """(units in one of `amount`, units that all else takes)."""
        if self.kind == "blocks" or source is None:
            return 1, 0
        if self.kind == "latency":
            return 1e6, 0
        if self.kind == "bytes":
            rest = source.nbytes() - source.packed_nbytes([*layers, *fixed])
            shapes = {name: linear_weight(source.model.get_submodule(name)).shape for name in fixed}
            rest += sum(quantizer.layout(*shapes[name]).nbytes for name, quantizer in fixed.items())
            return 1, rest + HEADER_BYTES * (len(source.model.state_dict()) + TENSORS * (len(layers) + len(fixed)))
        weights = sum(linear_weight(source.model.get_submodule(name)).numel() for name in layers)
        return weights / 8 if self.kind == "bits" else weights, 0

    def cost(self, weight: QuantizedWeight, quantizer: Quantizer) -> int:
        """The cost of a packed layer: bytes, weights that are not zero, or nanoseconds.

        Args:
            weight: may be on the meta device.
            quantizer: what packed it.

        Raises:
            QuantkitError: the timings lack its format and shape.
        """
        rows, columns = weight.shape
        if self.kind == "latency":
            assert self.timings is not None
            weight = weight.base if isinstance(weight, ScaledWeight) else weight  # whose kernel is the base's
            bits = weight.metadata().get("bits")
            name = weight.label if bits is None else f"{weight.label} {bits}"
            if (name, rows, columns) not in self.timings:
                raise QuantkitError(f"the timings lack {name!r} at {rows} x {columns}; measure it")
            return int(1e3 * self.timings[name, rows, columns])
        if self.kind == "weights":
            return rows * columns - round(getattr(core(quantizer), "sparsity", 0.0) * rows * columns)
        return weight.nbytes

    def check(
        self, source: Source, layers: Sequence[str], quantizers: Iterable[Quantizer], fixed: Plan | None = None
    ) -> str:
        """Holds the budget against what the candidates' layouts cost, before any of them is made.

        Args:
            source, layers, fixed: see `units`.
            quantizers: the candidates.

        Returns:
            What is to be said of it: that it is more than the dearest candidates take, or nothing.

        Raises:
            QuantkitError: not even the cheapest candidates fit.
        """
        least = most = 0
        for name in layers:
            shape = linear_weight(source.model.get_submodule(name)).shape
            costs = [self.cost(quantizer.layout(*shape), quantizer) for quantizer in quantizers]
            least, most = least + min(costs), most + max(costs)
        factor, rest = self._scale(source, layers, fixed or {})
        low, high = (self._said((units + rest) / factor) for units in (least, most))
        allowed = self.units(source, layers, fixed)
        if allowed < least:
            raise QuantkitError(f"{self._said(self.amount)} is impossible with these candidates: from {low} to {high}")
        if allowed > most:
            return f"{self._said(self.amount)} is more than the dearest candidates take, {high}: nothing to search"
        return ""

    def _said(self, amount: float) -> str:
        """An amount in the words in which users give it."""
        if self.kind == "bytes":
            return f"{amount / 1e9:.4g} GB" if amount >= 1e9 else f"{amount / 1e6:.4g} MB"
        if self.kind == "weights":
            return f"a sparsity of {1 - amount:.4g}"
        return f"{amount:.4g} " + {"bits": "bits per weight", "latency": "ms", "blocks": "blocks"}[self.kind]


def read_timings(path: Path) -> dict[tuple[str, int, int], float]:
    """A table of kernel timings: JSON [{"format": "int_group 4", "rows": 4096, "columns": 4096, "us": 11.5}, ...].

    Formats are called as in reports, with their bits behind where they are integers; rows are output features.

    Raises:
        QuantkitError: the file is no such table.
    """
    try:
        entries = parse_json(path)
        timings = {(e["format"], int(e["rows"]), int(e["columns"])): float(e["us"]) for e in entries}
        if not all(math.isfinite(time) and time > 0 for time in timings.values()):
            raise ValueError("times must be positive")
        return timings
    except (ArithmeticError, ValueError, KeyError, TypeError) as error:
        raise QuantkitError(
            f'{path} is no table of timings ({error}); it holds [{{"format": "int_group 4", "rows": 4096, '
            '"columns": 4096, "us": 11.5}, ...]'
        ) from error
