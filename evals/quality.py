"""Quality against bits: quantizes one model in many ways and measures each on held-out text.

    python -m quantkit.evals.quality MODEL --data stdlib --calibration stdlib --bits 2 3 4 8
    python -m quantkit.evals.quality MODEL --quantizers "Hadamard(Pyramid(2.5, 32))" "VPTQ(2, outliers=0.01)"

A row per method and bit width, or per quantizer, and per target shift and number of calibration windows: measured
bits per weight, perplexity, KL to the full-precision model with its standard error, and the time that quantization
took. `--output` also writes the rows as JSON.
"""

import argparse
import copy
import dataclasses
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import quantkit
from quantkit import GPTQ, RTN, VPTQ, Hadamard, LowRank, Pyramid, Trellis
from quantkit.data import documents, evaluation_tokens
from quantkit.device import compute_dtype, pick_device
from quantkit.evals.perplexity import evaluate
from quantkit.folder import load_tokenizer, resolve_folder
from quantkit.model import context_length
from quantkit.protocols import Needs, Quantizer
from quantkit.recipe import TARGET_SHIFT, Calibration, core, make_quantizer, window_length
from quantkit.report import Report


def quantizers_of(arguments: argparse.Namespace) -> list[Quantizer]:
    """The quantizers that were asked for, each checked before the first of them runs."""
    if arguments.quantizers:
        names = {kind.__name__: kind for kind in (GPTQ, RTN, VPTQ, Hadamard, LowRank, Pyramid, Trellis)}
        return [eval(text, {"__builtins__": {}}, names) for text in arguments.quantizers]  # from one's own command line
    integer = {"group_size": arguments.group_size, "symmetric": not arguments.asym}
    return [
        make_quantizer(method, arguments.hadamard, bits=bits, **(integer if method in ("gptq", "rtn") else {}))
        for bits, method in itertools.product(arguments.bits, arguments.methods)
    ]


def settings_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows' settings; a method that reads no statistics gets one row, whatever the shifts and samples."""
    rows = []
    for quantizer in quantizers_of(arguments):
        samples = arguments.num_samples if quantizer.needs > Needs.NOTHING else [0]
        shifts = arguments.target_shift if quantizer.needs > Needs.NOTHING else [0.0]
        for windows, shift in itertools.product(samples, shifts):
            rows.append({"quantizer": quantizer, "target_shift": shift, "num_samples": windows})
    return rows


def label(quantizer: Quantizer) -> str:
    """A quantizer in few words: those of its settings that are not the defaults."""
    changed = []
    for field in dataclasses.fields(quantizer):  # type: ignore[arg-type]
        value = getattr(quantizer, field.name)
        if field.default is dataclasses.MISSING:
            changed.append(label(value))
        elif value != field.default or field.name == "bits":
            changed.append(f"{field.name} {value:g}" if isinstance(value, float) else f"{field.name} {value}")
    return f"{type(quantizer).__name__}({', '.join(changed)})"


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Quantizes and evaluates every row; prints a markdown line for each as it is done."""
    device = pick_device(arguments.device)
    folder = resolve_folder(arguments.model)
    tokenizer = load_tokenizer(folder)
    baseline = quantkit.load(folder, dtype=compute_dtype(device) or "auto", device=device).eval()
    tokens, bytes_per_token = evaluation_tokens(documents(arguments.data, "evaluation"), tokenizer)
    length = window_length(arguments.seqlen, context_length(baseline))
    print("| method | target shift | windows | bits/weight | perplexity | KL x 1000 | seconds |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for row in settings_of(arguments):
        model = copy.deepcopy(baseline)
        quantizer, shift, samples = row["quantizer"], row["target_shift"], row["num_samples"]
        calibration = Calibration(arguments.calibration, max(samples, 1), arguments.seqlen, arguments.seed)
        quantkit.quantize(
            model, tokenizer, method=quantizer, target_shift=shift, calibration=calibration, device=device
        )
        quality = evaluate(model, tokens, bytes_per_token, length, baseline=baseline, max_windows=arguments.max_windows)
        report = model.quantkit_report
        assert isinstance(report, Report)
        found = {
            "bits": getattr(core(quantizer), "bits", None),
            "bits_per_weight": report.bits_per_weight,
            "seconds": report.seconds,
        }
        results.append(row | {"quantizer": repr(quantizer)} | found | asdict(quality))
        cells = [label(quantizer), f"{shift:g}", samples, f"{report.bits_per_weight:.3f}", f"{quality.perplexity:.3f}"]
        cells += [f"{1000 * (quality.kl or 0):.2f} +- {1000 * (quality.kl_se or 0):.2f}", f"{report.seconds:.0f}"]
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
    parser.add_argument("--bits", type=float, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--quantizers", nargs="+", help="quantizers as in Python, instead of methods and bits")
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
    arguments = parser.parse_args()
    results = measure(arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
