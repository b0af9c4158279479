"""What is recovered of the loss at few bits: by low-rank corrections, by their training, and by PV-Tuning.

    python -m quantkit.evals.recovery MODEL --data stdlib --calibration stdlib

One markdown row per variant: measured bits per weight, KL to the full-precision model with its standard error,
perplexity, and the time it took beyond what it starts from. Variants that are compared see the same tokens in the same
order, for `--steps`; what tuning can reach is shown by the rows that take `--long-steps`. `--only` names some parts of
the table, `--output` also writes the rows as JSON.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.api import quantize, tune
from quantkit.core.device import compute_dtype, pick_device
from quantkit.core.weight import QuantizedWeight
from quantkit.evals.perplexity import evaluate
from quantkit.formats.low_rank import LowRankWeight
from quantkit.io.hf import load, resolve_folder
from quantkit.io.source import load_tokenizer
from quantkit.models.structure import context_length
from quantkit.quantizers.low_rank import LowRank
from quantkit.run.documents import documents
from quantkit.run.recipe import Calibration, make_quantizer, sequence_length
from quantkit.run.report import Report
from quantkit.run.text import evaluation_text
from quantkit.tuning.block import BlockTuning
from quantkit.tuning.settings import PVSettings, TuningSettings

PARTS = ("pv", "blocks", "vptq", "low-rank", "lrec")
Row = tuple[str, Callable[[], PreTrainedModel]]


@dataclass(frozen=True)
class InMetric(LowRank):
    """A correction that is the best in another metric than the layer's loss, for comparison.

    Attributes:
        metric: "exact" (H), "diagonal" (its diagonal, as in LQER) or "plain" (I, as in ZeroQuant-V2).
    """

    metric: str = "exact"

    def corrected(self, base: QuantizedWeight, error: Tensor, hessian: Tensor) -> LowRankWeight:
        """See `LowRank.corrected`."""
        if self.metric == "diagonal":
            hessian = hessian.diagonal().diag()
        elif self.metric == "plain":
            hessian = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        return super().corrected(base, error, hessian)


class Table:
    """The model, the texts and what was already made of them.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = pick_device(arguments.device)
        folder = resolve_folder(arguments.model)
        self.tokenizer = load_tokenizer(folder)
        kind = compute_dtype(self.device) or "auto"
        self.teacher = load(folder, dtype=kind, device=self.device).eval()
        self.text = evaluation_text(documents(arguments.data, "evaluation"), self.tokenizer)
        self.length = sequence_length(arguments.seqlen, context_length(self.teacher))
        self._made: dict[str, PreTrainedModel] = {}

    def quantized(self, method: Any, tune_blocks: BlockTuning | int = 0) -> PreTrainedModel:
        """A packed copy of the model; the same call gives a copy of the same one."""
        key = f"{method} {tune_blocks}"
        if key not in self._made:
            text = Calibration(self.arguments.calibration, self.arguments.num_samples, self.arguments.seqlen)
            self._made[key] = quantize(
                copy.deepcopy(self.teacher),
                self.tokenizer,
                method=method,
                calibration=text,
                device=self.device,
                tune_blocks=tune_blocks,
            )
        return copy.deepcopy(self._made[key])

    def tuned(
        self, method: Any, tune_blocks: BlockTuning | int = 0, long: bool = False, **settings: Any
    ) -> PreTrainedModel:
        """A packed model after end-to-end tuning.

        Args:
            method, tune_blocks: see `quantized`.
            long: for `--long-steps`, else for `--steps`.
            settings: other than the usual ones.
        """
        arguments = self.arguments
        text = Calibration(arguments.calibration, arguments.tuning_samples, arguments.seqlen, seed=1)
        steps = arguments.long_steps if long else arguments.steps
        code_lr = arguments.long_code_lr if long else arguments.code_lr
        run = TuningSettings(
            steps, arguments.batch, arguments.micro_batch, evaluate_every=50, pv=PVSettings(code_lr=code_lr)
        )
        model, run = self.quantized(method, tune_blocks), replace(run, **settings)
        return tune(model, self.teacher, self.tokenizer, calibration=text, settings=run)

    def rows(self) -> Iterator[Row]:
        """Label and maker of every variant, those that start from the same model beside each other."""
        only, code_lr = self.arguments.only, self.arguments.code_lr
        start, vptq = make_quantizer(self.arguments.method, bits=2), make_quantizer("vptq", bits=2)
        name = self.arguments.method.upper()
        yield name, partial(self.quantized, start)
        if "pv" in only:
            for mode in ("continuous", "straight-through", "buffer"):
                label = "PV-Tuning" if mode == "buffer" else f"{mode}, same tokens"
                pv = PVSettings(mode, code_lr=code_lr)
                yield f"{name}, {label}", partial(self.tuned, start, pv=pv)
        if "blocks" in only:
            blocks = BlockTuning(self.arguments.block_steps)
            yield f"{name}, blocks tuned", partial(self.quantized, start, blocks)
            yield f"{name}, blocks tuned, PV-Tuning", partial(self.tuned, start, blocks, long=True)
        if "vptq" in only:
            yield "VPTQ", partial(self.quantized, vptq)
            yield "VPTQ, PV-Tuning", partial(self.tuned, vptq, long=True)
        if "low-rank" in only:
            for rank in self.arguments.ranks:
                for metric in ("plain", "diagonal", "exact"):
                    corrected = InMetric(start, rank, metric=metric)
                    yield f"{name}, rank {rank}, {metric}", partial(self.quantized, corrected)
        if "lrec" in only:
            closed = LowRank(start, 1)
            yield f"{name}, rank 1, exact", partial(self.quantized, closed)
            yield f"{name}, rank 1, trained (LREC)", partial(self.tuned, closed, corrections=True)

    def measured(self, label: str, make: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        """A row: makes the variant and evaluates it."""
        start = time.monotonic()
        model = make().eval()
        seconds = time.monotonic() - start
        quality = evaluate(
            model,
            self.text,
            self.length,
            baseline=self.teacher,
            num_samples=self.arguments.max_windows,
        )
        report = model.quantkit_report
        assert isinstance(report, Report)
        return {"label": label, "bits_per_weight": report.bits_per_weight, "seconds": seconds} | asdict(quality)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows; each is printed as it is done."""
    table = Table(arguments)
    print("| variant | bits/weight | KL x 1000 | perplexity | seconds |")
    print("|---|---|---|---|---|")
    found = []
    for label, make in table.rows():
        row = table.measured(label, make)
        found.append(row)
        cells = [label, f"{row['bits_per_weight']:.3f}", f"{1000 * row['kl']:.1f} +- {1000 * row['kl_se']:.1f}"]
        print("| " + " | ".join([*cells, f"{row['perplexity']:.3f}", f"{row['seconds']:.0f}"]) + " |", flush=True)
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model")
    made.add_argument("--data", default="wikitext2")
    made.add_argument("--calibration", default="wikitext2")
    made.add_argument("--method", default="gptq", help="what all but the VPTQ rows start from, at 2 bits")
    made.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    made.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    made.add_argument("--num-samples", type=int, default=128, help="sequences that quantization is calibrated on")
    made.add_argument("--tuning-samples", type=int, default=4096, help="sequences to tune on")
    made.add_argument("--seqlen", type=int, default=512)
    made.add_argument("--steps", type=int, default=300)
    made.add_argument("--long-steps", type=int, default=1500)
    made.add_argument("--block-steps", type=int, default=100)
    made.add_argument("--code-lr", type=float, default=0.1, help="of runs of --steps")
    made.add_argument("--long-code-lr", type=float, default=0.06, help="of runs of --long-steps")
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--micro-batch", type=int, default=4)
    made.add_argument("--max-windows", type=int, default=128)
    made.add_argument("--device", default="auto")
    made.add_argument("--output", type=Path)
    return made


def main() -> None:
    """Parses the command line."""
    arguments = parser().parse_args()
    found = measure(arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
