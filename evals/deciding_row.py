"""One row of the table that decides, in a process of its own, so that its time and its peak memory are its own.

    python -m quantkit.evals.deciding_row TASK RESULT          started by quantkit.evals.deciding

TASK is a pickled `Task`, RESULT becomes JSON: what was measured, or {"error": one line}. Where a row is quantkit's,
time and memory are those of the whole run from the model's folder to the packed one, reading and writing included;
where it is a peer's, see `quantkit.evals.peers`. Judging comes after it, and counts for neither.
"""

import json
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from quantkit.api import quantize, search, tune
from quantkit.core.errors import QuantkitError, first_line, one_line
from quantkit.evals.deciding_rows import EndToEnd, Protocol, Quantized, Searched, Way
from quantkit.evals.evaluate import evaluate
from quantkit.evals.machine import versions
from quantkit.evals.peers import DENSE, PACKED, PeerGrid, Stored, quantize_by_peer, stored_by_peer
from quantkit.evopress.settings import Evolution
from quantkit.io.checkpoint import contents
from quantkit.io.classes import meta_model
from quantkit.io.source import load_tokenizer
from quantkit.models.structure import find_blocks
from quantkit.run import pipeline
from quantkit.run.recipe import Calibration
from quantkit.run.report import peak_memory_bytes
from quantkit.tuning.settings import PVSettings, TuningSettings


@dataclass(frozen=True)
class Task:
    """A row to measure.

    Attributes:
        way: how the model is quantized.
        model: folder of the full-precision model.
        protocol: of all rows.
        work: an empty folder.
        python: of the peer's environment, for a peer's row.
    """

    way: Way
    model: Path
    protocol: Protocol
    work: Path
    python: str = ""


@dataclass(frozen=True)
class Made:
    """A quantized model.

    Attributes:
        folder: to be judged.
        stored: what its files hold.
        seconds, peak_bytes: what making it took; see above.
        more: what else is to be recorded.
    """

    folder: Path
    stored: Stored
    seconds: float
    peak_bytes: int
    more: dict[str, Any]


def measure(task: Task) -> dict[str, Any]:
    """Makes the row's model and judges it; JSON of all figures.

    Raises:
        QuantkitError: the way cannot be gone with this model.
    """
    model = meta_model(task.model, None)
    blocks, _ = find_blocks(model)
    made = _by_peer(task, task.way, blocks) if isinstance(task.way, PeerGrid) else _by_quantkit(task, task.way)
    protocol, stored = task.protocol, made.stored
    judged = evaluate(
        made.folder, protocol.test, seqlen=protocol.test_seqlen, num_samples=protocol.test_sequences,
        baseline=task.model, device="cpu", dtype="float32",
    )  # fmt: skip
    return {
        "bits_per_weight": 8 * stored.packed_bytes / max(stored.packed_weights, 1),
        "bits_model": 8 * stored.bytes / sum(parameter.numel() for parameter in model.parameters()),
        "bytes": stored.bytes,
        "packed_weights": stored.packed_weights,
        "dense_layers": len(stored.dense_layers),
        **asdict(judged.quality),
        "seconds": made.seconds,
        "peak_bytes": made.peak_bytes,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **made.more,
    }


def _by_quantkit(task: Task, way: Quantized | Searched) -> Made:
    folder = task.work / "packed"
    start = time.monotonic()
    more = _search(task, way, folder) if isinstance(way, Searched) else _quantize(task, way, folder)
    if way.tuning is not None:
        begun, folder, packed = time.monotonic(), task.work / "tuned", folder
        more["tuning"] = _tune(task, way.tuning, packed, folder)
        more["seconds_of"]["tune"] = time.monotonic() - begun
    seconds, peak = time.monotonic() - start, peak_memory_bytes()
    held = contents(folder)
    shapes = [weight.shape for weight in held.layers.values() if weight.state()]
    stored = Stored(held.packed_nbytes, sum(rows * columns for rows, columns in shapes), held.nbytes)
    return Made(folder, stored, seconds, peak, more)


