"""Processes that share a run's work, as torchrun and `accelerate launch` start them; one alone is one of them."""

from datetime import timedelta

import torch
from accelerate import PartialState

from quantkit.core.device import pick_device


def begin_processes(device: str | torch.device | None) -> tuple[PartialState, torch.device]:
    """(the processes that share the work, this one's device).

    They wait a day for one another: the first may calibrate a large model while the others have nothing to do.
    """
    on_cpu = str(device) == "cpu" or not torch.cuda.is_available()
    processes = PartialState(cpu=on_cpu, timeout=timedelta(days=1))
    if processes.num_processes == 1:
        return processes, pick_device(device)
    # a parameter that moves from cpu to cpu:0, which accelerate says, is a parameter no more
    return processes, torch.device("cpu") if processes.device.type == "cpu" else processes.device
