"""Fills the database: one walk over the model packs every layer in every way that is asked for.

Statistics are gathered once. A layer's candidates share its Hessian and, where they have the same damping and order of
columns, its factor. The prefix that feeds them is packed by one of the candidates, the base (EvoPress, section 4: all
levels are calibrated behind the same prefix), so that a layer's candidates do not depend on which others were chosen.
The head and the embedding may be packed beside them, in one way each (`Recipe.head_bits`): nothing is searched there,
and candidates do not see it. Several processes share the walk as they share that of `quantize`: one packs a layer in
all ways, the first writes what all have made.
"""

import socket
from collections.abc import Callable, Collection, Mapping
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
from quantkit.models.structure import ends, is_lookup
from quantkit.quantizers.factor import quantized
from quantkit.quantizers.target_shift import TargetShift
from quantkit.run.fisher import measure
from quantkit.run.packing import Pack, expected_kl, relative_error
from quantkit.run.processes import ALONE, CPU, Together
from quantkit.run.recipe import Recipe, beside_text
from quantkit.run.sequential import Walker, moved

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


@dataclass(frozen=True)
class _Sink:
    """Writes what a walk finds into the database.

    Attributes:
        store: the database.
        quantizers: of the candidates, by key.
        base: the key of those that the prefix is packed by.
        found: where the hook notes what this process makes.
        fixed: layers that are packed in one way.
        shared: processes that walk together.
    """

    store: Store
    quantizers: Mapping[str, Quantizer]
    base: str
    found: Found
    fixed: Mapping[str, Quantizer]
    shared: Together

    def finished(self, index: int) -> dict[str, QuantizedWeight] | None:
        """The block as the base packs it, where all candidates are there."""
        if not all(self.store.has(index, key) for key in self.quantizers):
            return None
        return self.store.load(index, self.base, self.store.candidates(index, self.base))

    def write(self, index: int, name: str, layers: dict[str, LayerResult]) -> None:
        """Takes the block's candidates, of all processes."""
        made = self._taken()
        if not self.shared.is_first:
            return
        for key, quantizer in self.quantizers.items():
            of_one = {layer: made[layer][quantizer] for layer in layers if quantizer in made.get(layer, ())}
            if of_one:
                self.store.write(index, key, quantizer, of_one)
        for layer in (layer for layer in layers if layer in self.fixed):
            self.store.write(index, end_key(layer, self.fixed[layer]), self.fixed[layer], {layer: layers[layer]})

    def _taken(self) -> Found:
        """What all processes have found, which then forget it."""
        own = {layer: dict(ways) for layer, ways in self.found.items() if ways}
        for ways in self.found.values():
            ways.clear()
        if self.shared.count > 1:  # another process may be on another device
            own = {layer: moved(ways, CPU) for layer, ways in own.items()}
        return {layer: ways for of_one in self.shared.each(lambda: own) for layer, ways in of_one.items()}


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
    shared: Together = ALONE,
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
        shared: processes that are asked for the same, and share the work; all have the database's folder.

    Raises:
        QuantkitError: bad input, an impossible budget, or a database of another model or calibration.
    """
    where, base = pick_device(device), recipe.quantizer
    assert base is not None
    found = shared.alike(lambda: lacking(folder, recipe, candidates, database, budget=budget, device=where))
    made, missing = found.database, shared.first(lambda: found.missing)
    shared.check_same(made.source.fingerprint)
    asked = {"identity": made.store.identity, "candidates": [*made.quantizers], "fixed": [*made.fixed]}
    wanted = shared.first(lambda: asked)

    def agree() -> None:
        """Holds what this process is asked for against what the first one is."""
        if asked != wanted:
            raise QuantkitError(
                f"what is asked for on {socket.gethostname()} is not what the first process is asked for"
            )

    shared.alike(agree)
    if not missing:
        return made
    shared.lead(made.source.check_finite)
    again = made.source.unpacked({**dict.fromkeys(made.blocks, base), **made.fixed})
    with shared.within(made.store.begin):
        _fill(made, missing, recipe, found.tokens, where, progress, shared)

    def there() -> None:
        """Looks for what the first process has written."""
        if not all(made.store.has(*place) for place in missing):
            raise QuantkitError(
                f"`database` {database} on {socket.gethostname()} does not hold what the first process has written "
                "there; give a folder that all processes share"
            )

    shared.alike(there)
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
        QuantkitError: an embedding or what text does not reach is to be searched, or blocks share weights.
    """
    plan, searched = recipe.plan(model), replace(recipe, head_bits=None).plan(model)
    for name in searched:
        if is_lookup(model.get_submodule(name)):
            raise QuantkitError(f"{name} is an embedding, and candidates are for linear layers; `head_bits` packs it")
    head = ends(model)[1]
    for name in beside_text(model, (name for name in searched if name != head)):
        raise QuantkitError(
            f"text does not reach {name}, and a search measures on text what candidates cost; leave it dense "
            "(`ignore`), or out of `include`: `quantkit quantize` packs it beside the plan that is found"
        )
    if shared := tied(searched):
        raise QuantkitError(
            f"blocks of {type(model).__name__} share weights, {next(iter(shared))} among them, which no search knows "
            "of; `quantkit quantize` packs them"
        )
    fixed = {name: quantizer for name, quantizer in plan.items() if name not in searched}
    return searched, {name: quantizer for name, quantizer in fixed.items() if tied(fixed).get(name) not in searched}


def _fill(
    database: Database,
    lacks: Collection[tuple[int, str]],
    recipe: Recipe,
    tokens: Tensor,
    device: torch.device,
    progress: Callable[[int, int, str], None],
    shared: Together,
) -> None:
    """Walks over the model and makes what is missing."""
    base, store, source = recipe.quantizer, database.store, database.source
    assert base is not None
    key, blocks, fixed = candidate_key(base), database.blocks, database.fixed
    found: Found = {name: {} for name in blocks}
    missing = {
        name: tuple(quantizer for other, quantizer in database.quantizers.items() if (index, other) in lacks)
        for name, index in blocks.items()
    }
    stored = {
        name: partial(store.load_one, index, key, name) for name, index in blocks.items() if (index, key) not in lacks
    }
    plan: Plan = {**dict.fromkeys(blocks, base), **fixed}
    fisher = None
    if recipe.runs_back(dict.fromkeys(blocks, base)):
        inside = [name for name, index in blocks.items() if index >= 0]
        weights = source.weights(plan, head=True)
        folder = shared.first(lambda: store.own("fisher"))
        fisher = measure(source.model, inside, tokens, weights, device, folder, progress=progress, together=shared)
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
        together=shared,
    ).run(_Sink(store, database.quantizers, key, found, with_own_weight(fixed), shared))
