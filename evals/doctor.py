"""What will happen on this machine: versions, memory, which kernels run, whether they are right, and how fast.

A product of every storage format is compared with fp64 products of the same weight, whatever computes it here, and
timed with one row of x beside torch's product with the dense weight; so is the search for trellis codes. On a GPU with
kernels each family's own cases (`quantkit.kernels.self_check`) are checked anew first, and their verdicts are kept.
"""

import math
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from quantkit.core.constants import RELEASE
from quantkit.core.errors import first_line
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.codebook import CodebookWeight
from quantkit.formats.int_group import IntGroupWeight
from quantkit.formats.pyramid import PyramidWeight
from quantkit.formats.rotated import RotatedWeight
from quantkit.formats.trellis import TrellisWeight
from quantkit.kernels import launching, self_check, trellis, viterbi
from quantkit.kernels.hadamard import random_signs
from quantkit.kernels.self_check_cases import FAMILIES
from quantkit.kernels.timing import seconds_per_call

REQUIRED = ("torch", "triton", "transformers", "accelerate", "safetensors", "numpy")
OPTIONAL = {
    "numba": ("cpu", "trellis codes in a fraction of the time, and packed products, on a CPU"),
    "datasets": ("hub", "wikitext2, c4 and other text from the hub"),
    "matplotlib": ("plots", "pictures of searches"),
    "peft": ("peft", "adapters on packed models"),
    "gguf": ("gguf", "models in GGUF files"),
}
"""By package: the extra that brings it, and what it is for."""
OLDEST = 80
"""Compute capability from which there are kernels."""
MOST = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Largest error of an element, in units of the result's root mean square, by the type of x."""
_SHAPE = {"cpu": (2048, 1024), "cuda": (4096, 4096)}
_SECONDS = 0.3  # of timing one product on a CPU
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Product:
    """A format's product, as this machine computes it.

    Attributes:
        name: of the format.
        error: largest error of an element over the result's root mean square, with 1 and with 17 rows.
        fault: what is wrong, or None.
        seconds: of one row, after a first call; dense_seconds: of torch with the dense weight.
    """

    name: str
    error: float | None = None
    fault: str | None = None
    seconds: float | None = None
    dense_seconds: float | None = None


@dataclass(frozen=True)
class Family:
    """A family of kernels on the GPU.

    Attributes:
        name: of the family.
        verdict: "right", what is wrong, or that memory did not suffice.
        seconds: of its check, the compiling of what was not compiled before included.
    """

    name: str
    verdict: str
    seconds: float


@dataclass(frozen=True)
class Findings:
    """All of it; `faults` holds what is to be repaired, nothing where all is sound."""

    versions: dict[str, str | None]
    gpus: list[dict[str, Any]]
    memory: dict[str, Any]
    device: str
    kernels: str
    families: list[Family]
    products: list[Product]
    optional: dict[str, str | None]
    faults: list[str]


def examine(device: torch.device, progress: Progress = lambda done, total, name: None) -> Findings:
    """Looks at the machine, and checks and times what packed models do on `device`.

    Args:
        progress: called with (checks done, checks in all, what comes next).
    """
    runs, kernels = kernels_on(device)
    families = list(FAMILIES) if runs else []
    todo = [*families, *_WEIGHTS, "search for trellis codes"]
    checked: list[Family] = []
    products: list[Product] = []
    for done, name in enumerate(todo):
        progress(done, len(todo), name)
        if name in families:
            checked.append(check_family(name, device))
        elif name in _WEIGHTS:
            products.append(check_product(name, device))
        else:
            products.append(check_search(device))
    progress(len(todo), len(todo), "")
    faults = [f"the {family.name} kernel: {family.verdict}" for family in checked if family.verdict != self_check.RIGHT]
    faults += [f"{product.name}: {product.fault}" for product in products if product.fault is not None]
    versions: dict[str, str | None] = {"quantkit": RELEASE, "python": platform.python_version()}
    return Findings(
        versions | {name: _installed(name) for name in REQUIRED}, gpus(), memory(), _name(device), kernels, checked,
        products, {name: _installed(name) for name in OPTIONAL}, faults,
    )  # fmt: skip


