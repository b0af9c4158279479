"""What all launches share: rows of x, facts about the GPU, stand-ins for absent arguments, counters, autocast."""

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

ON_GPU: dict[str, Callable[..., Tensor]] = {}
"""What torch's operators quantkit::NAME do on NVIDIA's GPUs, by name: for calls where there is none (`absent_gpu`)."""


def rows_of(x: Tensor) -> Tensor:
    """x [..., K], K >= 1, as [M, K] with the columns of a row side by side, as kernels address them; rows may be apart.

    Copies only where x has no such view.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def or_stand_in(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A tensor [...]; for None another, as the pointer that the kernel was compiled not to read."""
    return stand_in if tensor is None else tensor


def block_r(up: Tensor | None) -> int:
    """Columns of a low-rank correction [N, rank] that `tiles.finish` takes at once; 0 where there is none.

    As few as a tensor core sums over: of 32, trellis products of 16 rows spilled on sm_80.
    """
    return 0 if up is None else 16


def machine(tensor: Tensor) -> dict[str, bool]:
    """What a kernel's constants ASM and INTERPRETED are, where a tensor [...] is.

    Inline assembly is NVIDIA's; a tensor in the CPU's memory means Triton's interpreter, whose bf16 is wrong.
    """
    return {"ASM": tensor.is_cuda and torch.version.hip is None, "INTERPRETED": not tensor.is_cuda}


@lru_cache
def properties(device: torch.device) -> tuple[int, int, str]:
    """(compute capability, multiprocessors, name) of a GPU; of no particular one for the interpreter."""
    if device.type != "cuda":
        return 80, 8, "default"
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.multi_processor_count, found.name


@lru_cache
def fewest_rows() -> int:
    """Rows from which Triton multiplies with the warp-group's instructions."""
    import triton

    return 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 16


def pairs(capability: int, block_m: int) -> int:
    """Neighbouring columns that a lane's fragment holds: 2 in the instructions of Hopper (90) and Blackwell (10x), 4 as
    Triton uses mma.sync, which it does everywhere else and for blocks of few rows. The result is right with either."""
    return 2 if capability // 10 in (9, 10) and block_m >= fewest_rows() else 4


def current_device() -> int:
    """The GPU that launches go to."""
    return torch._C._cuda_getDevice()


def current_stream(device: int) -> int:
    """The address of a GPU's current stream."""
    return torch._C._cuda_getCurrentRawStream(device)


_overlapping = False


def overlap(enabled: bool) -> None:
    """Lets rotations and trellis products begin while the kernel before them in their stream still runs. Off at first.

    Programmatic dependent launch, of NVIDIA's GPUs since Hopper: a kernel waits, in all its programs, for the one
    before to end and for what it wrote, but what does not depend on it may come earlier. A product reads its first
    codes and steps by then, so where this is on, **the kernel just before a product must not write the product's
    weight**: true of inference, where a rotation or a norm is before it, not of a loop that changes packed weights.

    Applies to launches from then on, those that CUDA graphs record among them. Never run on a GPU yet.
    """
    global _overlapping
    _overlapping = enabled


def overlapping() -> bool:
    """Whether `overlap` is on."""
    return _overlapping


def dependent(tensor: Tensor) -> dict[str, bool]:
    """What a kernel that may overlap with the one before is launched with, where a tensor [...] is.

    That is its constant PDL, and Triton's option.
    """
    newer = tensor.is_cuda and torch.version.hip is None and properties(tensor.device)[0] >= 90
    return {"PDL": True, "launch_pdl": True} if _overlapping and newer else {"PDL": False}


class _Counters:
    """Zeros that split-K launches count their shares in, and leave zero: no launch has to clear them.

    Launches of one stream use the same ones. A launch that is captured into a CUDA graph gets its own, because a
    graph may be replayed beside anything.
    """

    def __init__(self, device: torch.device) -> None:
        self._zeros = torch.zeros(2**20, dtype=torch.int32, device=device)
        self._index, self._used = device.index, 0
        self._of_stream: dict[int, tuple[Tensor, int]] = {}  # and how many
        self._lock = threading.Lock()
        torch.cuda.synchronize(device)  # other streams will use them

    def take(self, count: int) -> Tensor:
        """int32 zeros [count] or more, for a launch on the current stream."""
        capturing = torch.cuda.is_current_stream_capturing()
        stream = current_stream(self._index)
        found, length = self._of_stream.get(stream, (None, 0))
        if found is not None and length >= count and not capturing:
            return found
        with self._lock:
            if capturing:
                return self._next(count)
            own = self._next(max(count, 2048))
            self._of_stream[stream] = own, len(own)
            return own

    def _next(self, count: int) -> Tensor:
        count = -(-count // 4) * 4  # kernels are compiled for an address that is a multiple of 16 bytes
        if self._used + count > len(self._zeros):
            return torch.zeros(count, dtype=torch.int32, device=self._zeros.device)
        self._used += count
        return self._zeros[self._used - count : self._used]


_PREPARED: dict[torch.device, _Counters] = {}


def prepare(device: torch.device) -> None:
    """Allocates what launches on a GPU share. Without it they are right but each clears its own counters.

    Not done by a launch itself, which may run while a CUDA graph is recorded or warmed up, when what is allocated
    belongs to the graph.
    """
    if device.type == "cuda" and device not in _PREPARED and not torch.cuda.is_current_stream_capturing():
        _PREPARED[device] = _Counters(device)


def counters(device: torch.device, count: int) -> Tensor:
    """int32 [count] zeros on a device."""
    prepared = _PREPARED.get(device)
    return torch.zeros(count, dtype=torch.int32, device=device) if prepared is None else prepared.take(count)


def in_own_types(function: Any, x: Tensor, *arguments: Any) -> Tensor:
    """function(x [...], *arguments), out of reach of autocast, which knows torch's own products only."""
    if not torch.is_autocast_enabled(x.device.type):
        return function(x, *arguments)
    with torch.autocast(x.device.type, enabled=False):
        return function(x, *arguments)
