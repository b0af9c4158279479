"""What several verbs share: options of the same meaning, and how processes that share work begin.

Here as in the verbs' own files nothing that takes long to import is imported before a verb runs: `--help` needs none of
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

TEXTS = "wikitext2, c4, stdlib (offline), a .txt or .jsonl file, or a hub dataset id."

Model = Annotated[str, typer.Argument(help="Folder of a transformers model, or its id on the hub.")]
Text = Annotated[str, typer.Option(help=TEXTS)]
NumSamples = Annotated[int, typer.Option(help="Calibration windows.")]
Seqlen = Annotated[int | None, typer.Option(help="Tokens a window; by default 2048 or the model's context.")]
Shift = Annotated[float, typer.Option("--target-shift", help="0 (off) to 1: aim at the full-precision output.")]
HeadBits = Annotated[
    int | None, typer.Option(help="Pack the head (GPTQ) and the input embedding too, at 1 to 8 bits; dense by default.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output or unfinished run.")]
Unpack = Annotated[
    bool | None,
    typer.Option(
        "--unpack/--no-unpack",
        help="On a CPU, unpack packed layers once; by default those that are faster so, as far as memory allows.",
    ),
]
KvBits = Annotated[
    int | None,
    typer.Option(help="Compress the KV cache (GEAR) to codes of 2, 3, 4 or 8 bits.", rich_help_panel="KV cache"),
]


def begin_processes(device: str) -> tuple[PartialState, torch.device]:
    """(the processes that share the work, this one's device).

    They wait a day for one another: the first may calibrate a large model while the others have nothing to do.
    """
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    from quantkit.core.device import pick_device

    processes = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=1))
    return processes, processes.device if processes.num_processes > 1 else pick_device(device)