def kernels_on(device: torch.device) -> tuple[bool, str]:
    """(whether Triton kernels run on a device, and why)."""
    if device.type != "cuda":
        return False, "no GPU in use: products run in torch, or compiled for the CPU where numba is installed"
    capability = launching.properties(device)[0]
    if _installed("triton") is None:
        return False, "Triton is not installed: products run in torch"
    if capability < OLDEST:
        return False, f"kernels need compute capability {OLDEST / 10}, here is {capability / 10}: products run in torch"
    return True, f"Triton kernels of all {len(FAMILIES)} families, for compute capability {capability / 10}"


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability, driver and memory of every GPU that torch sees."""
    found = []
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{known.major}.{known.minor}"
        found.append(
            {"name": known.name, "capability": capability, "driver": self_check.driver(), "free": free, "total": total}
        )
    return found


def memory() -> dict[str, Any]:
    """Bytes that are free in RAM, and on the disks of the hub's cache and of the present folder."""
    from huggingface_hub.constants import HF_HUB_CACHE

    ram = psutil.virtual_memory()
    return {
        "ram": {"free": ram.available, "total": ram.total},
        "disk": {str(path): _free_disk(path) for path in (Path(HF_HUB_CACHE), Path.cwd())},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def check_family(name: str, device: torch.device) -> Family:
    """Runs a family's cases and makes the result its verdict from now on."""
    begun = time.monotonic()
    verdict = self_check.check(name, device)
    if verdict is not None:
        self_check.keep(name, device, verdict)
    return Family(name, verdict or "not checked, the GPU's memory is full", time.monotonic() - begun)


def check_product(name: str, device: torch.device) -> Product:
    """Compares a format's products with 1 and 17 rows with fp64, and times one row."""
    out_features, in_features = _SHAPE[device.type]
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    weight = _WEIGHTS[name](out_features, in_features, generator)
    exact_weight = weight.dequantize(torch.float64)
    inputs = [torch.randn(rows, in_features, generator=generator).to(dtype) for rows in (1, 17)]
    try:
        moved = weight.map(lambda tensor: tensor.to(device))
        moved.prepare()
        errors = [_off(moved.matmul(x.to(device)).cpu(), x.double() @ exact_weight.T) for x in inputs]
        x, dense = inputs[0].to(device), exact_weight.to(device, dtype)
        seconds = _time(lambda: moved.matmul(x), device)
        dense_seconds = _time(lambda: torch.nn.functional.linear(x, dense), device)
    except Exception as problem:  # a kernel's compiler, CUDA and numba raise many kinds
        return Product(name, fault=f"{type(problem).__name__}: {first_line(problem)}")
    return Product(name, *_judged(max(errors, key=_badness), MOST[dtype]), seconds, dense_seconds)


def check_search(device: torch.device) -> Product:
    """Compares the search for trellis codes with its specification: as near a path."""
    name = "search for trellis codes"
    generator = torch.Generator().manual_seed(0)
    values = trellis.table(12, device) / trellis.deviation(12)
    x = torch.randn(16, 128, generator=generator).to(device)
    free = torch.full((16,), viterbi.FREE, dtype=torch.int64, device=device)
    try:
        found, wanted = viterbi.search(x, values, 2), viterbi.reference(x, values, 2, free, free)
        costs = [(x.double() - values.double()[states.long()]).square().sum() for states in (found, wanted)]
        begun = time.monotonic()
        viterbi.search(x, values, 2).cpu()
        seconds = time.monotonic() - begun
    except Exception as problem:
        return Product(name, fault=f"{type(problem).__name__}: {first_line(problem)}")
    return Product(name, *_judged(abs(float(costs[0] / costs[1]) - 1), 1e-4), seconds)


def _off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.square().mean().sqrt())


def _badness(error: float) -> float:
    return error if math.isfinite(error) else math.inf


def _judged(error: float, most: float) -> tuple[float | None, str | None]:
    """(the error, None where it is no number; what is wrong with it, or None)."""
    fault = None if error <= most else f"off by {error:.2g}, where {most:.2g} is rounding"
    return error if math.isfinite(error) else None, fault


def _time(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call after those that compile it: the median of some, on a GPU in a CUDA graph."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return seconds_per_call([call])
    times: list[float] = []
    end = time.monotonic() + _SECONDS
    while not times or (time.monotonic() < end and len(times) < 50):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _int_group(bits: int) -> Callable[[int, int, torch.Generator], QuantizedWeight]:
    def make(n: int, k: int, generator: torch.Generator) -> QuantizedWeight:
        codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
        scales = (torch.rand(-(-k // 128), n, generator=generator) + 0.5).half()
        return IntGroupWeight.pack(codes, scales, None, bits, 128)

    return make


def _trellis(bits: int) -> Callable[[int, int, torch.Generator], QuantizedWeight]:
    def make(n: int, k: int, generator: torch.Generator) -> QuantizedWeight:
        codes = torch.randint(-(2**31), 2**31, (trellis.lines([n], bits)[0], k), generator=generator).int()
        scales = torch.randint(208, 256, (1, k), generator=generator, dtype=torch.uint8)
        return TrellisWeight(codes, scales, torch.rand(1, generator=generator) + 0.1, bits, 16, [n])

    return make


def _codebook(n: int, k: int, generator: torch.Generator) -> QuantizedWeight:
    codes = torch.randint(0, 256, (-(-n // 4), k), generator=generator)
    return CodebookWeight.pack([codes], [torch.randn(1, 256, 4, generator=generator).half()], n)


def _pyramid(n: int, k: int, generator: torch.Generator) -> QuantizedWeight:
    places = torch.randint(0, 8, (-(-n // 8), k, 6), generator=generator)
    points = torch.zeros(-(-n // 8), k, 8, dtype=torch.int64).scatter_add_(2, places, torch.ones_like(places))
    gains = torch.randint(0, 2, points.shape[:2], generator=generator)
    scales, levels = (torch.rand(k, generator=generator) + 0.5).half(), torch.tensor([0.7, 1.3]).half()
    return PyramidWeight.pack(points, gains, scales, levels, 6, "out", (n, k))


def _rotated(n: int, k: int, generator: torch.Generator) -> QuantizedWeight:
    return RotatedWeight(_int_group(4)(n, k, generator), random_signs(k, 0), random_signs(n, 1))


_WEIGHTS: dict[str, Callable[[int, int, torch.Generator], QuantizedWeight]] = {
    **{f"integers, {bits} bits": _int_group(bits) for bits in (2, 3, 4, 8)},
    **{f"trellis, {bits} bits": _trellis(bits) for bits in (2, 3, 4)},
    "codebook, 2 bits": _codebook,
    "pyramid, 2 bits": _pyramid,
    "integers, 4 bits, rotated": _rotated,
}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"CPU ({platform.processor() or platform.machine()})"


def _free_disk(path: Path) -> int | None:
    there: Iterator[Path] = (folder for folder in (path, *path.parents) if folder.exists())
    try:
        return shutil.disk_usage(next(there)).free
    except (OSError, StopIteration):
        return None
