"""Kernel speed on a GPU, after the kernels' correctness on that very GPU.

    python -m quantkit.evals.kernel_speed --out FOLDER [--only WORD] [--rows 1 8 16 64 256] [--minutes 5]

First every regime of every kernel is compared with fp64 products on the device; a failure ends the run, and no speed is
reported.
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
from quantkit.kernels import codebook_matmul, hadamard, int_group_matmul, pyramid_matmul, trellis_matmul
from quantkit.kernels.bitpack import pack, row_words
from quantkit.kernels.pyramid import count, index_bits
from quantkit.kernels.timing import seconds_per_call
from quantkit.kernels.trellis import ring_length

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672))
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 4e-3}
_DISTINCT_BYTES = 2**28
Timer = Callable[[Sequence[Callable[[], object]]], float]


@dataclass(frozen=True)
class Timing:
    """One launch.

    Attributes:
        what: a kind's name, "torch bf16", or a peer's name.
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


@dataclass(frozen=True)
class Weight:
    """Random arguments of one of the operators.

    Attributes:
        arguments: between x and bias.
        operator: the product, (x, *arguments, bias, up, down).
        dequantized: the weight in fp32, (*arguments, in_features).
    """

    arguments: tuple[Any, ...]
    operator: Callable[..., Tensor]
    dequantized: Callable[..., Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in self.arguments if isinstance(value, Tensor))


@dataclass(frozen=True)
class Kind:
    """A kernel and a form of its weight.

    Attributes:
        name: of it, in a table.
        make: (N, K, device, generator) -> weight; K a multiple of 128.
        peers_bits, group_size: of other libraries' layers that do the same; 0 for none.
    """

    name: str
    make: Callable[[int, int, torch.device, torch.Generator], Weight]
    peers_bits: int = 0
    group_size: int = 128

    def weight(self, N: int, K: int, device: torch.device, seed: int = 0) -> Weight:
        """A random weight."""
        return self.make(N, K, device, torch.Generator(device).manual_seed(seed))


