"""A whole search: candidates, the full model's predictions, starts, evolution, and the checkpoint that comes of it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel

import quantkit.io.hf
from quantkit.core.device import compute_dtype, multiplies_bf16
from quantkit.core.errors import QuantkitError
from quantkit.core.metrics import token_kl
from quantkit.core.protocols import Quantizer
from quantkit.evopress.baselines import greedy, knapsack, uniform
from quantkit.evopress.evolve import Assignment, Generation, Outcome, Space, State, evolve
from quantkit.evopress.fitness import Measure, ModelFitness
from quantkit.evopress.settings import Evolution
from quantkit.io.run_folder import RunFolder
from quantkit.io.source import load_tokenizer
from quantkit.models.experts import take_apart
from quantkit.run.recipe import Calibration, Recipe
from quantkit.run.teacher import CachedTeacher, predict

if TYPE_CHECKING:
    from quantkit.evopress.wanted import Wanted

logger = logging.getLogger(__name__)

Told = Callable[[int, int, str], None]
Start = Literal["best", "uniform", "predicted"]
PROBE = 256
"""Tokens on which the kept tokens' KL is held against the full one."""
_STATE = "search.json"
START_DRAW = -1
"""The text that sensitivities and starts are measured on; generations draw from 0 on."""


def _silent(_done: int, _total: int, _what: str) -> None:
    """The progress of a search that nobody watches."""


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search.

    Attributes:
        evolution: see there.
        measure: what is least in the end: "kl" to the full model, or the text's "perplexity".
        start: "uniform" levels, these or those that are "predicted" to be best, or the "best" of all `starts`.
        held_out: so many sequences of the text are kept for the comparison at the end.
        top: likeliest tokens of each token that are kept of the full model's predictions.
        sensitivity_tokens: on which each layer's sensitivity is measured.
        seed: of the search.
        each_expert: whether each expert is searched by itself, instead of all of a block's at the same place together.
    """

    evolution: Evolution = field(default_factory=Evolution)
    measure: Measure = "kl"
    start: Start = "best"
    held_out: int = 32
    top: int = 512
    sensitivity_tokens: int = 8192
    seed: int = 0
    each_expert: bool = False

    def __post_init__(self) -> None:
        for name in ("held_out", "top", "sensitivity_tokens"):
            if getattr(self, name) < 1:
                raise QuantkitError(f"{name}={getattr(self, name)}: give at least 1")
        if self.top < 512:
            raise QuantkitError(f"top={self.top}: fewer than 512 tokens hide too much of the KL")


@dataclass(frozen=True)
class SearchRun:
    """Settings of a search, with its model, folders and budget.

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


def check_text(sequences: int, settings: SearchSettings) -> None:
    """Raises QuantkitError where the held-out sequences leave nothing to search on."""
    if sequences <= settings.held_out:
        raise QuantkitError(f"{sequences} sequences of text, {settings.held_out} of them held out: give more of them")


def search_text(text: Calibration, tokenizer: Any, model: PreTrainedModel, settings: SearchSettings) -> Tensor:
    """What assignments are measured on, int64 [sequences, length]; warns where the last stage would draw more.

    Raises:
        QuantkitError: too little text.
    """
    sequences = text.sequences(tokenizer, model)
    check_text(len(sequences), settings)
    drawn = (len(sequences) - settings.held_out) * sequences.shape[1]
    if drawn < max(tokens for _, tokens in settings.evolution.stages):
        logger.warning("the search has %s tokens of text, less than its last stage would draw; give more", f"{drawn:,}")
    return sequences


