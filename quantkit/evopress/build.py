"""Fills the database: one walk over the model packs every layer in every way that is asked for.

Statistics are gathered once. A layer's candidates share its Hessian and, where they have the same damping and order of
columns, its factor. The prefix that feeds them is packed by one of the candidates, the base (EvoPress, section 4: all
levels are calibrated behind the same prefix), so that a layer's candidates do not depend on which others were chosen.
The head and the embedding may be packed beside them, in one way each (`Recipe.head_bits`): nothing is searched there,
and candidates do not see it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.core import spec
from quantkit.core.device import compute_dtype, pick_device
from quantkit.core.errors import QuantkitError
from quantkit.core.products import full_width
from quantkit.core.protocols import Needs, Quantizer
from quantkit.core.result import LayerResult
from quantkit.core.stats import LayerStats
from quantkit.core.weight import QuantizedWeight
from quantkit.evopress.budget import Budget
from quantkit.evopress.store import Database, Store, candidate_key, end_key
from quantkit.io.source import open_folder
from quantkit.models.plan import Plan, tied, with_own_weight
from quantkit.models.structure import is_lookup
from quantkit.quantizers.factor import quantized
from quantkit.quantizers.target_shift import TargetShift
from quantkit.run.fisher import measure
from quantkit.run.packing import Pack, expected_kl, relative_error
from quantkit.run.recipe import Recipe
from quantkit.run.sequential import Walker

Found = dict[str, dict[Quantizer, LayerResult]]
"""What was made of each layer."""


@dataclass(frozen=True)
class _Candidates:
    """The hook of the walk: makes the candidates that are missing and goes on with the base's.

    Attributes:
        base: the candidate that the prefix is packed by.
        missing: candidates to make, by layer.
        shift: of the target, 0 to 1. Errors are measured against the shifted target, whatever a candidate aims at.
        found: where results are noted, by layer.
        stored: reads the base's result, for layers where it is there already.
        fixed: layers that are packed in one way.
    """

    base: Quantizer
    missing: dict[str, tuple[Quantizer, ...]]
    shift: float
    found: Found
    stored: Mapping[str, Callable[[], QuantizedWeight]]
    fixed: Plan

    def needs(self, name: str) -> Needs:
        """The Hessian, in which errors are measured, and both streams where the target is shifted."""
        if name in self.fixed:
            return self.fixed[name].needs
        least = Needs.CROSS if self.shift else Needs.HESSIAN
        return max(least, *(quantizer.needs for quantizer in (self.base, *self.missing[name])))

    def __call__(self, name: str, weight: Tensor, stats: LayerStats | None) -> LayerResult:
        """Packs a layer in all ways, and returns the base's result."""
        if name in self.fixed:
            return Pack(self.fixed)(name, weight, stats)
        assert stats is not None
        target = TargetShift(self.base, self.shift).target(weight, stats) if self.shift else weight
        for quantizer in self.missing[name]:
            packed = quantized(quantizer, target if quantizer.needs == Needs.HESSIAN else weight, stats)
            error = relative_error(target, packed, stats)
            kl = expected_kl(target, packed, stats)
            self.found[name][quantizer] = LayerResult(packed, error, stats.damping, predicted_kl=kl)
        if name not in self.stored:
            return self.found[name][self.base]
        again = self.stored[name]().map(lambda tensor: tensor.to(weight.device))
        return LayerResult(again, relative_error(target, again, stats), stats.damping)


class _Sink:
    """Writes what a walk finds into the database."""

    def __init__(
        self, store: Store, quantizers: Mapping[str, Quantizer], base: str, found: Found, fixed: Mapping[str, Quantizer]
    ) -> None:
        self._store, self._quantizers, self._base, self._found = store, quantizers, base, found
        self._fixed = fixed

    def finished(self, index: int) -> dict[str, QuantizedWeight] | None:
        """The block as the base packs it, where all candidates are there."""
        if not all(self._store.has(index, key) for key in self._quantizers):
            return None
        return self._store.load(index, self._base, self._store.candidates(index, self._base))

    def write(self, index: int, name: str, layers: dict[str, LayerResult]) -> None:
        """Takes the block's candidates."""
        searched = [layer for layer in layers if layer in self._found]
        for key, quantizer in self._quantizers.items():
            made = {layer: self._found[layer][quantizer] for layer in searched if quantizer in self._found[layer]}
            if made:
                self._store.write(index, key, quantizer, made)
        for layer in searched:
            self._found[layer].clear()
        for layer in (layer for layer in layers if layer in self._fixed):
            self._store.write(index, end_key(layer, self._fixed[layer]), self._fixed[layer], {layer: layers[layer]})


@dataclass(frozen=True)
class Lacking:
    """A database, and what of it is still to be made.

    Attributes:
        database: of which some candidates may not be there.
        tokens: of the calibration, int64 [samples, seqlen].
        missing: (block, key) of the files that are not there; see `Store`.
        note: what is to be said of the budget, or nothing.
    """

    database: Database
    tokens: Tensor
    missing: tuple[tuple[int, str], ...]
    note: str


