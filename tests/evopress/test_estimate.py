"""What a search would make and measure is what it then makes and measures, and no weight is read to know it."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from quantkit import RTN, Calibration, Recipe
from quantkit.core.errors import QuantkitError
from quantkit.evopress.budget import Budget
from quantkit.evopress.build import build
from quantkit.evopress.estimate import estimate, measured
from quantkit.evopress.run import SearchRun
from quantkit.evopress.session import SearchSettings, Session
from quantkit.evopress.settings import Evolution
from quantkit.evopress.spaces import CandidateSpace
from quantkit.evopress.wanted import Wanted

CANDIDATES = (RTN(2, 32), RTN(4, 32))
TEXT = Calibration("stdlib", 6, 32, seed=1)
CPU = torch.device("cpu")


@pytest.fixture
def asked(model_folder, tmp_path):
    """Of a model whose shards have another form (NeoX), which the search itself loads whole."""
    return SearchRun(
        folder=model_folder("neox"),
        name="neox",
        output=tmp_path / "out",
        database=tmp_path / "candidates",
        wanted=Wanted(avg_bits=3.2),
        candidates=CANDIDATES,
        recipe=Recipe(CANDIDATES[1], calibration=Calibration("stdlib", 4, 32), head_bits=6),
        text=TEXT,
        settings=SearchSettings(Evolution(0, 5, ((2, 64), (1, 128))), held_out=2, sensitivity_tokens=64),
    )


def test_a_database_is_known_again_without_reading_weights(asked, monkeypatch):
    before = estimate(asked, "cpu")
    assert not asked.database.exists()
    assert before.missing == before.candidates == 2 * before.items + 2, "and the head and the embedding in one way"
    made = build(asked.folder, asked.recipe, CANDIDATES, asked.database, device=CPU)
    layers = [made.store.candidates(index, key) for index in (0, 1) for key in made.quantizers]
    ends = sum(result.weight.nbytes for result in made.ends().values())
    assert before.missing_bytes == ends + sum(one.nbytes for found in layers for one in found.values())

    def refuse(*_args, **_kwargs):
        raise AssertionError("weights are read")

    for place in ("quantkit.io.source.load", "quantkit.io.hf.load", "quantkit.io.shards.Shards.read"):
        monkeypatch.setattr(place, refuse)
    after = estimate(asked, "cpu")
    assert (after.missing, after.missing_bytes, after.candidate_seconds) == (0, 0, 0.0)
    assert after.candidate_bytes == before.candidate_bytes
    assert (after.budget, after.evaluations, after.tokens) == (before.budget, before.evaluations, before.tokens)


@pytest.mark.parametrize("start", ["best", "uniform"])
def test_evaluations_before_and_after_the_generations_are_counted_exactly(start, asked, tmp_path):
    settings = SearchSettings(asked.settings.evolution, start=start, held_out=2, sensitivity_tokens=64)
    database = build(asked.folder, asked.recipe, CANDIDATES, asked.database, device=CPU)
    make_space = partial(CandidateSpace, database=database)
    session = Session(asked.folder, make_space, tmp_path / "predictions", TEXT, settings, CPU)
    session.search(Budget(3.2, "bits").units(database.source, session.space.names))
    told = measured(settings, session.fitness.sequences, len(session.space.names))
    assert told == (session.fitness.evaluations, session.fitness.tokens)


def test_stages_are_counted_as_they_are_drawn():
    """8 offspring on 64 tokens, 2 of them and the parent on 96, which are 3 sequences; no stage for those that stay."""
    sequences = torch.zeros(6, 32, dtype=torch.int64)
    with_generations, without = (
        measured(SearchSettings(Evolution(count, 8, ((2, 64), (2, 96), (1, 96))), held_out=2), sequences, 4)
        for count in (10, 0)
    )
    assert with_generations[0] - without[0] == 10 * (8 + 3)
    assert with_generations[1] - without[1] == 10 * (8 * 64 + 3 * 96)


def test_a_budget_out_of_reach_is_refused(asked):
    with pytest.raises(QuantkitError, match=r"1\.9 bits per weight is impossible with these candidates"):
        estimate(replace(asked, wanted=Wanted(avg_bits=1.9)), "cpu")
    dear = estimate(replace(asked, wanted=Wanted(avg_bits=9)), "cpu")
    assert len(dear.notes) == 1 and "nothing to search" in dear.notes[0]
    assert not asked.database.exists()
