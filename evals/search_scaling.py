"""What a search costs as a model gets deeper: seconds a generation of untrained models of one width.

    python -m quantkit.evals.search_scaling MODEL --blocks 6 12 24

Models have MODEL's config and tokenizer but for their depth. One table row each; the generations of all are timed in
turns, so that a machine's other load falls on all of them alike.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.core.device import pick_device
from quantkit.evopress.baselines import uniform
from quantkit.evopress.budget import Budget
from quantkit.evopress.build import build
from quantkit.evopress.evolve import Assignment, evolve
from quantkit.evopress.session import SearchSettings, Session
from quantkit.evopress.settings import Evolution, parse_stages, stages_text
from quantkit.evopress.spaces import CandidateSpace
from quantkit.io.hf import resolve_folder
from quantkit.io.source import load_tokenizer
from quantkit.quantizers.rtn import RTN
from quantkit.run.recipe import Calibration, Recipe

Prepared = tuple[Session, int, Assignment]


def prepare(
    source: Path, blocks: int, folder: Path, text: Calibration, evolution: Evolution, device: torch.device
) -> Prepared:
    """An untrained model's session, its budget and the assignment to begin from."""
    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers = blocks
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    load_tokenizer(source).save_pretrained(folder / "model")
    recipe = Recipe(RTN(3), target_shift=0, calibration=Calibration(text.source, 4, text.seqlen))
    database = build(folder / "model", recipe, (RTN(2), RTN(4)), folder / "candidates", device=device)
    make_space = partial(CandidateSpace, database=database)
    settings = SearchSettings(evolution, held_out=1)
    session = Session(folder / "model", make_space, folder / "candidates", text, settings, device)
    budget = Budget(3.2, "bits").units(database.source, session.space.names)
    return session, budget, uniform(session.space.index, budget)


def main() -> None:
    """Parses the command line and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--generations", type=int, default=6, help="timed, after one that is not")
    parser.add_argument("--offspring", type=int, default=Evolution.offspring)
    parser.add_argument("--stages", default=stages_text(Evolution.stages))
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    source, device = resolve_folder(arguments.model), pick_device(arguments.device)
    evolution = Evolution(1, arguments.offspring, parse_stages(arguments.stages))
    text = Calibration(arguments.data, 40, arguments.seqlen, seed=1)
    with tempfile.TemporaryDirectory() as made:
        runs = {
            blocks: prepare(source, blocks, Path(made) / str(blocks), text, evolution, device)
            for blocks in arguments.blocks
        }
        seconds: dict[int, list[float]] = {blocks: [] for blocks in runs}
        parents = {blocks: start for blocks, (_, _, start) in runs.items()}
        for number in range(1 + arguments.generations):
            for blocks, (session, budget, _) in runs.items():
                begun = time.monotonic()
                generator = torch.Generator().manual_seed(number)
                state = evolve(
                    session.space.index, session.fitness, budget, generator, parents[blocks], evolution
                )  # one generation
                parents[blocks] = state.parent
                if number:
                    seconds[blocks].append(time.monotonic() - begun)
    print("| blocks | layers | seconds a generation (median) | by the fewest blocks |")
    print("|---|---|---|---|")
    first = statistics.median(seconds[arguments.blocks[0]])
    for blocks, times in seconds.items():
        middle = statistics.median(times)
        print(f"| {blocks} | {len(runs[blocks][0].space.names)} | {middle:.2f} | {middle / first:.2f} |")


if __name__ == "__main__":
    main()