@full_width()
def build(
    folder: Path,
    recipe: Recipe,
    candidates: tuple[Quantizer, ...],
    database: Path,
    *,
    budget: Budget | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Database:
    """Makes the candidates that the database lacks.

    Args:
        folder: the full-precision model.
        recipe: its quantizer is the base; its rules say which layers are left out; its `head_bits` are those of the
            head and the embedding, where no rule gives them the base.
        candidates: ways to pack a layer; the base is one more, if it is not among them.
        database: folder of the database; made where there is none.
        budget: of the search to come; one that no candidates keep is refused before any is made.
        device: where blocks run; by default a GPU if there is one.
        progress: called with (blocks done, blocks in all, name).

    Raises:
        QuantkitError: bad input, an impossible budget, or a database of another model or calibration.
    """
    where, base = pick_device(device), recipe.quantizer
    assert base is not None
    found = lacking(folder, recipe, candidates, database, budget=budget, device=where)
    made = found.database
    if not found.missing:
        return made
    made.source.check_finite()
    again = made.source.unpacked({**dict.fromkeys(made.blocks, base), **made.fixed})
    with made.store.begin():
        _fill(made, recipe, found.tokens, where, progress)
    return replace(made, source=again())


def lacking(
    folder: Path,
    recipe: Recipe,
    candidates: tuple[Quantizer, ...],
    database: Path,
    *,
    budget: Budget | None,
    device: torch.device,
    structure_only: bool = False,
) -> Lacking:
    """What `build` would make; nothing is changed.

    Args:
        folder, recipe, candidates, database, budget: see `build`.
        device: where blocks would run.
        structure_only: read no weights; the database is not for a build then.

    Raises:
        QuantkitError: as `build`.
    """
    base = recipe.quantizer
    assert base is not None
    source = open_folder(folder, compute_dtype(device), structure_only)
    for quantizer in (base, *candidates):
        replace(recipe, quantizer=quantizer).plan(source.model)  # raises where a candidate does not fit the model
    plan, fixed = _divided(recipe, source.model)
    before = source.nbytes()
    source.settle(plan | fixed)
    tokens = recipe.calibration.sequences(source.tokenizer(), source.model)
    settings = recipe.settings(plan, tokens)
    identity = {key: value for key, value in recipe.identity(plan, tokens).items() if key != "quantizers"} | {
        "base": spec.write(base),
        "target_shift": recipe.target_shift,
        "layers": sorted(plan),
        "model": source.fingerprint(),
        "device": device.type,
        "dtype": str(source.model.dtype),
    }
    quantizers = {candidate_key(quantizer): quantizer for quantizer in (*candidates, base)}
    note = "" if budget is None else budget.check(source, tuple(plan), quantizers.values(), fixed)
    store = Store(database, identity, len(source.blocks))
    indices = {f"{source.prefix}.{index}.": index for index in range(len(source.blocks))}
    blocks = {name: next((i for prefix, i in indices.items() if name.startswith(prefix)), -1) for name in plan}
    wanted = [(index, key) for index in set(blocks.values()) for key in quantizers]
    wanted += [(-1, end_key(name, quantizer)) for name, quantizer in with_own_weight(fixed).items()]
    made = Database(store, quantizers, blocks, fixed, source, settings, before)
    return Lacking(made, tokens, tuple(place for place in wanted if not store.has(*place)), note)


def _divided(recipe: Recipe, model: nn.Module) -> tuple[Plan, Plan]:
    """(the layers that are searched, those that are packed in one way).

    Raises:
        QuantkitError: an embedding is to be searched, or blocks share weights.
    """
    plan, searched = recipe.plan(model), replace(recipe, head_bits=None).plan(model)
    for name in searched:
        if is_lookup(model.get_submodule(name)):
            raise QuantkitError(f"{name} is an embedding, and candidates are for linear layers; `head_bits` packs it")
    if shared := tied(searched):
        raise QuantkitError(
            f"blocks of {type(model).__name__} share weights, {next(iter(shared))} among them, which no search knows "
            "of; `quantkit quantize` packs them"
        )
    fixed = {name: quantizer for name, quantizer in plan.items() if name not in searched}
    return searched, {name: quantizer for name, quantizer in fixed.items() if tied(fixed).get(name) not in searched}


def _fill(
    database: Database,
    recipe: Recipe,
    tokens: Tensor,
    device: torch.device,
    progress: Callable[[int, int, str], None],
) -> None:
    """Walks over the model and makes what is missing."""
    base, store, source = recipe.quantizer, database.store, database.source
    assert base is not None
    key, blocks, fixed = candidate_key(base), database.blocks, database.fixed
    found: Found = {name: {} for name in blocks}
    missing = {
        name: tuple(quantizer for other, quantizer in database.quantizers.items() if not store.has(index, other))
        for name, index in blocks.items()
    }
    stored = {
        name: partial(store.load_one, index, key, name) for name, index in blocks.items() if store.has(index, key)
    }
    plan: Plan = {**dict.fromkeys(blocks, base), **fixed}
    fisher = None
    if recipe.runs_back(dict.fromkeys(blocks, base)):
        inside = [name for name, index in blocks.items() if index >= 0]
        weights = source.weights(plan, head=True)
        fisher = measure(source.model, inside, tokens, weights, device, store.own("fisher"), progress=progress)
    Walker(
        source.model,
        plan,
        tokens,
        source.weights(plan),
        device,
        _Candidates(base, missing, recipe.target_shift, found, stored, fixed),
        recipe.true_sequential,
        lookups_first=False,
        progress=progress,
        fisher=fisher,
    ).run(_Sink(store, database.quantizers, key, found, with_own_weight(fixed)))
