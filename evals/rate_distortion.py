"""Rate against distortion: what every code of quantkit makes of a Gaussian source, beside Shannon's bound.

    python -m quantkit.evals.rate_distortion --png rate-distortion.png --json rate-distortion.json

Weights behind a rotation are nearly Gaussian, so the mean squared error of a code on N(0, 1) is what it is worth before
error feedback; no code of R bits a weight does better than D(R) = 2^-2R. Codebooks are trained on other samples than
the error is measured on. Bits a weight count every byte that a 4096 x 4096 layer stores: codes, scales, zeros,
codebooks.

Figures with a bar end the run with exit code 1 where they are more than 2% above it.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.core.stats import LayerStats
from quantkit.core.weight import QuantizedWeight
from quantkit.quantizers import kmeans
from quantkit.quantizers.pyramid import Pyramid, fit_gains, gain_levels, shape
from quantkit.quantizers.rtn import RTN
from quantkit.quantizers.trellis import Trellis
from quantkit.quantizers.vptq import VPTQ

LAYER = 4096
"""Features on both sides of the layer whose stored bytes are counted."""
TOLERANCE = 0.02
_TRAINING, _HELD_OUT = 1, 2  # seeds; best_code chooses its codes on samples of seed 0
_MOST_TRAINED = 1 << 19
_QUICK_BITS = 8

# Source-coding references, at 1 to 4 bits: textbook figures for scalars, published or recomputed ones for the others.
EXPECTED: dict[str, dict[float, float]] = {
    "Lloyd-Max": {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950},
    "uniform, best step": {2: 0.11885, 3: 0.03744, 4: 0.01154},
    "INT g128 asymmetric, min-max": {2: 0.253, 3: 0.0464, 4: 0.0101},
    "INT g128 asymmetric, searched": {2: 0.136, 3: 0.0348, 4: 0.0090},
    "PVQ D=8": {2: 0.108, 3: 0.0288, 4: 0.0075},
    "PVQ D=16": {2: 0.1047, 3: 0.0271, 4: 0.0065},
    "PVQ D=32": {2: 0.1007, 3: 0.0253, 4: 0.0062},
    "PVQ D=64": {2: 0.0979, 3: 0.0248, 4: 0.0061},
    "VQ v2 k16": {2: 0.1087},
    "VQ v4 k256": {2: 0.0974},
    "VQ v6 k4096": {2: 0.0935},
    "VQ v4 k4096": {3: 0.0269},
    "trellis L=12": {2: 0.0735, 3: 0.0200, 4: 0.0055},
    "trellis L=16": {2: 0.0690, 3: 0.0178, 4: 0.0047},
}
BARS = {"PVQ D=64", "PVQ D=16", "VQ v4 k256", "VQ v6 k4096", "trellis L=12", "trellis L=16"}
PYRAMIDS = (8, 16, 32, 64)
# Vector length and bits of each stage; those of a fractional rate are for the picture.
BOOKS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (2, (2,)), (4, (4,)), (8, (8,)),
    (2, (3,)), (4, (6,)),
    (2, (4,)), (3, (6,)), (4, (8,)), (8, (8, 8)), (6, (12,)),
    (2, (5,)), (4, (10,)),
    (2, (6,)), (3, (9,)), (4, (12,)),
    (2, (7,)),
    (2, (8,)), (3, (12,)),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One code at one rate.

    Attributes:
        family: of codes that differ in their rate alone.
        detail: the code's parameters.
        rate: bits a weight that were asked for.
        bits_per_weight: all that is stored, in a 4096 x 4096 layer.
        mse: a weight, of unit variance.
        standard_error: of the mse; 0 where it is an integral.
    """

    family: str
    detail: str
    rate: float
    bits_per_weight: float
    mse: float
    standard_error: float

    @property
    def to_bound(self) -> float:
        """The error over Shannon's bound at the bits that are stored."""
        return self.mse / shannon(self.bits_per_weight)

    @property
    def expected(self) -> float | None:
        """The reference's figure, where there is one."""
        return EXPECTED.get(self.family, {}).get(self.rate)

    @property
    def deviation(self) -> float | None:
        """How far above the reference the error is, as a fraction of it."""
        return None if self.expected is None else self.mse / self.expected - 1

    @property
    def missed(self) -> bool:
        """Whether there is a bar and the error is above it."""
        return self.family in BARS and self.deviation is not None and self.deviation > TOLERANCE

    @property
    def cells(self) -> list[str]:
        """Cells of a markdown table."""
        error = f" ± {self.standard_error:.5f}" if self.standard_error else " (exact)"
        expected = "" if self.expected is None else f"{self.expected:.4g}"
        deviation = "" if self.deviation is None else f"{100 * self.deviation:+.1f}%"
        bits, ratio = f"{self.bits_per_weight:.3f}", f"{self.to_bound:.3f}"
        return [self.family, self.detail, bits, f"{self.mse:.5f}{error}", ratio, expected, deviation]

    def record(self) -> dict[str, Any]:
        """The row as JSON."""
        derived = {"to_bound": self.to_bound, "expected": self.expected, "deviation": self.deviation}
        return asdict(self) | derived | {"bar": self.family in BARS and self.expected is not None}


