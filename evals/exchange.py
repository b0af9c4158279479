"""GGUF files of ours beside ggml's own of the same type: KL to the full model, at the same bytes.

    python -m quantkit.evals.exchange MODEL --calibration TEXT --test TEXT --work FOLDER --output JSON

ggml's own rounds each block by itself (the package gguf does it as llama.cpp does, Q4_0 and Q8_0); ours is packed by
GPTQ `--for gguf`, exported, and read back by transformers' reader. Layers of the blocks alone are quantized, in both.
"Q4_0, 3 bits" holds 3-bit codes: as many bytes as Q4_0 has, and fewer in a packed checkpoint.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quantkit.api import export, quantize
from quantkit.core.errors import QuantkitError
from quantkit.evals.evaluate import evaluate
from quantkit.evals.machine import cpu_name, versions
from quantkit.evals.real import model_folder
from quantkit.exchange.export import settings_for
from quantkit.exchange.survey import survey
from quantkit.io.checkpoint import contents
from quantkit.io.hf import load
from quantkit.io.source import load_tokenizer
from quantkit.models.structure import block_linears
from quantkit.run.recipe import Calibration

ROWS: tuple[tuple[str, int | None], ...] = (("Q4_0", None), ("Q4_0", 4), ("Q4_0", 3), ("Q8_0", None), ("Q8_0", 8))
"""Types, and the bits of ours; None for ggml's own."""


def rounded(model: PreTrainedModel, kind: str) -> None:
    """Rounds the blocks' layers of a model in memory as ggml does."""
    from gguf import GGMLQuantizationType, quants

    of = GGMLQuantizationType[kind]
    for name in block_linears(model):
        weight: Any = model.get_submodule(name).weight
        blocks = quants.quantize(weight.detach().float().numpy(), of)
        weight.data = torch.from_numpy(quants.dequantize(blocks, of)).to(weight.dtype)


def exported(folder: Path, kind: str, bits: int, arguments: argparse.Namespace) -> tuple[Path, float]:
    """Our file of a type, and measured bits per weight of the packed checkpoint that it is made of."""
    packed, file = arguments.work / f"{bits}bit", arguments.work / f"{bits}bit.gguf"
    if not packed.exists():
        settings = settings_for("gguf", "gptq", bits)
        text = Calibration(arguments.calibration, arguments.num_samples, arguments.seqlen)
        method = f"gptq({bits}, group_size={settings['group_size']})"
        quantize(folder, output=packed, method=method, calibration=text, device="cpu")
    made = export(packed, file, to="gguf", overwrite=True)
    if made.error or {matrix.format for matrix in survey(file).layers.values()} != {kind}:
        raise QuantkitError(f"{file} is not exact, or not of {kind}")
    return file, contents(packed).bits_per_weight


def measure(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows; each is printed as it is done."""
    rows, tokenizer = [], load_tokenizer(folder)
    for kind, bits in ROWS:
        row: dict[str, Any] = {"type": kind, "by": "ggml" if bits is None else "quantkit", "bits": bits}
        if bits is None:
            subject = load(folder, dtype=torch.float32).eval()
            rounded(subject, kind)
        else:
            file, row["packed_bits"] = exported(folder, kind, bits, arguments)
            subject = load(file, dtype=torch.float32).eval()
        quality = evaluate(
            subject, arguments.test, tokenizer=tokenizer, seqlen=arguments.seqlen, num_samples=arguments.sequences,
            baseline=load(folder, dtype=torch.float32).eval(),
        ).quality  # fmt: skip
        rows.append(row | asdict(quality))
        print(f"{row}: KL x 1000 {1000 * (quality.kl or 0):.2f} +- {1000 * (quality.kl_se or 0):.2f}", flush=True)
    return rows


def command(description: str | None, measure: Callable[[Path, argparse.Namespace], list[dict[str, Any]]]) -> None:
    """Parses the command line, and writes what was measured of the model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--num-samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--sequences", type=int, default=24, help="that are measured")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made; packed folders are kept")
    parser.add_argument("--output", type=Path, required=True, metavar="JSON")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    name, folder = model_folder(arguments.model)
    rows = measure(folder, arguments)
    record = {"model": name, "date": date.today().isoformat(), "cpu": cpu_name(), "versions": versions(), "rows": rows}
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    command(__doc__, measure)
