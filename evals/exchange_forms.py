"""What a packed model weighs and loses before and after it is exported, in every form, read by that form's own reader.

    python -m quantkit.evals.exchange_forms MODEL --calibration TEXT --test TEXT --work FOLDER --output JSON

Each way of `ROWS` is packed, measured against the full-precision model, exported, and measured again as transformers
reads it (compressed-tensors, GGUF, dense), or mlx-lm (on a CPU if there is nothing else). transformers reads GPTQ's
form by the package gptqmodel alone; what is measured there is what quantkit itself reads.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.api import export, quantize
from quantkit.evals.exchange import command
from quantkit.evals.perplexity import evaluate
from quantkit.io.checkpoint import contents
from quantkit.io.hf import load
from quantkit.io.source import load_tokenizer
from quantkit.run.documents import documents
from quantkit.run.recipe import Calibration
from quantkit.run.text import evaluation_text


@dataclass(frozen=True)
class Row:
    """A way to pack a model, and the form that it is exported to."""

    to: str
    method: str


ROWS = (
    Row("compressed-tensors", "gptq(4, group_size=128)"),
    Row("gptq", "gptq(4, group_size=128)"),
    Row("mlx", "gptq(4, group_size=64)"),
    Row("mlx", "gptq(3, group_size=64)"),
    Row("gguf", "gptq(4, group_size=32)"),
    Row("gguf", "gptq(3, group_size=32)"),
    Row("dense", "hadamard(trellis(3, state_bits=12))"),
)


class MLXModel:
    """A model that mlx-lm runs, called as transformers' are.

    Args:
        folder: of the export.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path) -> None:
        import mlx_lm

        self._model = mlx_lm.load(str(folder))[0]

    def __call__(self, input_ids: Tensor, **_others: Any) -> SimpleNamespace:
        """Logits of token ids [batch, tokens]."""
        import mlx.core as mx
        import numpy as np

        logits = self._model(mx.array(input_ids.numpy())).astype(mx.float32)
        return SimpleNamespace(logits=torch.from_numpy(np.array(logits)))


def _transformers(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "compressed-tensors": ("transformers", _transformers),
    "dense": ("transformers", _transformers),
    "gguf": ("transformers", lambda file: load(file, dtype=torch.float32)),
    "gptq": ("quantkit", lambda folder: load(folder, dtype=torch.float32)),
    "mlx": ("mlx-lm", MLXModel),
}
"""Who reads each form, and how."""


def measure(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows; each is printed as it is done."""
    tokenizer, teacher = load_tokenizer(folder), load(folder, dtype=torch.float32).eval()
    text = evaluation_text(documents(arguments.test, "evaluation", tokenizer), tokenizer)
    sequences = Calibration(arguments.calibration, arguments.num_samples, arguments.seqlen)

    def quality(model: Any) -> tuple[float | None, float | None]:
        found = evaluate(model, text, arguments.seqlen, baseline=teacher, num_samples=arguments.sequences)
        return found.kl, found.kl_se

    rows = []
    for row in ROWS:
        stem = "".join(letter if letter.isalnum() else "-" for letter in row.method).strip("-")
        packed = arguments.work / stem
        if not packed.exists():
            quantize(folder, output=packed, method=row.method, calibration=sequences, device="cpu")
        place = arguments.work / (f"{stem}.gguf" if row.to == "gguf" else f"{stem}-{row.to}")
        made, held = export(packed, place, to=row.to, overwrite=True), contents(packed)
        reader, read = READERS[row.to]
        kl, kl_se = quality(load(packed, dtype=torch.float32).eval())
        after, after_se = quality(read(place))
        found = {
            "to": row.to, "packed": row.method, "bits": held.bits_per_weight, "reader": reader,
            "nbytes": sum(file.stat().st_size for file in packed.glob("*.safetensors")), "exported_nbytes": made.nbytes,
            "error": made.error, "layers": made.layers, "kl": kl, "kl_se": kl_se, "after": after, "after_se": after_se,
        }  # fmt: skip
        rows.append(found)
        print(json.dumps(found), flush=True)
    return rows


if __name__ == "__main__":
    command(__doc__, measure)
