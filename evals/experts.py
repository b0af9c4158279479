"""What drawing experts' statistics towards their layer's mean is worth, where experts see many tokens and where few.

    python -m quantkit.evals.experts evals/reference/experts --json FILE
    python -m quantkit.evals.experts MODEL --calibration TEXT --test TEXT --strengths 0 1 --samples 8 --json FILE

Packs a mixture by GPTQ and by trellis codes at 2, 3 and 4 bits with each strength (`quantkit.run.experts`), from few
and from more sequences, and measures KL on held-out text. With `--rare` the router is first made to choose so many
experts of each block rarely; the full-precision model is the one so changed. What is done is kept in the file, and the
command, repeated, goes on.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit.api import quantize
from quantkit.core.errors import QuantkitError
from quantkit.evals.evaluate import evaluate
from quantkit.io.source import load_tokenizer
from quantkit.models.structure import find_blocks
from quantkit.run import experts
from quantkit.run.recipe import Calibration

WAYS = tuple(
    way.format(bits)
    for bits in (2, 3, 4)
    for way in ("gptq({}, group_size=64)", "hadamard(trellis({}, state_bits=12))")
)
LEFT = 0.25
"""Of the router's logits for experts that are to be rare: they are chosen where few others speak up."""


def with_rare_experts(model: PreTrainedModel, count: int) -> None:
    """Has the router choose the last `count` experts of each block rarely.

    Raises:
        QuantkitError: the blocks have no `mlp.gate` that is a linear layer or a parameter with a row an expert.
    """
    for name, block in find_blocks(model)[1].named_children():
        gate = getattr(getattr(block, "mlp", None), "gate", None)
        weight = getattr(gate, "weight", None)
        if not isinstance(weight, torch.Tensor):
            raise QuantkitError(f"block {name} has no mlp.gate with a row an expert; leave out `--rare`")
        with torch.no_grad():
            weight[-count:] *= LEFT


def measure(model: Path, way: str, strength: float, text: Calibration, test: str, windows: int) -> dict[str, Any]:
    """Packs, and measures KL beside what a model's folder holds."""
    before, experts.STRENGTH = experts.STRENGTH, strength
    try:
        with tempfile.TemporaryDirectory() as workspace:
            folder = Path(workspace) / "packed"
            report = quantize(model, output=folder, method=way, calibration=text, device="cpu")
            found = evaluate(
                folder, test, seqlen=text.seqlen, num_samples=windows, baseline=model, device="cpu", dtype="float32"
            )  # fmt: skip
    finally:
        experts.STRENGTH = before
    tokens = [layer.tokens for layer in report.layers if layer.tokens is not None]
    return {
        "bits_per_weight": report.bits_per_weight, "kl": found.quality.kl, "kl_se": found.quality.kl_se,
        "fewest_tokens": min(tokens), "seconds": report.seconds,
    }  # fmt: skip


def main() -> None:
    """Parses the command line, measures what is missing, and prints a line for each."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", type=Path)
    made.add_argument("--calibration", default="stdlib")
    made.add_argument("--test", default="stdlib")
    made.add_argument("--strengths", type=float, nargs="+", default=[0, 0.25, 1, 4])
    made.add_argument("--samples", type=int, nargs="+", default=[4, 64], help="calibration sequences")
    made.add_argument("--seqlen", type=int, default=512, help="tokens of each, and of those that are measured")
    made.add_argument("--rare", type=int, nargs="+", default=[0, 3], help="experts of each block that are made rare")
    made.add_argument("--ways", nargs="+", default=list(WAYS), help="texts of quantizers")
    made.add_argument("--windows", type=int, default=24, help="sequences that are measured")
    made.add_argument("--json", type=Path, required=True)
    asked = made.parse_args()
    rows = json.loads(asked.json.read_text()) if asked.json.exists() else []
    known = {(row["rare"], row["samples"], row["way"], row["strength"]) for row in rows}
    for rare in asked.rare:
        with tempfile.TemporaryDirectory() as workspace:
            folder = asked.model
            if rare:
                folder = Path(workspace) / "model"
                model = AutoModelForCausalLM.from_pretrained(asked.model)
                with_rare_experts(model, rare)
                model.save_pretrained(folder)
                load_tokenizer(asked.model).save_pretrained(folder)
            for samples in asked.samples:
                for way in asked.ways:
                    for strength in asked.strengths:
                        key = {"rare": rare, "samples": samples, "way": way, "strength": strength}
                        if tuple(key.values()) in known:
                            continue
                        text = Calibration(asked.calibration, samples, asked.seqlen)
                        found = measure(folder, way, strength, text, asked.test, asked.windows)
                        rows.append(key | found)
                        print(f"{key}: KL {found['kl']:.4f} +- {found['kl_se']:.4f}", flush=True)
                        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
