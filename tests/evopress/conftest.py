"""A database of the reference model's candidates, made once, and a session over it."""

import dataclasses
from functools import partial

import pytest
import torch

from quantkit import GPTQ, RTN, Calibration, Recipe
from quantkit.evopress.build import build
from quantkit.evopress.session import SearchSettings, Session
from quantkit.evopress.settings import Evolution
from quantkit.evopress.spaces import CandidateSpace

CANDIDATES = (GPTQ(2), GPTQ(3), GPTQ(4), RTN(3))
TEXT = Calibration("stdlib", 20, 128, seed=1)
SHORT = SearchSettings(Evolution(3, 6, ((3, 256), (1, 1024))), held_out=8, sensitivity_tokens=256, top=2048)


@pytest.fixture(scope="package")
def recipe():
    return Recipe(GPTQ(3), calibration=Calibration("stdlib", 8, 128))


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("search") / "candidates"


@pytest.fixture(scope="package")
def database(reference, recipe, place):
    return build(reference, recipe, CANDIDATES, place, device="cpu")


@pytest.fixture(scope="package")
def session(reference, database, place):
    return make_session(reference, database, place)


def make_session(reference, database, place, **changes):
    settings = dataclasses.replace(SHORT, **changes)
    make_space = partial(CandidateSpace, database=database)
    return Session(reference, make_space, place, TEXT, settings, torch.device("cpu"))
