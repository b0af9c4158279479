"""Fills the database: one walk over the model packs every layer in every way that is asked for.

Statistics are gathered once. A layer's candidates share its Hessian and, where they have the same damping and order of
columns, its factor. The prefix that feeds them is packed by one of the candidates, the base (EvoPress, section 4: all
levels are calibrated behind the same prefix), so that a layer's candidates do not depend on which others were chosen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate import LayerResult, relative_error, walk
from quantkit.device import compute_dtype, pick_device
from quantkit.folder import ModelFolder, load_tokenizer
from quantkit.plan import Plan
from quantkit.protocols import Needs, Quantizer
from quantkit.quantizers.target_shift import TargetShift
from quantkit.recipe import Recipe
from quantkit.search.store import Store, candidate_key
from quantkit.stats import LayerStats
from quantkit.weight import QuantizedWeight

Found = dict[str, dict[str, LayerResult]]
"""What was made of each layer, by candidate."""


@dataclass(frozen=True)
class Several:
    """Quantizes the layer `name` in several ways, notes all and returns the base's."""

    name: str
    inner: Quantizer
    others: tuple[Quantizer, ...]
    found: Found = field(repr=False, compare=False)

    @property
    def needs(self) -> Needs:
        """The most that any candidate reads, and the Hessian at least: losses are measured in it."""
        return max(Needs.HESSIAN, self.inner.needs, *(other.needs for other in self.others))

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> QuantizedWeight:
        """The base's result."""
        assert stats is not None
        made = {quantizer: quantizer.quantize(weight, stats) for quantizer in (self.inner, *self.others)}
        self.found[self.name] = {
            candidate_key(quantizer): LayerResult(packed, relative_error(weight, packed, stats), stats.damping)
            for quantizer, packed in made.items()
        }
        return made[self.inner]

    def layout(self, out_features: int, in_features: int) -> QuantizedWeight:
        """The base's layout."""
        return self.inner.layout(out_features, in_features)


class _Sink:
    """Writes what a walk finds into the database."""

    def __init__(self, store: Store, quantizers: Mapping[str, Quantizer], base: str, found: Found) -> None:
        self._store, self._quantizers, self._base, self._found = store, quantizers, base, found

    def finished(self, index: int) -> dict[str, QuantizedWeight] | None:
        """The block as the base packs it, where all candidates are there."""
        if not all(self._store.has(index, key) for key in self._quantizers):
            return None
        return self._store.load(index, self._base, self._store.candidates(index, self._base))

    def write(self, index: int, name: str, layers: dict[str, LayerResult]) -> None:
        """Takes the block's candidates; the base last, so that it never stands for others that are missing."""
        for key in [*(key for key in self._quantizers if key != self._base), self._base]:
            made = {layer: self._found[layer][key] for layer in layers}
            if made:
                self._store.write(index, key, self._quantizers[key], made)
        for layer in layers:
            del self._found[layer]


@dataclass(frozen=True)
class Database:
    """A model's candidates, all there.

    Attributes:
        store: on disk.
        quantizers: by key, in the order asked for.
        blocks: each layer's block, -1 for layers outside the blocks; in model order.
        source: the model's folder.
        settings: JSON of the calibration.
        bytes_before: of all tensors of the full model.
    """

    store: Store
    quantizers: dict[str, Quantizer]
    blocks: dict[str, int]
    source: ModelFolder
    settings: dict[str, Any]
    bytes_before: int


def build(
    folder: Path,
    recipe: Recipe,
    candidates: tuple[Quantizer, ...],
    database: Path,
    *,
    device: str | torch.device | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Database:
    """Makes the candidates that the database lacks.

    Args:
        folder: the full-precision model.
        recipe: its quantizer is the base; its rules say which layers are left out.
        candidates: ways to pack a layer; the base is one more, if it is not among them.
        database: folder of the database; made where there is none.
        device: where blocks run; by default a GPU if there is one.
        progress: called with (blocks done, blocks in all, name).

    Raises:
        QuantkitError: bad input, or a database of another model or calibration.
    """
    base = recipe.quantizer
    assert base is not None
    where = pick_device(device)
    source = ModelFolder(folder, compute_dtype(where))
    for quantizer in (base, *candidates):
        replace(recipe, quantizer=quantizer).plan(source.model)  # raises where a candidate does not fit the model
    plan = recipe.plan(source.model)
    before = source.nbytes()
    source.untie(plan)
    windows = recipe.calibration.windows(load_tokenizer(folder), source.model)
    settings = recipe.settings(plan, windows)
    identity = {key: value for key, value in settings.items() if key != "quantizers"} | {
        "base": sorted({repr(quantizer) for quantizer in plan.values()}),
        "layers": sorted(plan),
        "model": source.shards.fingerprint(),
        "device": where.type,
        "dtype": str(source.model.dtype),
    }
    store = Store(database, identity, len(source.blocks))
    quantizers = {candidate_key(quantizer): quantizer for quantizer in (*candidates, base)}
    indices = {f"{source.prefix}.{index}.": index for index in range(len(source.blocks))}
    blocks = {name: next((i for prefix, i in indices.items() if name.startswith(prefix)), -1) for name in plan}
    if not all(store.has(index, key) for index in set(blocks.values()) for key in quantizers):
        found: Found = {}
        sink = _Sink(store, quantizers, candidate_key(base), found)
        others = tuple(quantizer for quantizer in quantizers.values() if quantizer != base)
        walk(
            source.model,
            _several(plan, others, found),
            windows,
            source=source.source(plan),
            sink=sink,
            device=where,
            progress=progress,
            true_sequential=recipe.true_sequential,
        )
        source = ModelFolder(folder, compute_dtype(where))  # the walk packed the other's layers
        source.untie(plan)
    return Database(store, quantizers, blocks, source, settings, before)


def _several(plan: Plan, others: tuple[Quantizer, ...], found: Found) -> Plan:
    """The plan with all candidates of every layer; they share the target where it is shifted."""
    changed: Plan = {}
    for name, quantizer in plan.items():
        if isinstance(quantizer, TargetShift):
            changed[name] = replace(quantizer, inner=Several(name, quantizer.inner, others, found))
        else:
            changed[name] = Several(name, quantizer, others, found)
    return changed
