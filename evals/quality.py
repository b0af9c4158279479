"""Quality against bits: quantizes one model in many ways and measures each on held-out text.

    python -m quantkit.evals.quality MODEL --data stdlib --calibration stdlib --bits 2 3 4 8

A row per method, bit width, target shift and number of calibration windows: measured bits per weight,
perplexity, and KL to the full-precision model with its standard error. `--output` also writes the rows as JSON.
"""

import argparse
import copy
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import quantkit
from quantkit.data import documents, evaluation_tokens
from quantkit.device import compute_dtype, pick_device
from quantkit.evals.perplexity import evaluate
from quantkit.folder import load_tokenizer, resolve_folder
from quantkit.model import context_length
from quantkit.protocols import Needs
from quantkit.recipe import TARGET_SHIFT, Calibration, make_quantizer, window_length


def settings_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows' settings; a method that reads no statistics gets one row, whatever the shifts and samples."""
    rows = []
    for bits, method in itertools.product(arguments.bits, arguments.methods):
        quantizer = make_quantizer(method, bits=bits, group_size=arguments.group_size, symmetric=not arguments.asym)
        samples = arguments.num_samples if quantizer.needs > Needs.NOTHING else [0]
        shifts = arguments.target_shift if quantizer.needs > Needs.NOTHING else [0.0]
        for windows, shift in itertools.product(samples, shifts):
            rows.append({"method": method, "quantizer": quantizer, "target_shift": shift, "num_samples": windows})
    return rows


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Quantizes and evaluates every row; prints a markdown line for each as it is done."""
    device = pick_device(arguments.device)
    folder = resolve_folder(arguments.model)
    tokenizer = load_tokenizer(folder)
    baseline = quantkit.load(folder, dtype=compute_dtype(device) or "auto", device=device).eval()
    tokens, bytes_per_token = evaluation_tokens(documents(arguments.data, "evaluation"), tokenizer)
    length = window_length(arguments.seqlen, context_length(baseline))
    print("| method | bits | target shift | windows | bits/weight | perplexity | KL x 1000 |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for row in settings_of(arguments):
        model = copy.deepcopy(baseline)
        calibration = Calibration(arguments.calibration, max(row["num_samples"], 1), arguments.seqlen, arguments.seed)
        quantizer = row.pop("quantizer")
        quantkit.quantize(
            model, tokenizer, method=quantizer, target_shift=row["target_shift"], calibration=calibration, device=device
        )
        quality = evaluate(model, tokens, bytes_per_token, length, baseline=baseline, max_windows=arguments.max_windows)
        bits_per_weight = model.quantkit_report.bits_per_weight  # type: ignore[union-attr]
        results.append(row | {"bits": quantizer.bits, "bits_per_weight": bits_per_weight, **asdict(quality)})
        cells = [
            row["method"],
            quantizer.bits,
            f"{row['target_shift']:g}",
            row["num_samples"],
            f"{bits_per_weight:.3f}",
        ]
        cells += [f"{quality.perplexity:.3f}", f"{1000 * (quality.kl or 0):.2f} +- {1000 * (quality.kl_se or 0):.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    print(f"\nfull precision: perplexity {results[0]['baseline_perplexity']:.3f}")
    return results


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="wikitext2")
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--target-shift", type=float, nargs="+", default=[0.0, TARGET_SHIFT])
    parser.add_argument("--num-samples", type=int, nargs="+", default=[128])
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-windows", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = measure(arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
