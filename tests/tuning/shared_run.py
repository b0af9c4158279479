"""A tuning run for several processes: python -m torch.distributed.run ... shared_run.py PACKED TEACHER OUTPUT."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit import Calibration, PVSettings, TuningSettings


def main(packed, teacher, output):
    student = quantkit.load(packed, dtype=torch.float32)
    settings = TuningSettings(4, 4, 2, evaluate_every=2, held_out=4, mixed=False, pv=PVSettings(lr=2e-3, code_lr=0.2))
    quantkit.tune(
        student,
        AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
        AutoTokenizer.from_pretrained(teacher),
        calibration=Calibration("stdlib", 16, 64, seed=1),
        settings=settings,
        state=Path(output) / "state",
    )
    processes = PartialState()
    codes = [int(tensor.long().sum()) for tensor in student.state_dict().values() if tensor.dtype == torch.int32]
    record = {"history": student.quantkit_tuning, "codes": codes, "processes": processes.num_processes}
    Path(output, f"{processes.process_index}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
