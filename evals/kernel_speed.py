"""Kernel speed on a GPU, after the kernels' correctness on that very GPU.

    python -m quantkit.evals.kernel_speed --out FOLDER [--bits 2 3 4 8] [--rows 1 8 16 64 256] [--minutes 5]

First every regime is compared with fp64 products on the device; a failure ends the run, and no speed is reported.
Then each launch is timed inside a CUDA graph over weights that no cache holds (8 at least, 256 MiB at least), beside
torch's bf16 matmul of the same shape in the same run, and beside gemlite, torchao and hqq where they can be imported.
Writes kernel_speed.json and kernel_speed.md to the folder.
"""

import argparse
import datetime
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.evals.decode import copy_bandwidth
from quantkit.formats.int_group import IntGroupWeight
from quantkit.kernels.bitpack import row_words
from quantkit.kernels.int_group_matmul import dequantized, int_group_matmul
from quantkit.kernels.timing import seconds_per_call

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672))
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 4e-3}
_DISTINCT_BYTES = 2**28
_CASES = [(520, 1024, 128, False), (272, 640, 64, True), (64, 256, 32, False), (257, 4096, 1024, True)]
"""N, K, group size, zeros of the products that are checked."""
Timer = Callable[[Sequence[Callable[[], object]]], float]


@dataclass(frozen=True)
class Timing:
    """One launch.

    Attributes:
        what: "int3 g128", "torch bf16", or a peer's name.
        N, K, M: outputs, inputs, rows of x.
        microseconds: median of a call.
        gigabytes_per_second: bytes that must move, over the time.
        bandwidth_share: of the device's measured copy bandwidth.
        speed_up: time of torch's bf16 matmul of the same shape over this one's.
    """

    what: str
    N: int
    K: int
    M: int
    microseconds: float
    gigabytes_per_second: float
    bandwidth_share: float
    speed_up: float