def integers(bits: int, group_size: int = 128, zeros: bool = False) -> Kind:
    """Random integer weights."""

    def make(N: int, K: int, device: torch.device, generator: torch.Generator) -> Weight:
        groups = -(-K // group_size)
        scales = (0.5 + torch.rand(groups, N, device=device, generator=generator)).half() / 2**bits
        offsets = (2**bits * torch.rand(groups, N, device=device, generator=generator)).half() if zeros else None
        arguments = _words(N, row_words(K, bits), device, generator), scales, offsets, bits, group_size
        return Weight(arguments, int_group_matmul.int_group_matmul, int_group_matmul.dequantized)

    return Kind(f"int{bits} g{group_size}{' zeros' if zeros else ''}", make, 0 if zeros else bits, group_size)


def codebooks(v: int, bits: int, residual_bits: int = 0, ranges: int = 1) -> Kind:
    """Random vector-quantized weights."""

    def make(N: int, K: int, device: torch.device, generator: torch.Generator) -> Weight:
        arguments: list[Any] = []
        for width in (bits, residual_bits):
            book = torch.randn(ranges, 1 << width, v, device=device, generator=generator).half() if width else None
            codes = _words(-(-N // v), row_words(K, width), device, generator) if width else None
            arguments += [codes, book]
        return Weight((*arguments, N), codebook_matmul.codebook_matmul, codebook_matmul.dequantized)

    more = f"+{residual_bits}" if residual_bits else ""
    return Kind(f"codebook v{v} {bits}{more} bits{f' {ranges} ranges' if ranges > 1 else ''}", make)


def pyramids(bits: int, dimension: int) -> Kind:
    """Random pyramid weights, decoded to integers of `bits` bits."""

    def make(N: int, K: int, device: torch.device, generator: torch.Generator) -> Weight:
        factors = (0.5 + torch.rand(-(-N // dimension), K, device=device, generator=generator)).half() / 2**bits
        words = pack(factors.view(torch.int16).int() & 0xFFFF, 16)
        arguments = _words(N, row_words(K, bits), device, generator), words, bits, dimension
        return Weight(arguments, pyramid_matmul.pyramid_matmul, pyramid_matmul.dequantized)

    return Kind(f"pyramid D={dimension} as int{bits}", make)


def pyramid_table(pulses: int = 6, gain_bits: int = 1) -> Kind:
    """Random pyramid weights of groups of 8, packed."""

    def make(N: int, K: int, device: torch.device, generator: torch.Generator) -> Weight:
        lines = -(-N // 8), K
        fields = torch.randint(0, count(8, pulses), lines, dtype=torch.int32, device=device, generator=generator)
        gain = torch.randint(0, 1 << gain_bits, lines, dtype=torch.int32, device=device, generator=generator)
        scales = (0.5 + torch.rand(K, device=device, generator=generator)).half()
        levels = (0.5 + torch.rand(1 << gain_bits, device=device, generator=generator)).half()
        width = index_bits(8, pulses) + gain_bits
        tables = pyramid_matmul.lane_order(scales), pyramid_matmul.gain_table(levels)
        points = pyramid_matmul.point_table(pulses, device)
        arguments = pack(fields | gain << (width - gain_bits), width), *tables, points, width, N
        return Weight(arguments, pyramid_matmul.pyramid_table_matmul, pyramid_matmul.dequantized_table)

    return Kind(f"pyramid D=8 K={pulses} table", make)


def trellises(bits: int, state_bits: int = 16) -> Kind:
    """Random trellis-coded weights."""

    def make(N: int, K: int, device: torch.device, generator: torch.Generator) -> Weight:
        codes = _words(ring_length(N) * bits // 32, K, device, generator)
        steps = torch.randint(200, 256, (1, K), dtype=torch.uint8, device=device, generator=generator)
        arguments = codes, steps, torch.full((1,), 0.5, device=device), bits, state_bits, [N]
        return Weight(arguments, trellis_matmul.trellis_matmul, trellis_matmul.dequantized)

    return Kind(f"trellis K={bits}{f' L={state_bits}' if state_bits < 16 else ''}", make)


def _words(rows: int, words: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Where K is a multiple of 128 every word is a valid one."""
    return torch.randint(-(2**31), 2**31 - 1, (rows, words), dtype=torch.int32, device=device, generator=generator)


TIMED = [
    *[integers(bits) for bits in (2, 3, 4, 8)],
    *[pyramids(4, 32), pyramids(4, 16), pyramid_table()],
    *[codebooks(4, 8), codebooks(6, 12), codebooks(8, 8, 8), codebooks(3, 6), codebooks(4, 12), codebooks(8, 16)],
    *[trellises(bits) for bits in (1, 2, 3, 4)],
]
"""What is timed."""
_CHECKED = [
    *[(kind, 520, 1024) for kind in TIMED],
    *[(integers(bits, 64, True), 272, 640) for bits in (2, 3, 4, 8)],
    *[(integers(3, 32), 64, 256), (integers(3, 1024, True), 257, 4096)],
    *[
        (pyramids(bits, dimension), 270, 640)
        for bits, dimension in ((2, 32), (3, 16), (5, 9), (6, 6), (7, 32), (8, 64))
    ],
    *[(pyramid_table(4, 2), 77, 640), (codebooks(1, 2), 77, 640), (codebooks(5, 9, 3), 77, 640)],
    *[(trellises(bits), 270, 640) for bits in (1, 3, 5, 6, 7, 8)],
    *[(trellises(3, 12), 77, 1000), (trellises(2, 8), 77, 1000), (trellises(2), 77, 333)],
    *[(codebooks(2, 4, 0, 2), 129, 1024), (codebooks(16, 12, 0, 2), 100, 1024), (codebooks(8, 8, 8, 4), 100, 1024)],
]
"""(kind, N, K) that is compared with fp64."""


def faults(device: torch.device) -> Iterator[str]:
    """What the kernels get wrong on this device; nothing, as it should be."""
    for kind, N, K in _CHECKED:
        for dtype in TOLERANCE:
            yield from _faults(kind, N, K, dtype, device)
    for n in (64, 896, 4096, 5120, 11008, 14336, 18944):
        signs = torch.randint(0, 256, (-(-n // 8),), dtype=torch.uint8, device=device)
        for dtype in TOLERANCE:
            for rows in (1, 5, 700):
                x = torch.randn(rows, n, device=device, dtype=dtype)
                y, exact = hadamard.rotate(x, signs, False), hadamard.reference(x.double(), signs, False)
                error = float((y.double() - exact).norm() / exact.norm())
                if not error <= TOLERANCE[dtype]:
                    yield f"rotation of {n} {dtype}, {rows} rows: relative error {error:.2e}"


def _faults(kind: Kind, N: int, K: int, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    weight = kind.weight(N, K, device)
    exact_weight = weight.dequantized(*weight.arguments, K)
    name = f"{kind.name} [{N}, {K}] {dtype}"
    bias = torch.randn(N, device=device, dtype=dtype)
    up, down = torch.randn(N, 24, device=device, dtype=dtype), torch.randn(24, K, device=device, dtype=dtype) / 32
    for M in (1, 3, 8, 16, 31, 64, 300):
        x = torch.randn(M, K, device=device, dtype=dtype)
        exact = x.double() @ exact_weight.double().T
        y = product(x, weight)
        error = float((y.double() - exact).norm() / exact.norm())
        # outside the integers' decode regime weights are rounded to x's type, then the result: two roundings
        if not error <= 1.5 * TOLERANCE[dtype]:
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


def product(x: Tensor, weight: Weight, *extra: Tensor | None) -> Tensor:
    """The operator under test."""
    return weight.operator(x, *weight.arguments, *extra)


def measure(
    device: torch.device,
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    kinds: Sequence[Kind],
    timer: Timer,
    bandwidth: float,
    deadline: float = math.inf,
) -> Iterator[Timing]:
    """Times all launches.

    Args:
        device: the GPU.
        shapes: [N, K].
        rows: values of M.
        kinds: kernels and forms of weights.
        timer: seconds of a call, given calls on distinct tensors.
        bandwidth: bytes a second of a copy.
        deadline: of time.monotonic(); no launch is begun after it.
    """
    for N, K in shapes:
        dense = [torch.randn(N, K, device=device, dtype=torch.bfloat16) for _ in range(copies(2 * N * K))]
        base: dict[int, float] = {}
        for M in rows:
            x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
            base[M] = timer([call(torch.nn.functional.linear, x, w) for w in dense])
            yield _timing("torch bf16", N, K, M, base[M], 2 * N * K, base[M], bandwidth)
        del dense
        for kind in kinds:
            nbytes = kind.weight(N, K, device).nbytes
            weights = [kind.weight(N, K, device, seed) for seed in range(copies(nbytes))]
            for M in rows:
                if time.monotonic() > deadline:
                    return
                x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
                seconds = timer([call(product, x, weight) for weight in weights])
                yield _timing(kind.name, N, K, M, seconds, nbytes, base[M], bandwidth)
            others = peers(N, K, kind.peers_bits, kind.group_size, device, copies(nbytes)) if kind.peers_bits else ()
            for name, layers, peer_bytes in others:
                for M in rows:
                    if time.monotonic() > deadline:
                        return
                    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
                    try:
                        seconds = timer([call(layer, x) for layer in layers])
                    except Exception as error:  # another library's; ours go on
                        print(f"{name} int{kind.peers_bits} M={M}: {type(error).__name__}")
                        continue
                    yield _timing(f"{name} int{kind.peers_bits}", N, K, M, seconds, peer_bytes, base[M], bandwidth)


def copies(nbytes: int, least: int = 8, most: int = 256) -> int:
    """How many distinct tensors of so many bytes no cache holds together."""
    return min(most, max(least, _DISTINCT_BYTES // nbytes + 1))


def call(function: Callable, *arguments: Any) -> Callable[[], object]:
    """The call, to be made later."""
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
    parser.add_argument("--only", default="", help="times what has this word in its name, such as int4 or codebook")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64, 256])
    parser.add_argument("--minutes", type=float, default=5, help="of timing; no launch is begun after so long")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "error: this measures a GPU and there is none here; `python -m quantkit.evals.kernel_build` needs none"
        )
    kinds = [kind for kind in TIMED if arguments.only in kind.name]
    if not kinds:
        sys.exit(f"error: nothing has {arguments.only!r} in its name: {', '.join(kind.name for kind in TIMED)}")
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
        for timing in measure(device, SHAPES, arguments.rows, kinds, seconds_per_call, bandwidth, deadline):
            timings.append(timing)
            print(
                f"{timing.N:6} x {timing.K:6} M={timing.M:4} {timing.what:24} {timing.microseconds:9.2f} us "
                f"{timing.gigabytes_per_second:8.0f} GB/s {100 * timing.bandwidth_share:5.1f}% {timing.speed_up:6.2f}x",
                flush=True,
            )
    finally:
        write(arguments.out, "kernel_speed", about, timings, table(timings))
    if time.monotonic() > deadline:
        print(f"cut after {arguments.minutes:g} minutes; give more with --minutes")


def write(folder: Path, name: str, about: dict[str, Any], timings: Sequence[Any], rows: str) -> None:
    """Results as JSON and as a Markdown table, also those of a run that was cut.

    Args:
        folder: is made where it is missing.
        name: of the two files.
        about: `describe`'s, and more.
        timings: dataclasses.
        rows: the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = about | {"timings": [asdict(timing) for timing in timings]}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [f"- {key}: {value}" for key, value in about.items()]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n\n" + rows)
    print(rows)


if __name__ == "__main__":
    main()
