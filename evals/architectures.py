"""Which architectures of transformers quantkit packs, tried one by one on small untrained models.

    python -m quantkit.evals.architectures --json FILE
    python -m quantkit.evals.architectures --only llama qwen3_moe --json FILE

Every kind of model that generates text is made small by one rule (`architecture_sizes`), written to disk with a
tokenizer, and packed from there by GPTQ and by trellis codes. What is packed is loaded, and has to give the logits of
the same model with dequantized weights, to generate, to be the same byte by byte where the run was interrupted and
resumed, and to hold every tensor of the source but for those of packed layers. A kind that this rule makes nothing of,
or that transformers itself does not load again, is listed as not made; one that quantkit refuses, with its words.
"""

import argparse
import json
import signal
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto import modeling_auto

from quantkit.core.errors import CheckpointError, Interrupted, QuantkitError, first_line
from quantkit.evals.architecture_sizes import small
from quantkit.io.classes import class_of, meta_model
from quantkit.io.conversion import origins
from quantkit.io.hf import REFERENCE, load
from quantkit.io.shards import Shards
from quantkit.models.experts import parts
from quantkit.models.ties import inner_ties
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.hadamard import Hadamard
from quantkit.quantizers.trellis import Trellis
from quantkit.run.pipeline import quantize_checkpoint
from quantkit.run.recipe import Calibration, Recipe

WAYS = {"gptq": GPTQ(4, 32), "trellis": Hadamard(Trellis(3, state_bits=8))}
LIMIT = 100
"""Seconds for a kind of model."""
LARGEST = 12_000_000
"""Parameters of a model that is small."""


def kinds() -> list[str]:
    """Model types of transformers that generate text, alone or of what they see and hear."""
    texts, images = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return sorted({*texts, *images})


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def made(kind: str, folder: Path) -> None:
    """Writes a small model of a kind, random matrices in it, with the reference model's tokenizer.

    Raises:
        QuantkitError: quantkit refuses it.
        Exception: transformers itself does not make, save and load it, or it wants more than text.
    """
    torch.manual_seed(0)
    config = small(transformers.CONFIG_MAPPING[kind]())
    model = class_of(config)._from_config(config, dtype=torch.bfloat16)
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        raise ValueError("does not become small")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder)
    saved: Any = class_of(AutoConfig.from_pretrained(folder)).from_pretrained(folder, output_loading_info=True)
    if missing := saved[1]["missing_keys"]:
        raise ValueError(f"transformers does not find {min(missing)} where it wrote it")
    full = load(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        full(torch.arange(10, 34).view(2, 12))


def tried(folder: Path, quantizer: Any, work: Path) -> dict[str, Any]:
    """What comes of packing a model's folder in one way.

    Raises:
        QuantkitError: it is refused.
        AssertionError: what comes of it is wrong.
    """
    recipe = Recipe(quantizer, calibration=Calibration("stdlib", 2, 64))
    report = quantize_checkpoint(folder, recipe, work / "whole", device="cpu")

    def stop(done: int, _total: int, name: str) -> None:
        if done >= 1 and not name.startswith("reverse"):
            raise Interrupted("here")

    try:
        quantize_checkpoint(folder, recipe, work / "resumed", device="cpu", progress=stop)
    except Interrupted:
        quantize_checkpoint(folder, recipe, work / "resumed", device="cpu", resume=True)
    whole, again = (Shards(work / name).checksums() for name in ("whole", "resumed"))
    assert whole == again, "a resumed run gives other bytes"

    layers = {f"{layer.name}." for layer in report.layers}
    model = meta_model(folder, None)
    mapping = origins(model, Shards(folder))
    assert mapping is not None, "its tensors are found by transformers alone"
    stacks = {name: part.stack for name, part in parts(model).items()}  # what dense experts are stored in again
    own = mapping.keys() - inner_ties(model).keys() - {name for name, stack in stacks.items() if stack in whole}
    lost = [name for name in own if name not in whole and not name.startswith(tuple(layers))]
    assert not lost, f"{lost[0]} is lost"

    packed, tokens = load(work / "whole", dtype=torch.float32).eval(), torch.arange(10, 50).view(2, 20)
    with torch.no_grad():
        found = packed(tokens).logits
        packed.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
        packed.dequantize(torch.float32)
        error = float((packed(tokens).logits - found).abs().max() / found.abs().max())
    assert error <= 1e-5, f"logits differ by {error:.1e}"
    inside = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and _in_blocks(name, mapping, layers))
    return {"layers": len(report.layers), "error": error, "dense": 1 - report.packed_weights / max(inside, 1)}


def _in_blocks(name: str, mapping: Mapping[str, Any], layers: set[str]) -> bool:
    """Whether a tensor lies where layers are packed: in the list of blocks that the first of them is in."""
    first = next(iter(layers))
    blocks = first[: next(i for i in range(len(first)) if first[i : i + 2].strip(".").isdigit())]
    return name in mapping and name.startswith(blocks)


def row(kind: str, ways: Mapping[str, Any] = WAYS) -> dict[str, Any]:
    """What was found of a kind of model: "ok", "refused", "wrong" or "not made", with words, and each way's figures."""
    found: dict[str, Any] = {"kind": kind}
    with tempfile.TemporaryDirectory() as workspace, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(workspace) / "model"
        try:
            with _limited(LIMIT):
                made(kind, folder)
        except QuantkitError as error:
            return found | {"state": "refused", "words": str(error).replace(str(folder), "MODEL")}
        except Exception as error:  # of transformers, on sizes that do not go together
            return found | {"state": "not made", "words": f"{type(error).__name__}: {first_line(error)}"[:200]}
        for name, quantizer in ways.items():
            work = Path(workspace) / name
            try:
                with _limited(LIMIT):
                    found[name] = tried(folder, quantizer, work)
            except QuantkitError as error:
                if isinstance(error, CheckpointError):  # of what was just written
                    return found | {"state": "wrong", "words": f"{name}: {error}".replace(workspace, "")[:200]}
                return found | {"state": "refused", "words": str(error).replace(str(folder), "MODEL")}
            except Exception as error:  # anything, which is what is to be found out
                return found | {"state": "wrong", "words": f"{name}: {type(error).__name__}: {first_line(error)}"[:200]}
    return found | {"state": "ok", "words": ""}


def main() -> None:
    """Parses the command line, tries what is missing, and prints a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="KIND", help="by their names in transformers; by default all")
    parser.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text()) if asked.json.exists() else []
    for kind in asked.only or kinds():
        if any(known["kind"] == kind for known in rows):
            continue
        rows.append(row(kind))
        print(f"{kind:24s} {rows[-1]['state']:9s} {rows[-1]['words']}", flush=True)
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    counts = {state: sum(one["state"] == state for one in rows) for state in ("ok", "refused", "wrong", "not made")}
    print(", ".join(f"{count} {state}" for state, count in counts.items()))


if __name__ == "__main__":
    main()