def random_weight(
    N: int, K: int, bits: int, group_size: int, zeros: bool, device: torch.device, seed: int = 0
) -> IntGroupWeight:
    """A weight of random codes; K a multiple of 128, where every word is a valid one."""
    generator = torch.Generator(device).manual_seed(seed)
    words = torch.randint(
        -(2**31), 2**31 - 1, (N, row_words(K, bits)), dtype=torch.int32, device=device, generator=generator
    )
    groups = -(-K // group_size)
    scales = (0.5 + torch.rand(groups, N, device=device, generator=generator)).half() / 2**bits
    offsets = (2**bits * torch.rand(groups, N, device=device, generator=generator)).half() if zeros else None
    return IntGroupWeight(words, scales, bits, group_size, K, offsets)


def product(x: Tensor, weight: IntGroupWeight, *extra: Tensor | None) -> Tensor:
    """The operator under test."""
    return int_group_matmul(x, weight.codes, weight.scales, weight.zeros, weight.bits, weight.group_size, *extra)


def faults(device: torch.device) -> Iterator[str]:
    """What the kernels get wrong on this device; nothing, as it should be."""
    cases = [(dtype, bits, case) for dtype in TOLERANCE for bits in (2, 3, 4, 8) for case in _CASES[:2]]
    cases += [(torch.bfloat16, 3, case) for case in _CASES[2:]]
    for dtype, bits, (N, K, group_size, zeros) in cases:
        weight = random_weight(N, K, bits, group_size, zeros, device)
        exact_weight = dequantized(weight.codes, weight.scales, weight.zeros, bits, group_size, K)
        name = f"int{bits} g{group_size} [{N}, {K}] {dtype}"
        bias = torch.randn(N, device=device, dtype=dtype)
        up, down = torch.randn(N, 24, device=device, dtype=dtype), torch.randn(24, K, device=device, dtype=dtype) / 32
        for M in (1, 3, 8, 16, 31, 64, 300):
            x = torch.randn(M, K, device=device, dtype=dtype)
            exact = x.double() @ exact_weight.double().T
            y = product(x, weight)
            error = float((y.double() - exact).norm() / exact.norm())
            # above the decode regime weights are rounded to x's type, then the result: two roundings
            if not error <= TOLERANCE[dtype] * (1 if M <= 32 else 1.5):
                yield f"{name} M={M}: relative error {error:.2e}"
            if not torch.equal(y, product(x, weight)):
                yield f"{name} M={M}: two runs differ"
            corrected = product(x, weight, bias, up, down)
            exact = exact + bias.double() + x.double() @ down.double().T @ up.double().T
            error = float((corrected.double() - exact).norm() / exact.norm())
            if not error <= 1.5 * TOLERANCE[dtype]:
                yield f"{name} M={M} with bias and correction: relative error {error:.2e}"
        identity = torch.eye(K, device=device, dtype=dtype)
        for rows in (8, 16, 32, 64, K):
            part = identity[-rows:]
            if not torch.equal(product(part, weight).T, exact_weight.to(dtype)[:, -rows:]):
                yield f"{name}: {rows} rows of the identity do not give the dequantized weight exactly"


def measure(
    device: torch.device,
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    bits: Sequence[int],
    timer: Timer,
    bandwidth: float,
    deadline: float = math.inf,
    group_size: int = 128,
) -> Iterator[Timing]:
    """Times all launches.

    Args:
        device: the GPU.
        shapes: [N, K].
        rows: values of M.
        bits: widths of the codes.
        timer: seconds of a call, given calls on distinct tensors.
        bandwidth: bytes a second of a copy.
        deadline: of time.monotonic(); no launch is begun after it.
        group_size: of the weights.
    """
    for N, K in shapes:
        dense = [torch.randn(N, K, device=device, dtype=torch.bfloat16) for _ in range(_copies(2 * N * K))]
        base: dict[int, float] = {}
        for M in rows:
            x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
            base[M] = timer([_call(torch.nn.functional.linear, x, w) for w in dense])
            yield _timing("torch bf16", N, K, M, base[M], 2 * N * K, base[M], bandwidth)
        del dense
        for width in bits:
            example = random_weight(N, K, width, group_size, False, device)
            weights = [random_weight(N, K, width, group_size, False, device, s) for s in range(_copies(example.nbytes))]
            for M in rows:
                if time.monotonic() > deadline:
                    return
                x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
                seconds = timer([_call(product, x, weight) for weight in weights])
                what = f"int{width} g{group_size}"
                yield _timing(what, N, K, M, seconds, example.nbytes, base[M], bandwidth)
            for name, layers, nbytes in peers(N, K, width, group_size, device, _copies(example.nbytes)):
                for M in rows:
                    if time.monotonic() > deadline:
                        return
                    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
                    try:
                        seconds = timer([_call(layer, x) for layer in layers])
                    except Exception as error:  # another library's; ours go on
                        print(f"{name} int{width} M={M}: {type(error).__name__}")
                        continue
                    yield _timing(f"{name} int{width}", N, K, M, seconds, nbytes, base[M], bandwidth)


def _copies(nbytes: int) -> int:
    return min(256, max(8, _DISTINCT_BYTES // nbytes + 1))


def _call(function: Callable, *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


def _timing(
    what: str, N: int, K: int, M: int, seconds: float, weight_bytes: int, base: float, bandwidth: float
) -> Timing:
    moved = (weight_bytes + 2 * M * (N + K)) / seconds
    return Timing(what, N, K, M, 1e6 * seconds, moved / 1e9, moved / bandwidth, base / seconds)


def peers(
    N: int, K: int, bits: int, group_size: int, device: torch.device, copies: int
) -> Iterator[tuple[str, list[Callable], int]]:
    """Other libraries' layers of the same shape: (name, layers, bytes of one); those that fail are named."""
    for name, make in (("gemlite", _gemlite), ("torchao", _torchao), ("hqq", _hqq)):
        try:
            layers = [make(N, K, bits, group_size, device) for _ in range(copies)]
            layers[0](torch.randn(1, K, device=device, dtype=torch.bfloat16))
        except ImportError:
            continue
        except Exception as error:  # whatever another library raises on a width or GPU that it does not know
            print(f"{name} int{bits}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        yield name, layers, N * K * bits // 8 + 4 * N * K // group_size


def _gemlite(N: int, K: int, bits: int, group_size: int, device: torch.device) -> Callable:
    from gemlite.core import DType, GemLiteLinear

    layer = GemLiteLinear(bits, group_size, K, N, input_dtype=DType.BF16, output_dtype=DType.BF16)
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, device=device)
    scales = torch.rand(N * K // group_size, 1, device=device, dtype=torch.bfloat16)
    layer.pack(codes, scales, torch.full_like(scales, (2**bits - 1) / 2), None)
    return layer


def _torchao(N: int, K: int, bits: int, group_size: int, device: torch.device) -> Callable:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    if bits != 4:
        raise ValueError("4 bits only")
    model = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False, device=device, dtype=torch.bfloat16))
    quantize_(model, Int4WeightOnlyConfig(group_size=group_size))
    return model


def _hqq(N: int, K: int, bits: int, group_size: int, device: torch.device) -> Callable:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear = torch.nn.Linear(K, N, bias=False, device=device, dtype=torch.bfloat16)
    config = BaseQuantizeConfig(nbits=bits, group_size=group_size)
    return HQQLinear(linear, config, compute_dtype=torch.bfloat16, device=str(device))


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, driver, versions and date."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver, clocks": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def table(timings: Sequence[Timing]) -> str:
    """Markdown: a row a shape and kernel, a column an M; speed-up over torch bf16 and microseconds."""
    rows = sorted({timing.M for timing in timings})
    lines = ["| N x K | kernel | " + " | ".join(f"M={M}" for M in rows) + " |", "|---" * (len(rows) + 2) + "|"]
    for N, K, what in dict.fromkeys((t.N, t.K, t.what) for t in timings):
        found = {t.M: t for t in timings if (t.N, t.K, t.what) == (N, K, what)}
        cells = [f"{found[M].speed_up:.2f}x ({found[M].microseconds:.1f} us)" if M in found else "" for M in rows]
        lines.append(f"| {N} x {K} | {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64, 256])
    parser.add_argument("--minutes", type=float, default=5, help="of timing; no launch is begun after so long")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "error: this measures a GPU and there is none here; `python -m quantkit.evals.kernel_build` needs none"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    wrong = list(faults(device))
    for line in wrong:
        print(line)
    if wrong:
        sys.exit(f"error: {len(wrong)} results are wrong on this GPU; no speed is reported")
    print("correct on this GPU")
    deadline = time.monotonic() + 60 * arguments.minutes
    bandwidth = copy_bandwidth(device)
    about = describe(device) | {"copy_gigabytes_per_second": bandwidth / 1e9}
    timings = []
    try:
        for timing in measure(device, SHAPES, arguments.rows, arguments.bits, seconds_per_call, bandwidth, deadline):
            timings.append(timing)
            print(
                f"{timing.N:6} x {timing.K:6} M={timing.M:4} {timing.what:16} {timing.microseconds:9.2f} us "
                f"{timing.gigabytes_per_second:8.0f} GB/s {100 * timing.bandwidth_share:5.1f}% {timing.speed_up:6.2f}x",
                flush=True,
            )
    finally:
        _write(arguments.out, about, timings)
    if time.monotonic() > deadline:
        print(f"cut after {arguments.minutes:g} minutes; give more with --minutes")


def _write(folder: Path, about: dict[str, Any], timings: list[Timing]) -> None:
    """The results as JSON and as a table, also of a run that was cut."""
    folder.mkdir(parents=True, exist_ok=True)
    record = about | {"timings": [asdict(timing) for timing in timings]}
    (folder / "kernel_speed.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [f"- {key}: {value}" for key, value in about.items()]
    (folder / "kernel_speed.md").write_text("\n".join(lines) + "\n\n" + table(timings))
    print(table(timings))


if __name__ == "__main__":
    main()
