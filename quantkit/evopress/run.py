"""A search from a model's folder to a checkpoint: candidates, evolution, then the checkpoint with its plan and picture.

It works in `<output>.partial`, where its state lies after every generation, and in the database of candidates, which
serves any number of searches.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.core import spec
from quantkit.core.products import full_width
from quantkit.evopress.assemble import assemble
from quantkit.evopress.budget import Budget
from quantkit.evopress.build import build
from quantkit.evopress.evolve import Outcome, Space, State
from quantkit.evopress.picture import draw
from quantkit.evopress.session import SearchRun, Session, check_text
from quantkit.evopress.spaces import BlockSpace, CandidateSpace
from quantkit.evopress.store import Database
from quantkit.io.checkpoint import stored_dtype
from quantkit.io.run_folder import Output
from quantkit.io.shards import Shards
from quantkit.io.source import load_tokenizer
from quantkit.models.plan import tied, with_own_weight
from quantkit.quantizers.target_shift import unshifted
from quantkit.run.processes import Together, together
from quantkit.run.report import Report

SEARCH_RECORD = "quantkit_search.json"
PLAN = "quantkit_plan.json"
PICTURE = "quantkit_search.png"


@dataclass(frozen=True)
class Watch:
    """Functions that a search calls on its way.

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
    """Results of a search.

    Attributes:
        output: the folder.
        outcome: what was found, and what it was measured against.
        measure: of the figures.
        evaluations, tokens: assignments that this part of the search measured, and text that they were measured on,
            all added up.
        seconds: wall-clock time of this part of the search.
        report: of the packed checkpoint; None where blocks were left out.
        plan: each packed layer's quantizer as text; empty where blocks were left out.
        left_out: those blocks.
        picture: whether it was drawn, for which matplotlib is needed.
    """

    output: Path
    outcome: Outcome
    measure: str
    evaluations: int
    tokens: int
    seconds: float = 0.0
    report: Report | None = None
    plan: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    picture: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON values: paths and figures; `fitness` is the last generation's, None where there was none."""
        outcome = self.outcome
        return {
            "output": str(self.output),
            "plan": str(self.output / PLAN) if self.plan else None,
            "picture": str(self.output / PICTURE) if self.picture else None,
            "layers": dict(self.plan),
            "left_out": list(self.left_out),
            "measure": self.measure,
            "fitness": outcome.history[-1].fitness if outcome.history else None,
            "held_out": outcome.held_out,
            "seen": outcome.seen,
            "budget": outcome.budget,
            "spent": outcome.spent,
            "generations": len(outcome.history),
            "evaluations": self.evaluations,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "report": None if self.report is None else self.report.to_json(),
        }


@full_width()
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
    output = Output(asked.output, asked.folder, asked.database, resume=resume, overwrite=overwrite)
    check_text(asked.text.num_samples, asked.settings)
    shared, where = together(device)
    packs_head = asked.recipe.head_bits is not None
    budget, said = shared.alike(lambda: asked.wanted.budget(asked.folder, where, packs_head))
    if shared.is_first and said:
        watch.note(said)
    identity = {"run": "search", "model": Shards(asked.folder).fingerprint()}
    with shared.within(lambda: output.begin(identity)):
        made, session, allowed = _prepared(asked, budget, shared, where, output, watch)

        def show(now: State) -> None:
            watch.generation(len(now.history), now.history[-1].fitness, now.history[-1].cost / allowed)

        outcome = session.search(allowed, output, show)

        def finished() -> Searched:
            """What was found, made."""
            measured = session.fitness
            found = Searched(asked.output, outcome, asked.settings.measure, measured.evaluations, measured.tokens)
            if made is None:
                found = replace(found, left_out=_prune(asked, session, outcome, output))
            else:
                report, plan, drawn = _pack(asked, session, made, outcome, output, where, begun)
                found = replace(found, report=report, plan=plan, picture=drawn)
            return replace(found, seconds=time.monotonic() - begun)

        return shared.lead(finished)