HEADINGS = ("code", "parameters", "bits/weight", "MSE", "MSE / D(R)", "expected", "deviation")


def shannon(bits: float) -> float:
    """D(R) of a unit Gaussian source."""
    return 4.0**-bits


def gaussian(count: int, seed: int) -> Tensor:
    """fp32 [count] samples."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def measure(bits: Sequence[int], quick: bool, report: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """All rows; `report` is called with each as soon as it is known.

    Args:
        bits: whole rates; between the lowest and the highest, fractional ones are measured too unless `quick`.
        quick: no codebooks of more than 256 entries, and a quarter of the samples.
    """
    samples = gaussian(1 << (18 if quick else 20), _HELD_OUT)
    rates: list[float] = [float(b) for b in sorted(bits)]
    if not quick:
        rates = [rate / 2 for rate in range(2 * min(bits), 2 * max(bits) + 1) if rate % 2 or rate // 2 in bits]
    rows = []
    for rate in rates:
        for row in _rows(rate, samples, quick):
            report(row)
            rows.append(row)
    return rows


def _rows(rate: float, samples: Tensor, quick: bool) -> Iterator[Row]:
    """All codes of one rate."""
    if rate.is_integer():
        bits = int(rate)
        yield _row("Lloyd-Max", f"{2**bits} levels", rate, _stored(VPTQ(rate, 1)), lloyd_max(bits))
        step, error = best_step(bits)
        yield _row("uniform, best step", f"step {step:.4f}", rate, _stored(RTN(bits, -1)), error)
        for symmetric, search in ((False, False), (True, True), (False, True)):
            quantizer = RTN(bits, 128, symmetric, search)
            family = f"INT g128 {'' if symmetric else 'a'}symmetric, {'searched' if search else 'min-max'}"
            rounded = quantizer.quantize(samples.view(-1, LAYER)).dequantize()
            errors = (samples.view(-1, LAYER) - rounded).square().mean(1)
            yield _row(family, "", rate, _stored(quantizer), errors)
        for state_bits in (12, 16):
            coded = Trellis(bits, state_bits)
            few = samples[: 1 << (16 if quick else 17 if state_bits == 16 else 18)]
            yield _row(f"trellis L={state_bits}", "", rate, _stored(coded), trellis_errors(coded, few))
    for dimension in PYRAMIDS:
        code = Pyramid(rate, dimension).code
        detail = f"K={code.pulses}, gain {code.gain_bits} bits, field {code.field_bits} bits"
        stored = _stored(Pyramid(rate, dimension))
        yield _row(f"PVQ D={dimension}", detail, rate, stored, pyramid_errors(rate, dimension, samples))
    for length, stages in BOOKS:
        if sum(stages) == rate * length and (not quick or max(stages) <= _QUICK_BITS):
            sizes = "+".join(str(2**stage) for stage in stages)
            stored = _stored(VPTQ(rate, length, stages[1] if len(stages) > 1 else 0))
            detail = "k-means" if len(stages) == 1 else "k-means, residual"
            yield _row(f"VQ v{length} k{sizes}", detail, rate, stored, book_errors(length, stages, samples))


def _row(family: str, detail: str, rate: float, stored: float, error: Tensor | float) -> Row:
    """A row from an exact error, or from the mean squared errors of independent parts of the samples."""
    if isinstance(error, float):
        return Row(family, detail, rate, stored, error, 0.0)
    error = error.double()
    return Row(family, detail, rate, stored, float(error.mean()), float(error.std()) / math.sqrt(len(error)))


def _stored(quantizer: RTN | Pyramid | VPTQ | Trellis) -> float:
    """Bits a weight of a 4096 x 4096 layer, all that is stored."""
    layout: QuantizedWeight = quantizer.layout(LAYER, LAYER)
    return layout.bits_per_weight


def pyramid_errors(rate: float, dimension: int, samples: Tensor) -> Tensor:
    """Mean squared errors [vectors] of vectors of 4096 weights with a scale each, as a column of a layer has.

    Args:
        rate: bits a weight.
        dimension: of the pyramid.
        samples: fp32 [a multiple of 4096], of a unit Gaussian.
    """
    code = Pyramid(rate, dimension).code
    levels = gain_levels(code, LAYER)
    groups = samples.view(-1, LAYER // dimension, dimension)
    _, amplitudes, directions = shape(groups, code.pulses)
    scales, gains = fit_gains(amplitudes, levels)
    rounded = (scales * levels[gains]).unsqueeze(-1) * directions
    return (groups - rounded).square().mean((1, 2))


def trellis_errors(quantizer: Trellis, samples: Tensor) -> Tensor:
    """Mean squared errors [columns] of samples [a multiple of 4096] in columns of 4096, each a ring with a scale."""
    weight = samples.view(-1, LAYER).T
    inputs = LayerStats(torch.eye(weight.shape[1]))
    return (weight - quantizer.quantize(weight, inputs).dequantize()).square().mean(0)


def book_errors(length: int, stages: tuple[int, ...], samples: Tensor) -> Tensor:
    """Mean squared errors [vectors] with fp16 codebooks that k-means trained on other samples, stage after stage.

    Twelve steps for large codebooks, which are the slow part: eighteen more gain 0.3%.

    Args:
        length: of a vector.
        stages: bits of each stage's codebook.
        samples: fp32 [weights], of a unit Gaussian; what fills no vector is left out.
    """
    count = min(max(kmeans.SAMPLES_PER_CENTROID << max(stages), 1 << 17), _MOST_TRAINED)
    left = gaussian(count * length, _TRAINING).view(count, length)
    rest = samples[: len(samples) // length * length].view(-1, length)
    for bits in stages:
        book = kmeans.fit(left, torch.ones(count), bits, iterations=30 if bits <= 9 else 12).half().float()
        left = left - book[kmeans.assign(left, book)[0]]
        rest = rest - book[kmeans.assign(rest, book)[0]]
    return rest.square().mean(1)


def scalar_error(levels: Tensor) -> tuple[float, Tensor]:
    """(mean squared error of a unit Gaussian rounded to ascending levels [n], the centroids of their cells [n])."""
    bounds = torch.cat([levels.new_tensor([-math.inf]), (levels[1:] + levels[:-1]) / 2, levels.new_tensor([math.inf])])
    density = (-bounds.square() / 2).exp() / math.sqrt(2 * math.pi)
    probability = torch.special.ndtr(bounds).diff()
    moment = -density.diff()
    error = 1 - 2 * (levels * moment).sum() + (levels.square() * probability).sum()
    return float(error), moment / probability


def lloyd_max(bits: int) -> float:
    """The least error of 2^bits levels: cells and centroids in turn until neither moves."""
    count = 2**bits
    levels = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(10_000):
        before, levels = levels, scalar_error(levels)[1]
        if float((levels - before).abs().max()) < 1e-10:
            break
    return scalar_error(levels)[0]


def best_step(bits: int) -> tuple[float, float]:
    """(step, error) of the best uniform quantizer with 2^bits levels about zero, by golden section."""
    places = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    low, high, share = 0.01, 4.0, (math.sqrt(5) - 1) / 2
    while high - low > 1e-7:
        left, right = high - share * (high - low), low + share * (high - low)
        if scalar_error(places * left)[0] < scalar_error(places * right)[0]:
            high = right
        else:
            low = left
    return low, scalar_error(places * low)[0]


_TOP_ERROR, _TOP_RATIO = 0.6, 3.75  # grids from minimum to maximum lie above that at 1 to 3 bits
_STYLES: dict[str, tuple[str, str]] = {  # colour and marker; one hue a kind of code, darker for longer vectors
    "Lloyd-Max": ("#7a7a7a", "v"),
    "uniform, best step": ("#b0b0b0", "^"),
    "INT g128 asymmetric, min-max": ("#f2b872", "s"),
    "INT g128 asymmetric, searched": ("#e08214", "s"),
    "INT g128 symmetric, searched": ("#9c4f00", "D"),
    "PVQ D=8": ("#a9cdea", "o"),
    "PVQ D=16": ("#6aa9d8", "o"),
    "PVQ D=32": ("#2f7fbd", "o"),
    "PVQ D=64": ("#0b4a84", "o"),
    "trellis L=12": ("#f08080", "*"),
    "trellis L=16": ("#c01818", "*"),
    "VQ v2": ("#a6dba0", "P"),
    "VQ v3": ("#6fbf73", "P"),
    "VQ v4": ("#2f9648", "P"),
    "VQ v6": ("#00692c", "P"),
    "VQ v8": ("#00401b", "P"),
    "VQ v8 residual": ("#8c2d8c", "X"),
}


def figure_class() -> Any:
    """matplotlib's Figure, which needs no display.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("error: --png needs matplotlib, which is not installed; pip install matplotlib") from None
    return Figure


