"""Microseconds of Python that a packed linear's call takes before the GPU gets its kernel.

    python -m quantkit.evals.host_time [--repeats N] [--json FILE]

A generated token is one call of every linear with one row: where Python takes longer than the kernels, the GPU waits.
Each layer is called as a model calls it, by plans (`quantkit.kernels.plans`) and, for comparison, through torch's
operators. No GPU is needed: kernels are compiled as ever, and all that is replaced is what asks or feeds a GPU,

    the call of CUDA's driver           by a function that takes the same arguments and does nothing
    facts about GPU and stream          by those of an H100, and constants
    tensors                             by ones in the CPU's memory, whose allocator takes about as long as CUDA's
    torch.mm, of a low-rank correction  by an allocation

so that a real call takes what is printed and the driver's own 2 microseconds a launch. It is CPU time of the thread, in
the fastest of many short runs: other processes only ever add to it.
"""

import argparse
import contextlib
import functools
import json
import os
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from quantkit.core.weight import QuantizedWeight
from quantkit.formats.codebook import CodebookWeight
from quantkit.formats.int_group import IntGroupWeight
from quantkit.formats.low_rank import LowRankWeight
from quantkit.formats.pyramid import PyramidWeight
from quantkit.formats.rotated import RotatedWeight
from quantkit.formats.trellis import TrellisWeight
from quantkit.kernels import (
    codebook_matmul,
    hadamard,
    int_group_matmul,
    launching,
    plans,
    pyramid,
    pyramid_matmul,
    trellis_matmul,
)
from quantkit.kernels.bitpack import row_words
from quantkit.models.linear import QuantizedLinear

SIZE = 4096
"""Inputs and outputs of the layers."""


@dataclass(frozen=True)
class Times:
    """Microseconds a call.

    Attributes:
        layer: what was called.
        operator: through torch's dispatcher and Triton's launcher.
        plan: by a plan.
    """

    layer: str
    operator: float
    plan: float


def driver() -> Any:
    """A driver for Triton whose launches do nothing, on a GPU of compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher

    class Launcher(CudaLauncher):
        """Triton's own, but for the call into CUDA."""

        def __init__(self, src: Any, metadata: Any) -> None:
            self.num_ctas = getattr(metadata, "num_ctas", 1)
            for name in ("global_scratch", "profile_scratch"):
                setattr(self, f"{name}_size", getattr(metadata, f"{name}_size"))
                setattr(self, f"{name}_align", getattr(metadata, f"{name}_align"))
            self.launch_cooperative_grid, self.launch_pdl = metadata.launch_cooperative_grid, metadata.launch_pdl
            self.arg_annotations = self.kernel_signature = None
            self.launch = _nothing

    target = GPUTarget("cuda", 90, 32)
    return _Namespace(
        launcher_cls=Launcher,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
        utils=_Namespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda name, kernel, shared, device: (1, 1, 32, 0, 1024),
        ),
    )


class _Namespace:
    """Attributes by name."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def _nothing(*arguments: Any) -> None:
    """Instead of a launch."""


class _Counters(launching._Counters):
    """The production counters, in the CPU's memory."""

    def __init__(self) -> None:
        with mock.patch.object(torch.cuda, "synchronize", _nothing):
            super().__init__(torch.device("cpu"))


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Launches on tensors in the CPU's memory go as they would on a GPU, but for the driver."""
    import triton

    triton.runtime.driver.set_active(driver())
    cpu = torch.device("cpu")
    with contextlib.ExitStack() as stack:
        for name, stub in {
            "machine": lambda tensor: {"ASM": True, "INTERPRETED": False},
            "properties": lambda device: (90, 132, "stub"),
            "current_device": lambda: None,
            "current_stream": lambda device: 0,
        }.items():
            stack.enter_context(mock.patch.object(launching, name, stub))
        stack.enter_context(mock.patch.dict(launching._PREPARED, {cpu: _Counters()}))
        stack.enter_context(mock.patch.object(plans, "on_gpu", lambda x: not x.is_cuda))
        stack.enter_context(mock.patch.object(torch, "mm", lambda a, b: a.new_empty(len(a), b.shape[1])))
        stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        library = torch.library.Library("quantkit", "IMPL")
        for name, launch in {
            "int_group_matmul": _implementation(int_group_matmul.launch),
            "codebook_matmul": _implementation(codebook_matmul.launch),
            "trellis_matmul": _implementation(trellis_matmul.launch),
            "pyramid_matmul": _implementation(pyramid_matmul.launch),
            "pyramid_table_matmul": _implementation(pyramid_matmul.table_launch),
            "rotate": _implementation(hadamard.launch),
        }.items():
            library.impl(name, launch, "CPU")
        try:
            yield
        finally:
            library._destroy()
            triton.runtime.driver.set_active(None)


def _implementation(launch: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x, *others: launching.in_own_types(launch, x, *others)


def layers() -> dict[str, QuantizedWeight]:
    """One weight a kernel family, SIZE x SIZE; what the codes are does not matter."""
    words = torch.zeros(SIZE, row_words(SIZE, 4), dtype=torch.int32)
    int4 = IntGroupWeight(words, torch.ones(SIZE // 128, SIZE, dtype=torch.float16), 4, 128, SIZE)
    signs = hadamard.random_signs(SIZE, 0)
    empty = TrellisWeight.layout([SIZE], SIZE, 2, 16)
    trellis = empty.map(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    books = torch.zeros(1, 256, 4, dtype=torch.float16)
    codebook = CodebookWeight(torch.zeros(SIZE // 4, row_words(SIZE, 8), dtype=torch.int32), books, SIZE, SIZE)
    fields = torch.zeros(SIZE // 8, row_words(SIZE, pyramid.index_bits(8, 6) + 1), dtype=torch.int32)
    scales, levels = torch.ones(SIZE, dtype=torch.float16), torch.ones(2, dtype=torch.float16)
    points = PyramidWeight(fields, scales, levels, 8, 6, "out", SIZE, SIZE)
    up, down = (torch.zeros(shape, dtype=torch.float16) for shape in ((SIZE, 64), (64, SIZE)))
    return {
        "int4": int4,
        "int4, rotated": RotatedWeight(int4, signs),
        "int4, rank 64": LowRankWeight(int4, up, down),
        "trellis 2 bits": trellis,
        "trellis 2 bits, rotated": RotatedWeight(trellis, signs),
        "codebook v=4 8 bits": codebook,
        "pyramid D=8 K=6": points,
    }


def microseconds(call: Callable[[], object], repeats: int) -> float:
    """CPU time of a call in the fastest of `repeats` runs of 50."""
    call()
    return min(timeit.repeat(call, timer=time.thread_time, number=50, repeat=repeats)) / 50 * 1e6


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--json", type=Path, help="write the table")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: TRITON_INTERPRET=1 is set, which turns Triton's launcher off; unset it")
    torch.set_num_threads(1)
    rows, x = [], torch.randn(1, 1, SIZE).to(torch.bfloat16)
    print(f"{'layer':26} {'operator':>9} {'plan':>6}   microseconds a call, the driver's own apart")
    with stubbed(), torch.inference_mode():
        for name, weight in layers().items():
            layer = QuantizedLinear(weight)
            call = functools.partial(layer, x)
            plan = microseconds(call, arguments.repeats)
            with mock.patch.object(plans, "direct", lambda *arguments: False):
                operator = microseconds(call, arguments.repeats)
            rows.append(Times(name, round(operator, 1), round(plan, 1)))
            print(f"{name:26} {operator:9.1f} {plan:6.1f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
