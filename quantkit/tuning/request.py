"""A run of tuning as it is asked for."""

from dataclasses import dataclass
from pathlib import Path

from quantkit.core.errors import QuantkitError
from quantkit.io.checkpoint import is_packed, read_config
from quantkit.io.run_folder import Output
from quantkit.run.recipe import Calibration
from quantkit.tuning.settings import TuningSettings

PACKED_TEACHER = "a packed model, and its errors would be learnt too; give the full-precision model that was quantized"


@dataclass(frozen=True)
class TuningRun:
    """Settings of a run of tuning, with its models and folders.

    Attributes:
        folder: of the packed checkpoint; teacher: of the full-precision model.
        output: the folder to make.
        calibration: the text, for tuning and for measurements.
        settings: of the run.
        cache: a folder to keep the teacher's predictions in, or None.
        teacher_name: of the teacher, for reports; by default its folder.
    """

    folder: Path
    teacher: Path
    output: Path
    calibration: Calibration
    settings: TuningSettings
    cache: Path | None = None
    teacher_name: str = ""

    def destination(self, resume: bool, overwrite: bool) -> Output:
        """The folder to make, of which nothing is made yet.

        Raises:
            QuantkitError: it may not be made, or the teacher is packed.
        """
        if is_packed(read_config(self.teacher)):
            raise QuantkitError(f"the teacher {self.teacher} is {PACKED_TEACHER}")
        needed = [self.folder, self.teacher, *([] if self.cache is None else [self.cache])]
        return Output(self.output, *needed, resume=resume, overwrite=overwrite)
