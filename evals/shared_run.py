"""A run that several processes share, beside the same run of one: time, and whether the files are equal.

    python -m quantkit.evals.shared_run smollm2 --blocks 4 --calibration WIKITEXT/valid.txt --json FILE
    python -m quantkit.evals.shared_run reference --processes 4 --runs 3

MODEL is a folder, a hub id, `reference`, or `smollm2`; of a large one the first `--blocks` do, for each takes the same.
One process and several take turns, each process with one thread, so that on a CPU one core is busy and then
several; medians of `--runs` are told. Seconds are those of the run, and of the whole command with its imports.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from quantkit.evals.machine import cpu_name
from quantkit.evals.real import model_folder
from quantkit.io.source import load_tokenizer

RUNS = {
    "GPTQ, groups of 64": "quantize --bits 3 --group-size 64 --no-check",
    "trellis, 2^12 states": "quantize --bits 2 --method trellis --state-bits 12 --no-check",
    "search over GPTQ of 2, 3 and 4 bits": "search --avg-bits 3 --candidates gptq(2,64),gptq(3,64),gptq(4,64) "
    "--base gptq(3,64) --search-samples 24 --held-out 8 --generations 4 --offspring 8 --stages 2x2048,1x4096",
}
"""What is run, by label: a verb and its options."""


def command(processes: int, folder: Path, asked: Sequence[str], output: Path) -> list[str]:
    """A run's command; a search makes its candidates beside the output."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    verb, *options = asked
    more = ["--database", str(_candidates(output))] if verb == "search" else ["--quiet"]
    given = [verb, str(folder), "--output", str(output), *options, *more]
    return [sys.executable, *launch, "-m", "quantkit.cli", *given]


def _candidates(output: Path) -> Path:
    return output.with_name(f"{output.name}-candidates")


def timed(processes: int, folder: Path, options: Sequence[str], output: Path) -> tuple[float, float]:
    """Seconds (of the run, of the whole command)."""
    shutil.rmtree(_candidates(output), ignore_errors=True)
    start = time.monotonic()
    asked = command(processes, folder, [*options, "--device", "cpu", "--overwrite"], output)
    subprocess.run(asked, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    whole = time.monotonic() - start
    return float(json.loads((output / "quantkit_report.json").read_text())["seconds"]), whole


def are_equal(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors' files."""
    names = {path.name for folder in (one, other) for path in folder.glob("*.safetensors")}
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def measure(folder: Path, options: Sequence[str], processes: int, runs: int) -> dict[str, Any]:
    """One process and several in turn."""
    seconds: dict[int, list[tuple[float, float]]] = {1: [], processes: []}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        for _ in range(runs):
            for count, found in seconds.items():
                found.append(timed(count, folder, options, home / str(count)))
        equal = are_equal(home / "1", home / str(processes))
    (one, one_whole), (shared, shared_whole) = (
        [statistics.median(figures) for figures in zip(*seconds[count], strict=True)] for count in (1, processes)
    )
    return {
        "processes": processes,
        "bytes": "equal" if equal else "different",
        "seconds": [one, shared],
        "ratio": shared / one,
        "whole_seconds": [one_whole, shared_whole],
        "whole_ratio": shared_whole / one_whole,
    }


def shortened(folder: Path, blocks: int, to: Path) -> Path:
    """A model's first blocks, in a folder of their own."""
    AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=blocks).save_pretrained(to)
    load_tokenizer(folder).save_pretrained(to)
    return to


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--blocks", type=int, help="of the model; by default all")
    parser.add_argument("--calibration", default="stdlib", help="text to calibrate on")
    parser.add_argument("--num-samples", default="64")
    parser.add_argument("--seqlen", default="512")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--json", type=Path, help="rows; those of other models and numbers of processes stay")
    asked = parser.parse_args()
    name, folder = model_folder(asked.model)
    text = ["--calibration", asked.calibration, "--num-samples", asked.num_samples, "--seqlen", asked.seqlen]
    rows = json.loads(asked.json.read_text())["rows"] if asked.json and asked.json.exists() else []
    with tempfile.TemporaryDirectory() as home:
        model = folder if asked.blocks is None else shortened(folder, asked.blocks, Path(home) / "model")
        for label, options in RUNS.items():
            row = {"model": name, "blocks": asked.blocks, "run": label, "options": options}
            row |= measure(model, [*options.split(), *text], asked.processes, asked.runs)
            ratios = f"{row['ratio']:.3f} x, whole command {row['whole_ratio']:.3f} x"
            print(f"{label:36} {ratios}, bytes {row['bytes']}", flush=True)
            keys = ("model", "blocks", "run", "processes")
            rows = [other for other in rows if any(other[key] != row[key] for key in keys)] + [row]
    if asked.json:
        asked.json.write_text(json.dumps({"cpu": cpu_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