class Session:
    """A model, what can be chosen for it, and a measure of assignments: one for any number of searches.

    Args:
        folder: the full-precision model.
        make_space: makes the search space of the loaded model, given the dtype of unpacked weights.
        predictions: folder for the full model's predictions; made where there is none, else reused.
        text: that assignments are measured on.
        settings: of the searches.
        device: where the model runs.
        told: called with (done, in all, of what).

    Raises:
        QuantkitError: bad input.
    """

    def __init__(
        self,
        folder: Path,
        make_space: Callable[[PreTrainedModel, torch.dtype], Space],
        predictions: Path,
        text: Calibration,
        settings: SearchSettings,
        device: torch.device,
        told: Told = _silent,
    ) -> None:
        self.settings, self._told, self._processes = settings, told, PartialState()
        model = quantkit.io.hf.load(folder, dtype=compute_dtype(device) or "auto", device=device).eval()
        take_apart(model)
        sequences = search_text(text, load_tokenizer(folder), model, settings)
        mixed = multiplies_bf16(device)
        self.text_digest = hashlib.sha256(f"{settings.top} ".encode() + sequences.numpy().tobytes()).hexdigest()[:12]
        with self._processes.main_process_first():
            teacher = CachedTeacher.fill(
                RunFolder(predictions / f"teacher-{self.text_digest}", "a teacher's predictions"),
                model,
                sequences,
                settings.top,
                lambda done, total: told(done, total, "the full model's predictions"),
                mixed,
            )
        with torch.no_grad():
            self._probe = predict(model, sequences[:1], mixed).logits[:, :PROBE].float().cpu()
        self.space = make_space(model, torch.bfloat16 if mixed else model.dtype)
        self.fitness = ModelFitness(self.space, teacher, sequences, settings.held_out, settings.measure, mixed)
        self._sensitivities: list[tuple[float, ...]] | None = None

    def sensitivities(self) -> list[tuple[float, ...]]:
        """What each layer's candidates alone cost the model, as small losses add up (HIGGS, arXiv 2411.17525).

        A layer at its lowest level among others at their highest is measured; its other levels count in proportion to
        their relative errors.
        """
        if self._sensitivities is None:
            top = tuple(len(costs) - 1 for costs in self.space.index.costs)
            worst = [(*top[:item], 0, *top[item + 1 :]) for item in range(len(top))]
            (best,) = self.fitness([top], self.settings.sensitivity_tokens, START_DRAW)
            figures: list[float] = []
            for first in range(0, len(worst), 16):
                self._told(first, len(worst), "each layer's sensitivity")
                found = self.fitness(worst[first : first + 16], self.settings.sensitivity_tokens, START_DRAW)
                figures += [max(figure - best, 0.0) for figure in found]
            self._told(len(worst), len(worst), "each layer's sensitivity")
            self._sensitivities = [
                tuple(figure * loss / (losses[0] or 1.0) for loss in losses)
                for figure, losses in zip(figures, self.space.losses, strict=True)
            ]
        return self._sensitivities

    def starts(self, budget: int) -> dict[str, Assignment]:
        """Assignments that cost no search, as the settings ask for them.

        They are uniform; a knapsack on predicted KL, where candidates have it; greedy and knapsack on relative errors
        and on sensitivities.

        Raises:
            QuantkitError: predictions are asked for that nobody has measured.
        """
        index, kind = self.space.index, self.settings.start
        plainest = {"uniform": uniform(index, budget)}
        if kind == "uniform":
            return plainest
        predicted: dict[str, Assignment] = {}
        if all(self.space.predicted):
            predicted = {"knapsack, predicted": knapsack(index, self.space.predicted, budget)}
        if kind == "predicted":
            lacking = [name for name, kl in zip(self.space.names, self.space.predicted, strict=True) if not kl]
            if lacking:
                raise QuantkitError(
                    f"nothing is predicted of {lacking[0]}: predictions are of linear layers in blocks, and of "
                    "candidates that were made with `fisher`"
                )
            return predicted | plainest
        plain, measured = self.space.losses, self.sensitivities()
        return (
            predicted
            | plainest
            | {
                "greedy": greedy(index, plain, budget),
                "knapsack": knapsack(index, plain, budget),
                "greedy, measured": greedy(index, measured, budget),
                "knapsack, measured": knapsack(index, measured, budget),
            }
        )

    def search(
        self, budget: int, folder: RunFolder | None = None, progress: Callable[[State], None] = lambda _state: None
    ) -> Outcome:
        """Searches under a budget.

        Args:
            budget: most that an assignment may cost.
            folder: to keep the search's state in, held by the first process; the search goes on from what is there.
            progress: called after each generation.

        Raises:
            QuantkitError: an impossible budget, or the state of another search.
        """
        settings, index = self.settings, self.space.index
        index.check_budget(budget)
        wanted = asdict(replace(settings, evolution=replace(settings.evolution, generations=0)))  # may be more now
        keeps = folder is not None and self._processes.is_main_process
        if folder is not None and keeps:
            space = json.dumps([self.space.names, self.space.identity, index.costs])
            folder.identify(
                {"settings": wanted, "budget": budget, "text": self.text_digest}
                | {"candidates": hashlib.sha256(space.encode()).hexdigest()[:12]}
            )
        record = None if folder is None else _read(folder)
        self._processes.wait_for_everyone()  # all have read the same
        if record is None:
            starts = self.starts(budget)
            figures = self.fitness([*starts.values()], settings.evolution.stages[-1][1], START_DRAW)
            state = State([*starts.values()][min(range(len(figures)), key=lambda i: figures[i])])
        else:
            starts, state = record

        def told(now: State) -> None:
            """Keeps the state, so that a killed search goes on from there, and passes it on."""
            if folder is not None and keeps:
                _write(folder, starts, now)
            progress(now)

        if record is None and folder is not None and keeps:
            _write(folder, starts, state)
        generator = torch.Generator().manual_seed(settings.seed)
        state = evolve(index, self.fitness, budget, generator, state, settings.evolution, told)
        compared = starts | {"search": state.parent}
        figures = self.fitness.on([*compared.values()], torch.arange(settings.held_out))
        held_out = dict(zip(compared, figures, strict=True))
        return Outcome(
            state.parent, starts, held_out, state.history, budget, index.cost(state.parent), self._seen(state.parent)
        )

    @torch.no_grad()
    def _seen(self, assignment: Assignment) -> float:
        """KL over the kept tokens and the rest as one event, by KL over the vocabulary."""
        self.space.apply(assignment)
        fitness, tokens = self.fitness, self.fitness.sequences[:1]
        found = predict(self.space.model, tokens, fitness.mixed)
        kept = fitness.teacher.divergence(tokens, torch.zeros(1, dtype=torch.int64), found)[0][:, :PROBE]
        return float(kept.mean() / token_kl(self._probe, found.logits[:, :PROBE].cpu()).mean())


def _write(folder: RunFolder, starts: Mapping[str, Assignment], state: State) -> None:
    history = [[line.fitness, line.former, line.cost, line.switched] for line in state.history]
    search = {"parent": state.parent, "history": history, "random": state.random.hex()}
    folder.write_record(_STATE, {"starts": starts, "state": search})


def _read(folder: RunFolder) -> tuple[dict[str, Assignment], State] | None:
    """The starts and the state of an unfinished search; None where there is none."""
    if not folder.has(_STATE):
        return None
    found = folder.read_record(_STATE, "a search's state; remove it")
    starts = {name: tuple(levels) for name, levels in found["starts"].items()}
    search = found["state"]
    history = tuple(Generation(*line) for line in search["history"])
    return starts, State(tuple(search["parent"]), history, bytes.fromhex(search["random"]))
