"""Quantization time of quantkit's GPTQ beside llm-compressor's, on one model, one text and one machine.

    python -m quantkit.evals.compare_llmcompressor MODEL --peer-python PEER/bin/python
    python -m quantkit.evals.compare_llmcompressor smollm2 --peer-python PEER/bin/python --calibration valid.txt \
        --group-size 64 --bits 3 --output evals/results/DATE-cpu-llmcompressor-smollm2.json

Both sides run in processes of their own, in turn, and time only the quantization call: the model is loaded, the
calibration sequences are the same tokens, grids are symmetric, the head stays dense. llm-compressor runs with its
defaults for GPTQ (`quantkit.evals.peers` has how to install and how to call it); quantkit runs with its defaults, and
once with `--target-shift 0`, which is the same algorithm with one stream of activations. The bar: with the second
stream no slower than llm-compressor, without it in half its time. `--output` is written after each turn.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from quantkit.core.constants import TARGET_SHIFT
from quantkit.core.errors import QuantkitError
from quantkit.evals.machine import cpu_name, name_of, versions
from quantkit.evals.peers import PeerGrid, quantize_by_peer, run_script
from quantkit.evals.real import model_folder
from quantkit.io.classes import meta_model
from quantkit.io.source import load_tokenizer
from quantkit.run.recipe import Calibration

PEER, DEFAULT, ONE_STREAM = "llm-compressor", "quantkit", "quantkit, target shift 0"

_OURS = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from quantkit.api import quantize
from quantkit.run.recipe import Calibration

folder, sequences, bits, group_size, shift = sys.argv[1:]

class Fixed(Calibration):
    def sequences_apart(self, tokenizer, model, held_out):
        found = torch.load(sequences)
        return found, found[:0]

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
start = time.monotonic()
quantize(
    model, tokenizer, int(bits), group_size=int(group_size), calibration=Fixed(), target_shift=float(shift),
    device="cpu",
)
print(json.dumps(time.monotonic() - start))
"""


def turn(python: str, model: Path, sequences: torch.Tensor, bits: int, group_size: int) -> dict[str, Any]:
    """Seconds of each side's call, one after the other, and the peer's versions.

    Raises:
        QuantkitError: a side fails.
    """
    with tempfile.TemporaryDirectory() as name:
        grid = PeerGrid(PEER, bits, group_size, iterations=0)
        peer = quantize_by_peer(python, grid, model, sequences, Path(name), save=False)
        tokens = Path(name) / "tokens.pt"
        torch.save(sequences, tokens)
        asked = [str(model), str(tokens), str(bits), str(group_size)]
        found: dict[str, Any] = {PEER: peer.seconds, "versions": peer.versions}
        for side, shift in ((DEFAULT, TARGET_SHIFT), (ONE_STREAM, 0.0)):
            found[side] = run_script(sys.executable, _OURS, *asked, str(shift), name="quantkit", own=True)
    return found


def summary(seconds: Mapping[str, Sequence[float]]) -> str:
    """A line a side: its median and how it stands to the peer's."""
    peer = statistics.median(seconds[PEER])
    lines = []
    for side, runs in seconds.items():
        median, each = statistics.median(runs), ", ".join(f"{second:.2f}" for second in runs)
        lines.append(f"{side:26s} {median:8.2f} s   {median / peer:5.2f} x llm-compressor   (runs: {each})")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", help="folder, hub id, `reference` or `smollm2`")
    made.add_argument("--peer-python", required=True)
    made.add_argument("--calibration", default="stdlib", help="a text file, or what `quantkit quantize` takes")
    made.add_argument("--bits", type=int, default=3)
    made.add_argument("--group-size", type=int, default=128)
    made.add_argument("--num-samples", type=int, default=64)
    made.add_argument("--seqlen", type=int, default=512)
    made.add_argument("--runs", type=int, default=3)
    made.add_argument("--output", type=Path, metavar="JSON")
    return made


def main() -> None:
    """Runs the sides in turn and prints the ratios."""
    arguments = parser().parse_args()
    seconds: dict[str, list[float]] = {PEER: [], DEFAULT: [], ONE_STREAM: []}
    try:
        name, model = model_folder(arguments.model)
        calibration = Calibration(arguments.calibration, arguments.num_samples, arguments.seqlen)
        sequences = calibration.sequences(load_tokenizer(model), meta_model(model, None))
        record: dict[str, Any] = {
            "model": name, "calibration": name_of(arguments.calibration), "bits": arguments.bits,
            "group_size": arguments.group_size, "num_samples": sequences.shape[0], "seqlen": sequences.shape[1],
            "date": date.today().isoformat(), "hardware": cpu_name(), "threads": torch.get_num_threads(),
            "versions": {"quantkit": versions()}, "seconds": seconds,
        }  # fmt: skip
        for _ in range(arguments.runs):
            found = turn(arguments.peer_python, model, sequences, arguments.bits, arguments.group_size)
            record["versions"][PEER] = found["versions"]
            for side, runs in seconds.items():
                runs.append(round(found[side], 3))
            medians = {side: statistics.median(runs) for side, runs in seconds.items()}
            record["medians"] = medians
            record["ratios"] = {side: median / medians[PEER] for side, median in medians.items()}
            if arguments.output:
                arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    except QuantkitError as error:
        sys.exit(f"error: {error}")
    print(summary(seconds))


if __name__ == "__main__":
    main()
