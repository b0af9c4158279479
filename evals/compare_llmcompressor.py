"""Quantization time of quantkit's GPTQ beside llm-compressor's, on one model, one text and one machine.

    pip install llmcompressor "compressed-tensors>=0.18"          (in an environment of its own)
    python evals/compare_llmcompressor.py MODEL --peer-python OTHER/bin/python

Both sides run in processes of their own, in turn, and time only the quantization call: the model is loaded, the
calibration sequences are the same tokens, weights are symmetric 3-bit in groups of 128, the head stays dense.
llm-compressor runs with its defaults for GPTQ; quantkit runs with its defaults, and once with `--target-shift 0`,
which is the same algorithm with one stream of activations.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_OURS = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from quantkit.api import quantize
from quantkit.run.recipe import Calibration

class Fixed(Calibration):
    def sequences(self, tokenizer, model):
        return torch.load(sys.argv[2])

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
start = time.monotonic()
quantize(model, tokenizer, 3, calibration=Fixed(), target_shift=float(sys.argv[3]))
print(json.dumps(time.monotonic() - start))
"""

_THEIRS = """
import json, sys, time, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
windows = torch.load(sys.argv[2])
rows = Dataset.from_list([{"input_ids": w.tolist(), "attention_mask": [1] * len(w)} for w in windows])
weights = {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
start = time.monotonic()
oneshot(model=model, dataset=rows, recipe=recipe, max_seq_length=windows.shape[1], num_calibration_samples=len(windows))
print(json.dumps(time.monotonic() - start))
"""


def timed(python: str, script: str, *arguments: str) -> float:
    """Seconds that a script reports in its last line.

    Raises:
        SystemExit: it failed; the message is the end of what it wrote.
    """
    result = subprocess.run([python, "-c", script, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr[-3000:])
    return json.loads(result.stdout.strip().splitlines()[-1])


def main() -> None:
    """Runs the sides in turn and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()

    import torch

    from quantkit.io.source import load_tokenizer, open_folder
    from quantkit.run.recipe import Calibration

    folder = Path(arguments.model)
    calibration = Calibration(arguments.calibration, arguments.num_samples, arguments.seqlen)
    with tempfile.TemporaryDirectory() as workspace:
        windows = str(Path(workspace) / "windows.pt")
        torch.save(calibration.sequences(load_tokenizer(folder), open_folder(folder).model), windows)
        rows: dict[str, list[float]] = {"llm-compressor": [], "quantkit": [], "quantkit, target shift 0": []}
        for _ in range(arguments.runs):
            rows["llm-compressor"].append(timed(arguments.peer_python, _THEIRS, arguments.model, windows))
            rows["quantkit"].append(timed(sys.executable, _OURS, arguments.model, windows, "0.7"))
            rows["quantkit, target shift 0"].append(timed(sys.executable, _OURS, arguments.model, windows, "0"))
    peer = statistics.median(rows["llm-compressor"])
    for name, seconds in rows.items():
        median = statistics.median(seconds)
        runs = ", ".join(f"{second:.2f}" for second in seconds)
        print(f"{name:26s} {median:8.2f} s   {median / peer:5.2f} x llm-compressor   (runs: {runs})")


if __name__ == "__main__":
    main()
