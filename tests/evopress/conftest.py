"""A database of candidates of half the reference model, made once, and a session over it."""

import dataclasses
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit import GPTQ, RTN, Calibration, Recipe
from quantkit.evopress.build import build
from quantkit.evopress.session import SearchSettings, Session
from quantkit.evopress.settings import Evolution
from quantkit.evopress.spaces import CandidateSpace

CANDIDATES = (GPTQ(2), GPTQ(3), GPTQ(4), RTN(3))
LAYERS = 21  # of three blocks
TEXT = Calibration("stdlib", 20, 128, seed=1)
SHORT = SearchSettings(Evolution(3, 6, ((3, 256), (1, 1024))), held_out=8, sensitivity_tokens=256, top=2048)


@pytest.fixture(scope="package")
def half(reference, tokenizer, tmp_path_factory):
    """The reference model's first three blocks of six, with its head."""
    folder = tmp_path_factory.mktemp("models") / "half"
    AutoModelForCausalLM.from_pretrained(reference, num_hidden_layers=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def recipe():
    return Recipe(GPTQ(3), calibration=Calibration("stdlib", 8, 128))


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("search") / "candidates"


@pytest.fixture(scope="package")
def database(half, recipe, place):
    return build(half, recipe, CANDIDATES, place, device="cpu")


@pytest.fixture(scope="package")
def session(half, database, place):
    return make_session(half, database, place)


def make_session(folder, database, place, **changes):
    settings = dataclasses.replace(SHORT, **changes)
    make_space = partial(CandidateSpace, database=database)
    return Session(folder, make_space, place, TEXT, settings, torch.device("cpu"))
