"""A GPU that is not there: launches as on one, with everything done but the launch itself.

Inside `absent_gpu`, tensors on "cuda" have shapes and types but no memory (torch's meta device), questions about the
device are answered for the GPU that is named, the library's operators take their GPU path, and Triton compiles what is
launched, with the very specialization that a launch there would ask for, into its cache on disk. Nothing runs. So every
kernel that a program would launch can be compiled, and judged, on any machine, by calling the program itself; and
another process with the same Triton and a real GPU of that kind finds the kernels in the cache.

Answers that depend on numbers inside tensors (`item`, `tolist`) cannot be given: such code raises torch's own error.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from quantkit.kernels import launching, self_check

DEVICE = torch.device("cuda", 0)
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
"""Bytes that a program may use, by compute capability; see `shared_memory` for others."""


def shared_memory(arch: int) -> int:
    """Bytes that a program may use: what the least of the GPUs since sm_80 has, where nothing else is known."""
    return SHARED_MEMORY.get(arch, min(SHARED_MEMORY.values()))


@dataclass(frozen=True)
class GPU:
    """The GPU in question.

    Attributes:
        arch: compute capability, e.g. 90.
        multiprocessors: of it.
        name: as torch tells it, by which measured launch sizes are found.
    """

    arch: int = 90
    multiprocessors: int = 132
    name: str = "absent"


@dataclass(frozen=True)
class Compiled:
    """A compiled binary.

    Attributes:
        kernel: the function's name.
        key: of the binary in Triton's cache.
        shared: bytes of dynamic shared memory.
        seconds: that compiling took.
        cached: whether it was on disk already.
        cubin: its file.
    """

    kernel: str
    key: str
    shared: int
    seconds: float
    cached: bool
    cubin: str


class _OnDevice(TorchFunctionMode):
    """Tensors that say they are on the GPU, and are on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers questions about the device, and moves everything else."""
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return args[0].is_meta
        if func == Tensor.is_meta.__get__:  # type: ignore[attr-defined]
            return False
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE if args[0].is_meta else args[0].device
        if func == Tensor.data_ptr:  # kernels are compiled for its alignment
            return args[0].storage_offset() * args[0].element_size()
        moved = [_moved(value) for value in args]
        options = {name: _moved(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "quantkit":
            with self:  # torch has left the mode in order to ask it
                return launching.ON_GPU[func._schema.name.partition("::")[2]](*moved, **options)
        return func(*moved, **options)


def _moved(value: Any) -> Any:
    """A device as torch is to hear it."""
    on_gpu = isinstance(value, torch.device) and value.type == "cuda"
    return torch.device("meta") if on_gpu or (isinstance(value, str) and value.startswith("cuda")) else value


class _Driver:
    """What Triton asks of a driver, answered without one."""

    def __init__(self, gpu: GPU) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", gpu.arch, 32)
        properties = {
            "max_shared_mem": shared_memory(gpu.arch), "multiprocessor_count": gpu.multiprocessors, "warpSize": 32,
        }  # fmt: skip
        self.utils = SimpleNamespace(
            load_binary=lambda *binary: (1, 1, 0, 0, 1024), get_device_properties=lambda device: properties
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """A launch that does nothing."""
        return lambda *arguments, **options: None

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> Any:
        """What to compile for."""
        return self._target

    def get_active_torch_device(self) -> torch.device:
        """As torch names it."""
        return DEVICE


@contextlib.contextmanager
def absent_gpu(gpu: GPU, told: Callable[[Compiled], None] = lambda compiled: None) -> Iterator[torch.device]:
    """Makes launches on "cuda" possible where there is no GPU, and calls `told` for each binary that they ask for.

    For a process that does nothing else: what the library keeps for a device (counters, tables) stays without memory.

    Raises:
        RuntimeError: Triton's interpreter is on, which compiles nothing.
    """
    from triton import knobs
    from triton.runtime.driver import driver

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set, which turns the compiler off; unset it")
    properties = SimpleNamespace(
        major=gpu.arch // 10, minor=gpu.arch % 10, multi_processor_count=gpu.multiprocessors, name=gpu.name
    )
    answers: dict[str, Any] = {
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: gpu.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "current_device": lambda: 0,
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
        "device": lambda device: contextlib.nullcontext(),
        "device_of": lambda tensor: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: None,
    }
    previous = driver._active
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for module, name, replacement in (
            (launching, "current_device", answers["current_device"]),
            (launching, "current_stream", lambda device: 0),
            (self_check, "trusted", lambda family, device: True),  # nothing runs that could be judged, or remembered
            (self_check, "known", lambda family, device: True),
        ):
            stack.enter_context(mock.patch.object(module, name, replacement))
        stack.enter_context(mock.patch.object(knobs.compilation, "listener", listener(told)))
        driver.set_active(_Driver(gpu))  # type: ignore[arg-type]
        stack.callback(driver.set_active, previous)
        stack.enter_context(_OnDevice())
        yield DEVICE


def listener(told: Callable[[Compiled], None]) -> Callable[..., None]:
    """What Triton calls for each binary, to be set as `triton.knobs.compilation.listener`."""

    def compiled(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        """What Triton calls behind each compilation, in our words."""
        cubin = next((str(path) for name, path in metadata_group.items() if name.endswith(".cubin")), "")
        key = str(metadata["hash"])
        told(Compiled(metadata["name"], key, metadata["shared"], times.total / 1e6, cache_hit, cubin))

    return compiled
