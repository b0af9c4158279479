"""Tuning from a packed checkpoint's folder to a better one of the same size.

It works in `<output>.partial`, where its state lies after every measurement.
"""

import logging
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantkit.core.device import compute_dtype, parse_dtype
from quantkit.core.errors import first_line
from quantkit.core.products import full_width
from quantkit.io.beside import readme_of
from quantkit.io.checkpoint import contents, read_config, sealed, stored_dtype
from quantkit.io.files import parse_json
from quantkit.io.hf import load
from quantkit.io.shards import Shards
from quantkit.io.source import load_tokenizer
from quantkit.models.structure import context_length
from quantkit.run.processes import together
from quantkit.run.recipe import sequence_length
from quantkit.run.record import RECORD, begin, files_of
from quantkit.run.report import Report, Tuning, peak_device_bytes, peak_memory_bytes
from quantkit.tuning.end_to_end import Watch, checked_text, tune
from quantkit.tuning.request import TuningRun

logger = logging.getLogger(__name__)

TUNING_RECORD = "quantkit_tuning.json"


@dataclass(frozen=True)
class Tuned:
    """What a run of tuning made.

    Attributes:
        output: the folder.
        record: JSON that lies there as quantkit_tuning.json: the teacher, the settings, and the held-out KL at each
            measurement, see `tune`.
        bytes_after: of all the folder's tensors.
        seconds: wall-clock time of this process's part of the run.
        peak_memory_bytes: resident memory of the process, at most.
        peak_device_bytes: memory allocated on the GPU, at most; 0 without one.
    """

    output: Path
    record: dict[str, Any]
    bytes_after: int
    seconds: float
    peak_memory_bytes: int
    peak_device_bytes: int

    @property
    def history(self) -> list[dict[str, Any]]:
        """The measurements."""
        found: list[dict[str, Any]] = self.record["history"]
        return found

    @property
    def kl(self) -> tuple[float, float]:
        """Held-out KL to the teacher before tuning and of what was made, in nats a token."""
        return self.history[0]["kl"], min(entry["kl"] for entry in self.history)

    def to_json(self) -> dict[str, Any]:
        """As JSON values: the record, and the figures of the run."""
        before, after = self.kl
        figures = {name: value for name, value in asdict(self).items() if name not in ("output", "record")}
        return {"output": str(self.output), "kl_before": before, "kl_after": after} | figures | self.record


@full_width()
def run(
    asked: TuningRun,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> Tuned | None:
    """Tunes a checkpoint, and makes another of it.

    Args:
        asked: what for.
        device: where the models run; by default a GPU if there is one.
        dtype: of their computation; by default float32 on a CPU.
        resume: go on with an unfinished run; overwrite: replace one, and the output.
        watch: what is told on the way.

    Returns:
        What was made; None in processes other than the first.

    Raises:
        QuantkitError: bad input; the message says what would work.
    """
    output = asked.destination(resume, overwrite)
    shared, where = together(device)
    _, begun = begin(where)
    kind = parse_dtype(dtype) or compute_dtype(where) or "auto"
    report = _report_of(asked.folder) if shared.is_first else None

    def read() -> tuple[Any, Any, Any]:
        """The packed model, the teacher and their tokenizer, which belong together, with text enough."""
        tokenizer, cached = load_tokenizer(asked.folder), asked.cache is not None
        student, teacher = (load(folder, dtype=kind, device=where) for folder in (asked.folder, asked.teacher))
        if shared.count > 1:  # else `tune` is early enough to say what is wrong
            checked_text(student, teacher, tokenizer, asked.calibration, asked.settings, cached)
        return student, teacher, tokenizer

    student, teacher, tokenizer = shared.alike(read)
    identity = {"run": "tune", "model": Shards(asked.folder).fingerprint()}
    with shared.within(lambda: output.begin(identity)):
        tune(
            student, teacher, tokenizer, calibration=asked.calibration, settings=asked.settings, state=output,
            cache=asked.cache, watch=watch,
        )  # fmt: skip

        def finished() -> Tuned:
            """The folder, complete."""
            stored = stored_dtype(asked.folder)
            output.empty()
            output.take((student if stored is None else student.to(stored)).save_pretrained)
            output.take(tokenizer.save_pretrained)
            folder = output.path(output.made(""))
            config = sealed(read_config(folder), sorted(folder.glob("*.safetensors")))
            output.write_json(output.made("config.json"), config)
            record = {"teacher": asked.teacher_name or str(asked.teacher), "settings": asdict(asked.settings)}
            record |= {"history": student.quantkit_tuning}
            output.write_json(output.made(TUNING_RECORD), record)
            peaks = peak_memory_bytes(), peak_device_bytes(where)
            made = Tuned(asked.output, record, Shards(folder).nbytes(), time.monotonic() - begun, *peaks)
            if report is not None:
                told = _tuned(report, asked, made, sequence_length(asked.calibration.seqlen, context_length(student)))
                for name, content in files_of(told, read_config(asked.folder), readme_of(asked.folder)).items():
                    output.write_bytes(output.made(name), content)
            output.publish(Shards(folder).checksums())
            return made

        return shared.lead(finished)


def _report_of(folder: Path) -> Report | None:
    """What the run that packed a checkpoint has told of it; None where that lies nowhere, or is no report."""
    if not (folder / RECORD).is_file():
        return None
    try:
        report = Report.from_json(parse_json(folder / RECORD)).remeasured(contents(folder).layers)
        files_of(report, {}, "")  # of which all can be shown
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        logger.warning("%s is no report (%s); the tuned model gets none", folder / RECORD, first_line(error))
        return None
    return report


def _tuned(report: Report, asked: TuningRun, made: Tuned, seqlen: int) -> Report:
    """The report of a packed model with what tuning made of it; what was measured of the packed one is left out."""
    history, before = made.history, report.settings.get("tuning")
    found: dict[int, float] = {}
    for entry in history:  # the last step's state and the mean at it: the lower
        found[entry["step"]] = min(entry["kl"], found.get(entry["step"], math.inf))
    return replace(
        report, bytes_after=made.bytes_after, seconds=made.seconds, peak_memory_bytes=made.peak_memory_bytes,
        peak_device_bytes=made.peak_device_bytes, check=None, samples=None,
        tuning=Tuning(made.record["teacher"], asked.settings.held_out, seqlen, tuple(found), tuple(found.values())),
        settings=report.settings | {"tuning": [*(before or []), made.record["settings"]]},
    )  # fmt: skip
