"""What a search is worth: held-out KL at equal bytes, beside uniform levels and what else costs less than a search.

    python -m quantkit.evals.search MODEL --data stdlib

One markdown row per budget, in measured bits per weight of the packed layers; every column keeps to the same bytes.
"predicted" is what one pass back through the model says (`quantkit.run.prediction`): a knapsack on it, and a search
that begins there and measures no layer. "search" begins at the best of all. Held-out sequences are of the evaluation
part of `--data`, or of `--test`; fitness reads the calibration part. All rows use one database.
"""

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.core import spec
from quantkit.core.constants import TARGET_SHIFT
from quantkit.core.device import pick_device
from quantkit.evals.machine import cpu_name, name_of, versions
from quantkit.evals.perplexity import Quality, evaluate
from quantkit.evopress.baselines import best_of_random
from quantkit.evopress.budget import Budget
from quantkit.evopress.build import build
from quantkit.evopress.evolve import Assignment
from quantkit.evopress.session import SearchSettings, Session, Start
from quantkit.evopress.settings import Evolution, parse_stages, stages_text
from quantkit.evopress.spaces import CandidateSpace
from quantkit.io.hf import load, resolve_folder
from quantkit.io.source import load_tokenizer
from quantkit.run.documents import documents
from quantkit.run.recipe import Calibration, Recipe
from quantkit.run.text import evaluation_text

SEARCHES: dict[str, Start] = {"search, predicted": "predicted", "search": "best"}
NAMES = (
    *("uniform", "random, best of 32", "greedy", "knapsack", "greedy, measured", "knapsack, measured"),
    *("knapsack, predicted", *SEARCHES),
)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows; each is printed as it is done."""
    folder, device = resolve_folder(arguments.model), pick_device(arguments.device)
    candidates = spec.read_several(arguments.candidates)
    recipe = Recipe(
        spec.read(arguments.base),
        target_shift=TARGET_SHIFT,
        fisher=True,
        calibration=Calibration(arguments.data, arguments.num_samples, arguments.seqlen),
    )
    evolution = Evolution(
        arguments.generations, arguments.offspring, parse_stages(arguments.stages), rule=arguments.rule
    )
    settings = SearchSettings(
        evolution, held_out=arguments.held_out, sensitivity_tokens=arguments.sensitivity_tokens, seed=arguments.seed
    )
    text = Calibration(arguments.data, arguments.search_samples, arguments.seqlen, seed=1)
    begun = time.monotonic()
    database = build(folder, recipe, tuple(candidates), arguments.database, device=device)
    session = Session(folder, partial(CandidateSpace, database=database), arguments.database, text, settings, device)
    teacher = load(folder, dtype=session.space.model.dtype, device=device).eval()
    judged = evaluation_text(documents(arguments.test or arguments.data, "evaluation"), load_tokenizer(folder))
    measured: dict[Assignment, Quality] = {}

    def judge(assignment: Assignment) -> tuple[float, float]:
        """(KL to the full model, its standard error), nats a token, on text that no search sees."""
        if assignment not in measured:
            session.space.apply(assignment)
            measured[assignment] = evaluate(
                session.space.model, judged, arguments.seqlen, baseline=teacher, num_samples=arguments.max_windows
            )
        return measured[assignment].kl or 0.0, measured[assignment].kl_se or 0.0

    made = time.monotonic()
    session.sensitivities()
    print(f"candidates and predictions: {made - begun:.0f} s, sensitivities: {time.monotonic() - made:.0f} s")
    print("| bits/weight | " + " | ".join(NAMES) + " | seconds of both searches |")
    print("|---" * (len(NAMES) + 2) + "|")
    rows = []
    for bits in arguments.bits:
        budget = Budget(bits, "bits").units(database.source, session.space.names)
        row: dict[str, Any] = {"bits": bits, "seconds": {}}
        found = session.starts(budget)
        for name, start in SEARCHES.items():
            session.settings, begun = replace(settings, start=start), time.monotonic()
            outcome = session.search(budget)
            row["seconds"][name], found[name] = time.monotonic() - begun, outcome.assignment
        session.settings = settings
        found["random, best of 32"] = best_of_random(
            session.space.index, session.fitness, budget, torch.Generator().manual_seed(arguments.seed),
            tokens=evolution.stages[-1][1],
        )  # fmt: skip
        row["kl"] = {name: judge(found[name]) for name in NAMES}
        row["levels"] = dict(zip(session.space.names, found["search"], strict=True))
        rows.append(row)
        cells = [f"{1000 * kl:.1f} +- {1000 * se:.1f}" for kl, se in row["kl"].values()]
        cells.append(", ".join(f"{seconds:.0f}" for seconds in row["seconds"].values()))
        print(f"| {bits:g} | " + " | ".join(cells) + " |", flush=True)
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model")
    made.add_argument("--data", default="wikitext2")
    made.add_argument("--test", help="text that decides in the end, where it is another")
    made.add_argument("--bits", type=float, nargs="+", default=[2.25, 2.5, 3, 3.14, 4])
    made.add_argument("--candidates", default="gptq(2), gptq(3), gptq(4), gptq(5), gptq(6), gptq(8)")
    made.add_argument("--base", default="gptq(3)")
    made.add_argument("--database", type=Path, default=Path("search-candidates"))
    made.add_argument("--num-samples", type=int, default=128, help="sequences that candidates are calibrated on")
    made.add_argument("--search-samples", type=int, default=256, help="sequences that fitness is measured on")
    made.add_argument("--max-windows", type=int, default=128, help="sequences that decide in the end")
    made.add_argument("--seqlen", type=int, default=512)
    made.add_argument("--generations", type=int, default=Evolution.generations)
    made.add_argument("--offspring", type=int, default=Evolution.offspring)
    made.add_argument("--stages", default=stages_text(Evolution.stages), help="survivors x tokens")
    made.add_argument("--rule", choices=("any", "size"), default="any")
    made.add_argument("--held-out", type=int, default=SearchSettings.held_out, help="of those, for its own comparison")
    made.add_argument("--sensitivity-tokens", type=int, default=SearchSettings.sensitivity_tokens)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="auto")
    made.add_argument("--output", type=Path)
    return made


def main() -> None:
    """Parses the command line."""
    arguments = parser().parse_args()
    found = measure(arguments)
    if arguments.output:
        said = {name: value for name, value in vars(arguments).items() if name not in ("database", "output")}
        settings = {name: name_of(value) if isinstance(value, str) else value for name, value in said.items()}
        record = {"machine": cpu_name(), "versions": versions(), "settings": settings}
        arguments.output.write_text(json.dumps(record | {"rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
