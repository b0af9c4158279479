"""Tuning from a packed checkpoint's folder to a better one of the same size.

It works in `<output>.partial`, where its state lies after every measurement.
"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.core.device import compute_dtype, parse_dtype
from quantkit.core.errors import QuantkitError
from quantkit.io.checkpoint import is_packed, read_config, sealed, stored_dtype
from quantkit.io.hf import load
from quantkit.io.run_folder import Output
from quantkit.io.shards import Shards
from quantkit.io.source import load_tokenizer
from quantkit.run.processes import begin_processes
from quantkit.run.recipe import Calibration
from quantkit.tuning.end_to_end import PACKED_TEACHER, Watch, tune
from quantkit.tuning.settings import TuningSettings

RECORD = "quantkit_tuning.json"


@dataclass(frozen=True)
class TuningRun:
    """Settings of a run of tuning, with its models and folders.

    Attributes:
        folder: of the packed checkpoint; teacher: of the full-precision model.
        output: the folder to make.
        calibration: the text, for tuning and for measurements.
        settings: of the run.
        cache: a folder to keep the teacher's predictions in, or None.
    """

    folder: Path
    teacher: Path
    output: Path
    calibration: Calibration
    settings: TuningSettings
    cache: Path | None = None


def run(
    asked: TuningRun,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> list[dict[str, Any]] | None:
    """Tunes a checkpoint, and makes another of it.

    Args:
        asked: what for.
        device: where the models run; by default a GPU if there is one.
        dtype: of their computation; by default float32 on a CPU.
        resume: go on with an unfinished run; overwrite: replace one, and the output.
        watch: what is told on the way.

    Returns:
        The held-out KL at each measurement, see `tune`; None in processes other than the first.

    Raises:
        QuantkitError: bad input; the message says what would work.
    """
    if is_packed(read_config(asked.teacher)):
        raise QuantkitError(f"the teacher {asked.teacher} is {PACKED_TEACHER}")
    needed = [asked.folder, asked.teacher, *([] if asked.cache is None else [asked.cache])]
    output = Output(asked.output, *needed, resume=resume, overwrite=overwrite)
    processes, where = begin_processes(device)
    kind = parse_dtype(dtype) or compute_dtype(where) or "auto"
    tokenizer = load_tokenizer(asked.folder)
    student: Any = load(asked.folder, dtype=kind, device=where)
    teacher = load(asked.teacher, dtype=kind, device=where)
    processes.wait_for_everyone()  # all have looked at what is there
    main = processes.is_main_process
    identity = {"run": "tune", "model": Shards(asked.folder).fingerprint()}
    with output.begin(identity) if main else nullcontext():
        tune(
            student, teacher, tokenizer, calibration=asked.calibration, settings=asked.settings, state=output,
            cache=asked.cache, watch=watch,
        )  # fmt: skip
        if main:
            stored = stored_dtype(asked.folder)
            output.empty()
            output.take((student if stored is None else student.to(stored)).save_pretrained)
            output.take(tokenizer.save_pretrained)
            made = output.path(output.made(""))
            output.write_json(output.made("config.json"), sealed(read_config(made), sorted(made.glob("*.safetensors"))))
            record = {"teacher": str(asked.teacher), "settings": asdict(asked.settings)}
            output.write_json(output.made(RECORD), record | {"history": student.quantkit_tuning})
            output.publish(Shards(made).checksums())
        processes.wait_for_everyone()
    return student.quantkit_tuning if main else None
