"""Quality of block-wise tuning beside auto-round's, on one model, one calibration text and one judge.

    python -m quantkit.evals.compare_auto_round MODEL --peer-python OTHER/bin/python

Both sides get the same calibration sequences, bits and group size, symmetric grids, and leave the head dense.
auto-round runs with its defaults and 200 iterations (`quantkit.evals.peers` has how to install and how to call it);
quantkit quantizes by GPTQ with its defaults, once as it is and once with its blocks tuned. What auto-round has made is
loaded with dense weights and judged by quantkit: held-out KL to the full-precision model.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from quantkit.api import quantize
from quantkit.core.errors import QuantkitError
from quantkit.evals.machine import name_of
from quantkit.evals.peers import DENSE, PeerGrid, quantize_by_peer
from quantkit.evals.perplexity import evaluate
from quantkit.evals.real import model_folder
from quantkit.io.hf import load
from quantkit.io.source import load_tokenizer
from quantkit.run.documents import documents
from quantkit.run.recipe import Calibration
from quantkit.run.text import evaluation_text


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs both sides at every bit width; prints a row of the table for each as it is done.

    Raises:
        QuantkitError: bad input, or the peer fails.
    """
    _, folder = model_folder(arguments.model)
    tokenizer = load_tokenizer(folder)
    baseline = load(folder, dtype=torch.float32).eval()
    text = Calibration(arguments.calibration, arguments.num_samples, arguments.seqlen)
    judged = evaluation_text(documents(arguments.data, "evaluation"), tokenizer)
    rows: list[dict[str, Any]] = []

    def judge(name: str, bits: int, model: Any, seconds: float) -> None:
        """Evaluates a model, keeps its row and prints it."""
        found = evaluate(model.eval(), judged, arguments.seqlen, baseline=baseline, num_samples=arguments.max_windows)
        rows.append({"name": name, "bits": bits, "seconds": seconds} | asdict(found))
        kl, error = 1000 * (found.kl or 0), 1000 * (found.kl_se or 0)
        print(f"| {bits} | {name} | {kl:.2f} +- {error:.2f} | {found.perplexity:.3f} | {seconds:.0f} |", flush=True)

    print("| bits | method | KL x 1000 | perplexity | seconds |")
    print("|---|---|---|---|---|")
    sequences = text.sequences(tokenizer, baseline)
    for bits in arguments.bits:
        with tempfile.TemporaryDirectory() as workspace:
            grid = PeerGrid("auto-round", bits, arguments.group_size, iterations=arguments.iterations)
            peer = quantize_by_peer(arguments.peer_python, grid, folder, sequences, Path(workspace))
            judge("auto-round", bits, load(Path(workspace) / DENSE, dtype=torch.float32), peer.seconds)
        for steps in (0, arguments.steps):
            model = load(folder, dtype=torch.float32)
            quantize(model, tokenizer, bits, group_size=arguments.group_size, calibration=text, tune_blocks=steps)
            name = f"GPTQ, blocks tuned in {steps} steps" if steps else "GPTQ"
            report: Any = model.quantkit_report
            judge(name, bits, model, report.seconds)
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", help="folder, hub id, `reference` or `smollm2`")
    made.add_argument("--peer-python", required=True)
    made.add_argument("--data", default="stdlib")
    made.add_argument("--calibration", default="stdlib")
    made.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    made.add_argument("--group-size", type=int, default=64)
    made.add_argument("--num-samples", type=int, default=64)
    made.add_argument("--seqlen", type=int, default=512)
    made.add_argument("--iterations", type=int, default=200, help="of auto-round")
    made.add_argument("--steps", type=int, default=200, help="of quantkit's tuning of each block")
    made.add_argument("--max-windows", type=int, default=64)
    made.add_argument("--output", type=Path)
    return made


def main() -> None:
    """Parses the command line, prints the table and writes its rows."""
    arguments = parser().parse_args()
    try:
        rows = measure(arguments)
    except QuantkitError as error:
        sys.exit(f"error: {error}")
    if arguments.output:
        names = {name: name_of(getattr(arguments, name)) for name in ("model", "data", "calibration")}
        kept = {name: value for name, value in vars(arguments).items() if name not in ("output", "peer_python")}
        arguments.output.write_text(json.dumps({"settings": kept | names, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
