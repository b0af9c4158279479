"""A search that several processes share: shared_search.py MODEL DATABASE OUTPUT."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

from quantkit import GPTQ, RTN, Calibration, Recipe
from quantkit.evopress.build import build
from quantkit.evopress.session import SearchSettings, Session
from quantkit.evopress.settings import Evolution
from quantkit.evopress.spaces import CandidateSpace


def main(model, place, output):
    processes = PartialState(cpu=True)
    recipe = Recipe(GPTQ(3), calibration=Calibration("stdlib", 8, 128))
    with processes.main_process_first():
        database = build(Path(model), recipe, (GPTQ(2), GPTQ(3), GPTQ(4), RTN(3)), Path(place), device="cpu")
    settings = SearchSettings(
        Evolution(2, 5, ((2, 256), (1, 512))), start="uniform", held_out=4, sensitivity_tokens=256, top=512
    )
    text = Calibration("stdlib", 12, 128, seed=2)
    make_space = partial(CandidateSpace, database=database)
    session = Session(Path(model), make_space, Path(place), text, settings, torch.device("cpu"))
    outcome = session.search(session.space.index.cost((1,) * len(session.space.names)))
    record = {"assignment": outcome.assignment, "history": [line.fitness for line in outcome.history]}
    record |= {"held_out": outcome.held_out, "processes": processes.num_processes}
    Path(output, f"{processes.process_index}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