def draw(rows: Sequence[Row], path: Path) -> None:
    """The picture: errors, and how far above the bound they are."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        family = row.family.split(" k")[0] + (" residual" if "+" in row.family else "")
        lines.setdefault(family, []).append(row)
    figure = figure_class()(figsize=(11, 5.2), layout="constrained")
    error, ratio = figure.subplots(1, 2)
    ends = [min(row.bits_per_weight for row in rows) - 0.1, max(row.bits_per_weight for row in rows) + 0.1]
    error.plot(ends, [shannon(bits) for bits in ends], color="black", label="Shannon, D(R) = $2^{-2R}$")
    ratio.axhline(1, color="black")
    for family in sorted(lines, key=list(_STYLES).index):
        colour, marker = _STYLES[family]
        points = sorted(lines[family], key=lambda row: row.bits_per_weight)
        x = [row.bits_per_weight for row in points]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.2, "label": family}
        error.plot(x, [row.mse for row in points], **style)
        ratio.plot(x, [row.to_bound for row in points], **style)
    error.set(yscale="log", ylim=(0.8 * shannon(ends[1]), _TOP_ERROR), ylabel="mean squared error per weight")
    error.set_title("N(0, 1), held out")
    ratio.set(ylim=(0.9, _TOP_RATIO), ylabel="MSE / D(R)")
    ratio.set_title("the same, over the bound at the stored bits")
    for axes in (error, ratio):
        axes.set_xlabel("bits per weight, all that is stored")
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.set_xlim(*ends)
    handles, labels = error.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=90, format="png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, prints the table; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", choices=range(1, 5), default=[1, 2, 3, 4])
    parser.add_argument("--png", type=Path, help="draw the picture there; needs matplotlib")
    parser.add_argument("--json", type=Path, help="write the rows there, those of fractional rates too")
    parser.add_argument("--quick", action="store_true", help="no codebooks of more than 256 entries, whole rates alone")
    chosen = parser.parse_args(arguments)
    if chosen.png:
        figure_class()  # so that a run of minutes does not end in an error
    start = time.process_time()

    def line(cells: Sequence[str]) -> None:
        print("| " + " | ".join(cells) + " |", flush=True)

    line(HEADINGS)
    line(["---"] * len(HEADINGS))
    for bits in sorted(set(chosen.bits)):
        line(["Shannon, D(R)", "", f"{bits:.3f}", f"{shannon(bits):.5f} (exact)", "1.000", "", ""])
    rows = measure(sorted(set(chosen.bits)), chosen.quick, lambda row: line(row.cells) if row.rate % 1 == 0 else None)
    seconds = time.process_time() - start
    print(f"\n{seconds:.0f} s of CPU time")
    if chosen.json:
        about = {"source": "N(0, 1)", "layer": [LAYER, LAYER], "quick": chosen.quick, "torch": torch.__version__}
        found = about | {"cpu_seconds": round(seconds, 1), "rows": [row.record() for row in rows]}
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    if chosen.png:
        draw(rows, chosen.png)
    missed = [row for row in rows if row.missed]
    for row in missed:
        print(f"missed: {row.family} at {row.rate:g} bits: {row.mse:.5f}, bar {row.expected}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
