"""A run for several processes: python -m torch.distributed.run ... shared_quantize.py CASE MODEL TEXT OUTPUT."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import quantkit
from quantkit import GPTQ, RTN
from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Needs
from quantkit.io.checkpoint import CheckpointWriter
from quantkit.tuning.block import BlockTuning

RANK = int(os.environ.get("RANK", "0"))


@dataclass(frozen=True)
class Refuses:
    """Packs nothing in the second process."""

    needs: ClassVar[Needs] = Needs.NOTHING

    def layout(self, out_features, in_features):
        return RTN(3).layout(out_features, in_features)

    def quantize(self, weight, stats):
        if RANK == 1:
            raise QuantkitError("the second process does not like this layer")
        return RTN(3).quantize(weight, stats)


def dies(done, _total, _name):
    """The second process is gone before the second block, and nobody says so."""
    if RANK == 1 and done == 1:
        os._exit(0)


def full(writer, index, name, layers):
    """The first process finds no room for the last shard."""
    if index < 0:
        raise QuantkitError("the disk is full")
    return written(writer, index, name, layers)


written = CheckpointWriter.write
DAMPED = {"*.q_proj": GPTQ(3, group_size=32, damp=0.1)}
"""Beside layers that read the same statistics with less."""
CASES = {
    "gptq": {"method": GPTQ(3, group_size=32), "head_bits": 4, "num_samples": 136, "rules": DAMPED},
    "trellis": {"method": "hadamard(trellis(2, state_bits=8))", "check": 4},
    "experts": {"method": GPTQ(3, group_size=32), "fisher": True},
    "ranks": {"method": "low_rank(gptq(3, group_size=32), 1)", "low_rank_bits": 0.3},
    "tuned": {"method": GPTQ(3, group_size=32), "tune_blocks": BlockTuning(2)},
    "refuses": {"method": GPTQ(3, group_size=32), "rules": {"*.1.mlp.*": Refuses()}},
    "dies": {"method": GPTQ(3, group_size=32), "progress": dies},
    "alike": {"method": GPTQ(3, group_size=32), "include": ["nothing*"]},
    "full": {"method": GPTQ(3, group_size=32)},
}
"""Settings by name."""
TEXT = {"num_samples": 72, "seqlen": 128, "device": "cpu"}
"""Two batches, and five on the way back."""


def main(case, model, text, output):
    """Notes what each process was given, or told."""
    settings = TEXT | CASES[case] | {"calibration": text}
    if case == "ranks" and RANK:
        settings["calibration"] = "the first process reads it.txt"
    if case == "full":
        CheckpointWriter.write = full
    try:
        report = quantkit.quantize(model, output=Path(output) / "model", **settings)
        damping = [layer.damping for layer in report.layers]
        record = {"layers": len(report.layers), "check": report.check and report.check.kl, "damping": damping}
    except QuantkitError as error:
        record = {"error": type(error).__name__, "said": str(error)}
    Path(output, f"{RANK}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
