"""Quality against bits: quantizes one model in many ways and measures each on held-out text.

    python -m quantkit.evals.quality MODEL --data stdlib --calibration stdlib --bits 2 3 4 8
    python -m quantkit.evals.quality MODEL --methods rtn gptq pyramid vptq trellis --bits 2 3 4 --png rate-kl.png
    python -m quantkit.evals.quality MODEL --quantizers "hadamard(pyramid(2.5, 32))" "vptq(2, outliers=0.01)"

A row per method and bit width, or per quantizer, and per target shift and number of calibration sequences: measured
bits per weight, perplexity, KL to the full-precision model with its standard error, and the time that quantization
took. `--output` also writes the rows as JSON, `--png` draws KL over bits per weight.
"""

import argparse
import copy
import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantkit.api import quantize
from quantkit.core import spec
from quantkit.core.constants import TARGET_SHIFT
from quantkit.core.device import compute_dtype, pick_device
from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Needs, Quantizer
from quantkit.evals.perplexity import evaluate
from quantkit.evals.rate_distortion import figure_class
from quantkit.io.hf import load, resolve_folder
from quantkit.io.source import load_tokenizer
from quantkit.models.structure import context_length
from quantkit.run.documents import documents
from quantkit.run.recipe import Calibration, core, make_quantizer, sequence_length
from quantkit.run.report import Report
from quantkit.run.text import evaluation_text


def quantizers_of(arguments: argparse.Namespace) -> list[Quantizer]:
    """The quantizers that were asked for, each checked before the first of them runs."""
    written = [spec.read(text) for text in arguments.quantizers or ()]
    methods = arguments.methods or ([] if written else ["rtn", "gptq"])
    integer = {"group_size": arguments.group_size, "symmetric": not arguments.asym}
    return [
        make_quantizer(method, arguments.hadamard, bits=bits, **(integer if method in ("gptq", "rtn") else {}))
        for bits, method in itertools.product(arguments.bits, methods)
    ] + written


def settings_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows' settings; a method that reads no statistics gets one row, whatever the shifts and samples."""
    rows = []
    for quantizer in quantizers_of(arguments):
        samples = arguments.num_samples if quantizer.needs > Needs.NOTHING else [0]
        shifts = arguments.target_shift if quantizer.needs > Needs.NOTHING else [0.0]
        for windows, shift in itertools.product(samples, shifts):
            rows.append({"quantizer": quantizer, "target_shift": shift, "num_samples": windows})
    return rows


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Quantizes and evaluates every row; prints a markdown line for each as it is done."""
    rows = settings_of(arguments)
    device = pick_device(arguments.device)
    folder = resolve_folder(arguments.model)
    tokenizer = load_tokenizer(folder)
    baseline = load(folder, dtype=compute_dtype(device) or "auto", device=device).eval()
    text = evaluation_text(documents(arguments.data, "evaluation"), tokenizer)
    length = sequence_length(arguments.seqlen, context_length(baseline))
    print("| method | target shift | sequences | bits/weight | perplexity | KL x 1000 | seconds |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for row in rows:
        model = copy.deepcopy(baseline)
        quantizer, shift, samples = row["quantizer"], row["target_shift"], row["num_samples"]
        calibration = Calibration(arguments.calibration, max(samples, 1), arguments.seqlen, arguments.seed)
        quantize(model, tokenizer, method=quantizer, target_shift=shift, calibration=calibration, device=device)
        quality = evaluate(model, text, length, baseline=baseline, num_samples=arguments.max_windows)
        report = model.quantkit_report
        assert isinstance(report, Report)
        found = {
            "bits": getattr(core(quantizer), "bits", None),
            "bits_per_weight": report.bits_per_weight,
            "seconds": report.seconds,
        }
        results.append(row | {"quantizer": spec.write(quantizer)} | found | asdict(quality))
        cells = [
            spec.write(quantizer),
            f"{shift:g}",
            samples,
            f"{report.bits_per_weight:.3f}",
            f"{quality.perplexity:.3f}",
        ]
        cells += [f"{1000 * (quality.kl or 0):.2f} +- {1000 * (quality.kl_se or 0):.2f}", f"{report.seconds:.0f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    print(f"\nfull precision: perplexity {results[0]['baseline_perplexity']:.3f}")
    return results


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """KL over measured bits, a line for each way to quantize."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in results:
        family = re.sub(r"\(\d[\d.]*(, )?", "(", row["quantizer"]).replace("()", "")
        shift = (
            "" if row["num_samples"] == 0 or row["target_shift"] == TARGET_SHIFT else f", shift {row['target_shift']:g}"
        )
        lines.setdefault(family + shift, []).append((row["bits_per_weight"], 1000 * row["kl"], 1000 * row["kl_se"]))
    figure = figure_class()(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for family, points in lines.items():
        bits, kl, error = zip(*sorted(points), strict=True)
        axes.errorbar(bits, kl, yerr=error, marker="o", markersize=4, linewidth=1.3, capsize=2, label=family)
    axes.set(yscale="log", xlabel="bits per weight in packed layers, all that is stored", ylabel="held-out KL x 1000")
    axes.grid(alpha=0.3, which="both", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, format="png")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="wikitext2")
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--methods", nargs="+", help="rtn and gptq by default, where no --quantizers are given")
    parser.add_argument("--bits", type=float, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--quantizers", nargs="+", help="texts of quantizers, beside methods and bits")
    parser.add_argument("--hadamard", action=argparse.BooleanOptionalAction, help="rotate; by default as methods want")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--target-shift", type=float, nargs="+", default=[0.0, TARGET_SHIFT])
    parser.add_argument("--num-samples", type=int, nargs="+", default=[128])
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-windows", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--png", type=Path, help="draw the picture there; needs matplotlib")
    arguments = parser.parse_args()
    if arguments.png:
        figure_class()  # so that a run of minutes does not end in an error
    try:
        results = measure(arguments)
    except QuantkitError as error:
        sys.exit(f"error: {error}")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.png:
        draw(results, arguments.png)


if __name__ == "__main__":
    main()