def _prepared(
    asked: SearchRun, budget: Budget, shared: Together, device: torch.device, output: Output, watch: Watch
) -> tuple[Database | None, Session, int]:
    """(the candidates, or None where blocks are left out; what can be chosen, and a measure; the budget in units)."""
    made: Database | None = None
    make_space: Callable[..., Space] = BlockSpace
    predictions = asked.database
    if asked.wanted.drop_blocks is None:
        made = build(
            asked.folder, asked.recipe, asked.candidates, asked.database, budget=budget, device=device,
            progress=watch.progress, shared=shared,
        )  # fmt: skip
        more = budget.check(made.source, tuple(made.blocks), made.quantizers.values(), made.fixed)
        if shared.is_first and more:
            watch.note(f"note: {more}")
        make_space = partial(
            CandidateSpace, database=made, cost=budget.cost, each_expert=asked.settings.each_expert
        )  # fmt: skip
    else:
        predictions = output.own("predictions") if shared.is_first else output.path("predictions")
    session = Session(asked.folder, make_space, predictions, asked.text, asked.settings, device, watch.progress)
    allowed = budget.units(made.source, [*made.blocks], made.fixed) if made else budget.units(None, session.space.names)
    session.space.index.check_budget(allowed)
    return made, session, allowed


def _pack(
    asked: SearchRun,
    session: Session,
    database: Database,
    outcome: Outcome,
    output: Output,
    device: torch.device,
    begun: float,
) -> tuple[Report, dict[str, str], bool]:
    """Makes a checkpoint of candidates, with its plan, its record and its picture.

    Returns:
        (the report; each packed layer's quantizer as text; whether the picture was drawn).
    """
    space = session.space
    assert isinstance(space, CandidateSpace)
    chosen = space.chosen(outcome.assignment)
    plan = {layer: spec.write(database.quantizers[key]) for layer, key in chosen.items()}
    shared, packed = tied(database.fixed), with_own_weight(database.fixed)
    plan |= {layer: spec.write(unshifted(packed[shared.get(layer, layer)])) for layer in database.fixed}
    measure, drawn = session.settings.measure, False

    def files(report: Report) -> dict[str, bytes]:
        """The plan, the search's record and its picture, for the checkpoint."""
        nonlocal drawn
        texts = {PLAN: _json({"layers": plan}), SEARCH_RECORD: _record(session, outcome, plan)}
        bits = {layer.name: layer.bits_per_weight for layer in report.layers if layer.name not in shared}
        with suppress(ImportError):
            texts[PICTURE] = draw(outcome, bits, measure)
            drawn = True
        return texts

    report = assemble(
        database, chosen, output, name=asked.name, files=files, device=device, start=begun,
        settings={"search": asdict(session.settings), "budget": outcome.budget},
    )  # fmt: skip
    return report, plan, drawn


def _prune(asked: SearchRun, session: Session, outcome: Outcome, output: Output) -> tuple[str, ...]:
    """Makes a dense checkpoint of the blocks that stay; the others' names."""
    space = session.space
    assert isinstance(space, BlockSpace)
    kept = {name: bool(level) for name, level in zip(space.names, outcome.assignment, strict=True)}
    stored = stored_dtype(asked.folder)
    pruned: Any = space.pruned(outcome.assignment)
    pruned = pruned if stored is None else pruned.to(stored)
    output.empty()
    output.take(pruned.save_pretrained)
    output.take(load_tokenizer(asked.folder).save_pretrained)
    output.write_bytes(output.made(SEARCH_RECORD), _record(session, outcome, kept))
    output.publish(Shards(output.path(output.made(""))).checksums())
    return tuple(name for name, stays in kept.items() if not stays)


def _record(session: Session, outcome: Outcome, layers: Mapping[str, Any]) -> bytes:
    return _json(asdict(outcome) | {"measure": session.settings.measure, "layers": layers})


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
