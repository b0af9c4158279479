"""A search from a model's folder to a checkpoint: candidates, evolution, then the checkpoint with its plan and picture.

It works in `<output>.search`, where its state lies after every generation, and in the database of candidates, which
serves any number of searches.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.core import spec
from quantkit.core.device import parse_dtype
from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Quantizer
from quantkit.evopress.assemble import assemble
from quantkit.evopress.budget import Budget
from quantkit.evopress.build import build
from quantkit.evopress.evolve import Outcome, Space, State
from quantkit.evopress.picture import draw
from quantkit.evopress.session import SearchSettings, Session, check_text
from quantkit.evopress.spaces import BlockSpace, CandidateSpace
from quantkit.evopress.store import Database
from quantkit.evopress.wanted import Wanted
from quantkit.io.checkpoint import SEARCH_RECORD, check_output, read_config, replace_folder
from quantkit.io.source import load_tokenizer
from quantkit.models.plan import tied, with_own_weight
from quantkit.quantizers.target_shift import unshifted
from quantkit.run.processes import begin_processes
from quantkit.run.recipe import Calibration, Recipe
from quantkit.run.report import Report

PLAN = "quantkit_plan.json"
PICTURE = "quantkit_search.png"


@dataclass(frozen=True)
class SearchRun:
    """All that a search is asked for.

    Attributes:
        folder, name: of the full-precision model, and what reports call it.
        output: the folder to make.
        database: the folder of the candidates; made where there is none.
        wanted: the budget.
        candidates: ways to pack a layer; `recipe`'s quantizer is one of them.
        recipe: how layers in front are packed, which are left out, and the calibration.
        text: that assignments are measured on.
        settings: of the search.
    """

    folder: Path
    name: str
    output: Path
    database: Path
    wanted: Wanted
    candidates: tuple[Quantizer, ...]
    recipe: Recipe
    text: Calibration
    settings: SearchSettings

    @property
    def unfinished(self) -> Path:
        """Where the search works."""
        return self.output.with_name(self.output.name + ".search")


@dataclass(frozen=True)
class Watch:
    """What is told on the way.

    Attributes:
        progress: (done, in all, of what) of what comes before the generations.
        generation: (generations done, the best's fitness, fraction of the budget that it takes).
        note: sentences that a user should read.
    """

    progress: Callable[[int, int, str], None] = lambda done, total, what: None
    generation: Callable[[int, float, float], None] = lambda done, fitness, fraction: None
    note: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Searched:
    """What a search made.

    Attributes:
        outcome: what was found, and what it was measured against.
        measure: of the figures.
        report: of the packed checkpoint; None where blocks were left out.
        left_out: those blocks.
        picture: whether it was drawn, for which matplotlib is needed.
    """

    outcome: Outcome
    measure: str
    report: Report | None = None
    left_out: tuple[str, ...] = ()
    picture: bool = False


def run(
    asked: SearchRun,
    device: str | torch.device | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> Searched | None:
    """Searches, and makes the checkpoint.

    Args:
        asked: what for.
        device: where the model runs; by default a GPU if there is one.
        resume: go on with an unfinished search; overwrite: replace one, and the output.
        watch: what is told on the way.

    Returns:
        What was made; None in processes other than the first.

    Raises:
        QuantkitError: bad input; the message says what would work.
    """
    begun, watch = time.monotonic(), watch or Watch()
    check_output(asked.output, asked.folder, resume=resume, overwrite=overwrite)
    if asked.unfinished.exists() and not (resume or overwrite):
        raise QuantkitError(
            f"{asked.unfinished} holds an unfinished search; `resume` continues it, `overwrite` starts anew"
        )
    check_text(asked.text.num_samples, asked.settings)
    processes, where = begin_processes(device)
    main = processes.is_main_process
    budget, said = asked.wanted.budget(asked.folder, where, asked.recipe.head_bits is not None)
    if main and said:
        watch.note(said)
    if main and not resume:
        _remove(asked.unfinished)
    made, session, allowed = _prepared(asked, budget, processes, where, watch)
    asked.unfinished.mkdir(parents=True, exist_ok=True)

    def show(now: State) -> None:
        watch.generation(len(now.history), now.history[-1].fitness, now.history[-1].cost / allowed)

    outcome = session.search(allowed, asked.unfinished / "search.json", show)
    found = None
    if main:
        found = (
            _prune(asked, session, outcome)
            if made is None
            else _pack(asked, session, made, outcome, where, begun, overwrite)
        )
        _remove(asked.unfinished)
    processes.wait_for_everyone()
    return found


def _prepared(
    asked: SearchRun, budget: Budget, processes: Any, device: torch.device, watch: Watch
) -> tuple[Database | None, Session, int]:
    """(the candidates, or None where blocks are left out; what can be chosen, and a measure; the budget in units)."""
    made: Database | None = None
    make_space: Callable[..., Space] = BlockSpace
    if asked.wanted.drop_blocks is None:
        with processes.main_process_first():
            made = build(
                asked.folder, asked.recipe, asked.candidates, asked.database, budget=budget, device=device,
                progress=watch.progress,
            )  # fmt: skip
        more = budget.check(made.source, tuple(made.blocks), made.quantizers.values(), made.fixed)
        if processes.is_main_process and more:
            watch.note(f"note: {more}")
        make_space = partial(CandidateSpace, database=made, cost=budget.cost)
    predictions = asked.unfinished if made is None else asked.database
    session = Session(asked.folder, make_space, predictions, asked.text, asked.settings, device, watch.progress)
    names = session.space.names
    allowed = budget.units(made.source, names, made.fixed) if made else budget.units(None, names)
    session.space.index.check_budget(allowed)
    return made, session, allowed


def _pack(
    asked: SearchRun,
    session: Session,
    database: Database,
    outcome: Outcome,
    device: torch.device,
    begun: float,
    overwrite: bool,
) -> Searched:
    """Makes a checkpoint of candidates, with its plan, its record and its picture."""
    space = session.space
    assert isinstance(space, CandidateSpace)
    chosen = space.chosen(outcome.assignment)
    plan = {layer: spec.write(database.quantizers[key]) for layer, key in chosen.items()}
    shared, packed = tied(database.fixed), with_own_weight(database.fixed)
    plan |= {layer: spec.write(unshifted(packed[shared.get(layer, layer)])) for layer in database.fixed}
    files = {
        PLAN: json.dumps({"layers": plan}, indent=2) + "\n",
        SEARCH_RECORD: _record(session, outcome, plan),
    }
    settings = {"search": asdict(session.settings), "budget": outcome.budget}
    report = assemble(
        asked.folder, database, chosen, asked.output, name=asked.name, settings=settings, files=files, device=device,
        start=begun, overwrite=overwrite,
    )  # fmt: skip
    bits = {layer.name: layer.bits_per_weight for layer in report.layers if layer.name not in shared}
    drawn = False
    with suppress(ImportError):
        draw(outcome, bits, session.settings.measure, asked.output / PICTURE)
        drawn = True
    return Searched(outcome, session.settings.measure, report, picture=drawn)


def _prune(asked: SearchRun, session: Session, outcome: Outcome) -> Searched:
    """Makes a dense checkpoint of the blocks that stay."""
    space = session.space
    assert isinstance(space, BlockSpace)
    kept = {name: bool(level) for name, level in zip(space.names, outcome.assignment, strict=True)}
    finished = asked.unfinished / "checkpoint"
    stored = parse_dtype(read_config(asked.folder).get("dtype"))
    pruned: Any = space.pruned(outcome.assignment)
    (pruned if stored is None else pruned.to(stored)).save_pretrained(finished)
    load_tokenizer(asked.folder).save_pretrained(finished)
    (finished / SEARCH_RECORD).write_text(_record(session, outcome, kept))
    replace_folder(finished, asked.output)
    left_out = tuple(name for name, stays in kept.items() if not stays)
    return Searched(outcome, session.settings.measure, left_out=left_out)


def _record(session: Session, outcome: Outcome, layers: Mapping[str, Any]) -> str:
    record = asdict(outcome) | {"measure": session.settings.measure, "layers": layers}
    return json.dumps(record, indent=2) + "\n"


def _remove(unfinished: Path) -> None:
    """Deletes a search's own files, and its folder where nothing else is in it."""
    (unfinished / "search.json").unlink(missing_ok=True)
    for made in (*unfinished.glob("teacher-*"), *unfinished.glob("checkpoint")):
        shutil.rmtree(made)
    if unfinished.is_dir() and not any(unfinished.iterdir()):
        unfinished.rmdir()
