"""The parts of the GPU suite by name, and the process that runs one:

python -m quantkit.evals.suite_parts NAME --results FILE [--seconds S]
"""

import argparse
import datetime
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.evals import kernel_peers, kv_speed, suite_deep, suite_experts, suite_models
from quantkit.evals.absent_gpu import Compiled, listener
from quantkit.evals.kernel_kinds import TIMED, Kind, codebooks, integers, rotated, trellises
from quantkit.evals.suite_groups import (
    ROWS,
    SHAPES,
    Group,
    Report,
    Run,
    host,
    products,
    rotations,
    run_groups,
    searches,
)
from quantkit.kernels.timing import copy_bandwidth

ENDS = SHAPES[0], SHAPES[3]
"""The smallest shape and the largest, for what has many forms."""
MIXED = integers(4), integers(3), trellises(2), trellises(3)
"""Kinds of experts."""
LONG = ((32768, 1), (131072, 1), (8192, 16))
FORMS = [form for form in kv_speed.FORMS if form.bits in (4, 2)] + [kv_speed.Form(3), kv_speed.Form(8)]


@dataclass(frozen=True)
class Contents:
    """Contents of a part.

    Attributes:
        groups: makes them.
        timing: whether they are timed, and not only checked.
        seconds: that one group should take on a GPU: a guess.
        deep: whether it belongs to the deep check instead of the suite.
    """

    groups: Callable[[], list[Group]]
    timing: bool = True
    seconds: float = 1.5
    deep: bool = False


def _of(family: str, first: int = 0, behind: int | None = None) -> list[Kind]:
    return [kind for kind in TIMED if kind.family == family][first:behind]


def _check(family: str) -> list[Group]:
    return products(_of(family), SHAPES[:1])


PARTS = {
    **{f"check {name}": Contents(partial(_check, name), False) for name in ("int", "trellis", "codebook", "pyramid")},
    "check rotation": Contents(lambda: [*rotations((4096, 14336)), *_check("rotation")], False),
    "check attention": Contents(lambda: kv_speed.groups([(8192, 1)], FORMS), False),
    "check experts": Contents(lambda: suite_experts.groups(MIXED), False),
    "check search": Contents(lambda: searches([(16, 2)]), False),
    "int4": Contents(lambda: products([integers(4)], SHAPES)),
    "trellis": Contents(lambda: products(_of("trellis", 0, 2), SHAPES)),
    "rotation": Contents(lambda: [*rotations((4096, 14336)), *products(_of("rotation"), ENDS)]),
    "int": Contents(lambda: products(_of("int", 1), SHAPES)),
    "host": Contents(lambda: host([integers(4), rotated(integers(4)), trellises(2), codebooks(4, 8)])),
    "codebook": Contents(lambda: products(_of("codebook"), ENDS)),
    "attention": Contents(lambda: kv_speed.groups(LONG, FORMS)),
    "experts": Contents(lambda: suite_experts.groups(MIXED), seconds=4),
    "pyramid": Contents(lambda: products(_of("pyramid"), ENDS)),
    "decode": Contents(suite_models.decoding, seconds=4),
    "search": Contents(lambda: searches([(16, 2), (16, 4)]), seconds=3),
    "trellis 1, 4": Contents(lambda: products(_of("trellis", 2), ENDS)),
    "peers": Contents(lambda: kernel_peers.groups((4, 3, 2), SHAPES, ROWS), seconds=10),
    "sweep trellis": Contents(lambda: suite_models.sweep_trellis(2, ENDS), seconds=0.5),
    "sweep int4": Contents(lambda: suite_models.sweep_integers(4, ENDS), seconds=0.5),
    **{f"deep {name}": Contents(groups, False, deep=True) for name, groups in suite_deep.FAMILIES.items()},
}
"""The parts in the order of their worth."""


def about(device: torch.device) -> dict[str, Any]:
    """Hardware, driver, versions and date."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    found = torch.cuda.get_device_properties(device)
    return {
        "gpu": found.name,
        "arch": 10 * found.major + found.minor,
        "multiprocessors": found.multi_processor_count,
        "driver, clocks": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "copy, GB/s": round(copy_bandwidth(device) / 1e9),
    }


def main() -> None:
    """The process of a part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["about", *PARTS])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    report = Report(arguments.results, arguments.part)
    if arguments.part == "about":
        report.about(about(device))
        return
    from triton import knobs

    late: list[Compiled] = []
    knobs.compilation.listener = listener(lambda compiled: None if compiled.cached else late.append(compiled))
    contents = PARTS[arguments.part]
    run_groups(contents.groups(), Run(device, report, contents.timing), arguments.seconds - 3)
    if late:
        names = ", ".join(sorted({compiled.kernel for compiled in late}))
        report.note(f"{len(late)} kernels had not been compiled before: {names}")


if __name__ == "__main__":
    main()