@dataclass(frozen=True)
class _FirstLeftOut:
    """Stands in for what a reverse pass finds: no curvature at the outputs, and first tokens that count for nothing.

    Attributes:
        shape: of the calibration tokens, (sequences, tokens of each).
        count: tokens of each sequence that are left out.
    """

    shape: tuple[int, int]
    count: int

    def token_weights(self, _layers: Sequence[str]) -> Tensor:
        weights = torch.ones(self.shape)
        weights[:, : self.count] = 0
        return weights

    def outputs(self, _layer: str) -> None:
        return None


def _quantize(task: Task, way: Quantized, folder: Path) -> dict[str, Any]:
    """Packs the model; what is to be recorded beside the figures."""

    def stand_in(_model: Any, _layers: Any, tokens: Tensor, *_rest: Any, **_more: Any) -> _FirstLeftOut:
        return _FirstLeftOut((len(tokens), tokens.shape[1]), way.left_out)

    with patch.object(pipeline, "measure", stand_in) if way.left_out else nullcontext():
        report = quantize(
            task.model, output=folder, method=way.method, target_shift=way.target_shift,
            low_rank_bits=way.low_rank_bits, tune_blocks=way.tune_blocks, head_bits=way.head_bits,
            fisher=True if way.left_out else way.fisher, calibration=way.text(task.protocol), device="cpu",
            progress=_told,
        )  # fmt: skip
    return {"seconds_of": {"quantize": report.seconds}, "notes": list(report.notes)}


def _tune(task: Task, asked: EndToEnd, folder: Path, output: Path) -> list[dict[str, Any]]:
    settings = TuningSettings(
        asked.steps, asked.batch, min(asked.batch, TuningSettings.micro_batch), held_out=asked.held_out,
        evaluate_every=asked.evaluate_every, embeddings=asked.embeddings, seed=task.protocol.seed,
        pv=PVSettings(asked.mode or PVSettings.mode, asked.lr),
    )  # fmt: skip
    protocol = task.protocol
    text = Calibration(protocol.calibration, asked.num_samples, asked.seqlen or protocol.seqlen, protocol.seed + 1)
    history: list[dict[str, Any]] = tune(
        folder, task.model, output=output, calibration=text, settings=settings, device="cpu", dtype="float32",
        progress=lambda now: _told(now.step, now.steps, f"KL {now.kl:.4f}"),
    )  # fmt: skip
    return history


def _search(task: Task, way: Searched, folder: Path) -> dict[str, Any]:
    found: Any = search(
        task.model, folder, avg_bits=way.avg_bits, candidates=way.candidates, base=way.base,
        calibration=task.protocol.text, search_samples=way.search_samples, held_out=way.held_out,
        evolution=Evolution(way.generations, way.offspring, way.stages), database=task.work / "candidates",
        start=way.start, seed=task.protocol.seed, device="cpu",
    )  # fmt: skip
    return {
        "seconds_of": {"search": found.seconds}, "plan": dict(found.plan), "generations": len(found.outcome.history)
    }  # fmt: skip


def _by_peer(task: Task, grid: PeerGrid, blocks: str) -> Made:
    sequences = task.protocol.text.sequences(load_tokenizer(task.model), meta_model(task.model, None))
    ran = quantize_by_peer(task.python, grid, task.model, sequences, task.work)
    stored = stored_by_peer(task.work / PACKED, task.model, blocks)
    more = {"peer_versions": ran.versions, "dense_layer_names": list(stored.dense_layers)}
    return Made(task.work / DENSE, stored, ran.seconds, ran.peak_bytes, more)


def _told(done: int, total: int, what: str) -> None:
    print(f"{done}/{total} {what}", file=sys.stderr, flush=True)


def answer(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a piece of work gives, or {"error": one line} where it raises."""
    try:
        return work()
    except QuantkitError as error:
        return {"error": str(error)}
    except Exception as error:  # a row that fails, however it does, leaves the others as they are
        traceback.print_exc()
        return {"error": one_line(f"{type(error).__name__}: {first_line(error)}")}


def main() -> None:
    """Measures the row."""
    task, result = Path(sys.argv[1]), Path(sys.argv[2])
    found = answer(lambda: measure(pickle.loads(task.read_bytes())))
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
