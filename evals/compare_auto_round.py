"""Quality of block-wise tuning beside auto-round's, on one model, one calibration text and one judge.

    pip install auto-round                                        (in an environment of its own)
    python evals/compare_auto_round.py MODEL --peer-python OTHER/bin/python

Both sides get the same calibration sequences, bits and group size, symmetric grids, and leave the head dense.
auto-round runs with its defaults and 200 iterations; quantkit quantizes by GPTQ with its defaults, once as it is and
once with its blocks tuned. What auto-round has made is loaded with dense weights and judged by quantkit: held-out KL to
the full-precision model.
"""

import argparse
import json
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

_THEIRS = """
import sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from auto_round import AutoRound

folder, windows, bits, group_size, iterations, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
windows = torch.load(windows)
start = time.monotonic()
rounding = AutoRound(
    model, AutoTokenizer.from_pretrained(folder), bits=int(bits), group_size=int(group_size), sym=True,
    iters=int(iterations), dataset=list(windows.split(1)), nsamples=len(windows), seqlen=windows.shape[1],
    amp=False, device_map="cpu",
)
model, _ = rounding.quantize()
seconds = time.monotonic() - start
model.save_pretrained(output)
print(seconds)
"""


def theirs(python: str, *arguments: Any) -> float:
    """Seconds that auto-round took.

    Raises:
        SystemExit: it failed; the message is the end of what it wrote.
    """
    done = subprocess.run([python, "-c", _THEIRS, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Runs both sides at every bit width and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=200, help="of auto-round")
    parser.add_argument("--steps", type=int, default=200, help="of quantkit's tuning of each block")
    parser.add_argument("--max-windows", type=int, default=64)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    import torch

    from quantkit.api import quantize
    from quantkit.evals.perplexity import evaluate
    from quantkit.io.hf import load
    from quantkit.io.source import load_tokenizer
    from quantkit.run.documents import documents
    from quantkit.run.recipe import Calibration
    from quantkit.run.text import evaluation_text

    folder = Path(arguments.model)
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
    with tempfile.TemporaryDirectory() as workspace:
        windows = Path(workspace) / "windows.pt"
        torch.save(text.sequences(tokenizer, baseline), windows)
        for bits in arguments.bits:
            made = Path(workspace) / f"peer-{bits}"
            peer = (windows, bits, arguments.group_size, arguments.iterations, made)
            seconds = theirs(arguments.peer_python, arguments.model, *peer)
            judge("auto-round", bits, load(made, dtype=torch.float32), seconds)
            for steps in (0, arguments.steps):
                model = load(folder, dtype=torch.float32)
                quantize(model, tokenizer, bits, group_size=arguments.group_size, calibration=text, tune_blocks=steps)
                name = f"GPTQ, blocks tuned in {steps} steps" if steps else "GPTQ"
                report: Any = model.quantkit_report
                judge(name, bits, model, report.seconds)
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"settings": vars(arguments) | {"output": None}, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
