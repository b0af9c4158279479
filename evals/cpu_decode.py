"""Packed layers and models on a CPU beside dense fp32 ones, in one run.

    python -m quantkit.evals.cpu_decode [--shapes 4096x4096 14336x4096] [--rows 1 2048] [--only WORD]
        [--baseline MODEL --models PACKED ...] [--shaped] [--json FILE]

Products: random packed weights in turn with torch's `F.linear` on dense ones, each over more weights than caches hold;
a row's figure is the median of the packed times over the median of the dense ones. Errors are relative to fp64.
Models: packed checkpoints in turn with the baseline that they were made from: greedy generation of 64 tokens after a
prompt of 16, and one sequence as evaluation reads it. `--shaped` does the same with random weights in SmolLM2-135M's
shape. Times are of a shared machine: compare columns of one run, never runs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.weight import QuantizedWeight
from quantkit.formats.codebook import CodebookWeight
from quantkit.formats.int_group import IntGroupWeight
from quantkit.formats.rotated import RotatedWeight
from quantkit.formats.trellis import TrellisWeight
from quantkit.io.hf import load
from quantkit.kernels.bitpack import row_words
from quantkit.kernels.hadamard import random_signs
from quantkit.models.linear import QuantizedLinear
from quantkit.models.structure import context_length
from quantkit.models.unpacking import choose_unpacked

SHAPES = ((4096, 4096), (14336, 4096))
BARS = {"int4": 1.3, "int3": 1.3, "int2": 1.3, "trellis 2": 2.5, "codebook v4 8 bits": 2.5}
"""The most that a product of one row may take, in times of the dense one's."""
_DISTINCT_BYTES = 2**28
_GROUP = 128


@dataclass(frozen=True)
class Timing:
    """Packed beside dense, of one thing.

    Attributes:
        what: a kind of weight, or a model.
        case: a shape and rows of x, or what a model did.
        dense, packed: medians in seconds.
        ratio: packed / dense.
        error: relative error of a product to that of the dequantized weight in fp64; None for models.
    """

    what: str
    case: str
    dense: float
    packed: float
    ratio: float
    error: float | None = None


def _words(rows: int, words: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (rows, words), dtype=torch.int32)


def integers(bits: int, group_size: int = _GROUP) -> Callable[[int, int], QuantizedWeight]:
    """Random integer weights."""

    def make(N: int, K: int) -> QuantizedWeight:
        scales = (0.5 + torch.rand(-(-K // group_size), N)).half() / (2**bits * K**0.5)
        return IntGroupWeight(_words(N, row_words(K, bits)), scales, bits, group_size, K)

    return make


def trellises(bits: int) -> Callable[[int, int], QuantizedWeight]:
    """Random trellis-coded weights, rotated as `--method trellis` makes them."""

    def make(N: int, K: int) -> QuantizedWeight:
        form = TrellisWeight.layout([N], K, bits, 16)
        steps = torch.full(form.scales.shape, 240, dtype=torch.uint8)
        base = TrellisWeight(_words(*form.codes.shape), steps, torch.full((1,), K**-0.5), bits, 16, [N])
        return RotatedWeight(base, random_signs(K, 0), random_signs(N, 1))

    return make


def codebooks(v: int, bits: int, residual_bits: int = 0) -> Callable[[int, int], QuantizedWeight]:
    """Random vector-quantized weights."""

    def make(N: int, K: int) -> QuantizedWeight:
        stages: list[Any] = []
        for width in (bits, residual_bits):
            book = (torch.randn(1, 1 << width, v) / K**0.5).half() if width else None
            stages += [_words(-(-N // v), row_words(K, width)) if width else None, book]
        return CodebookWeight(stages[0], stages[1], N, K, stages[2], stages[3])

    return make


KINDS: dict[str, Callable[[int, int], QuantizedWeight]] = {
    **{f"int{bits}": integers(bits) for bits in (4, 3, 2, 8)},
    "int4 groups of 32": integers(4, 32),
    **{f"trellis {bits}": trellises(bits) for bits in (2, 3, 4)},
    "codebook v4 8 bits": codebooks(4, 8),
    "codebook v4 12 bits": codebooks(4, 12),
    "codebook v8 8+8 bits": codebooks(8, 8, 8),
}


def medians(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each call; they are made in turn, so that all see the same machine."""
    times: list[list[float]] = [[] for _ in calls]
    for i in range(repeats + 1):
        for own, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call()
            if i:  # the first compiles and fills caches
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def _call(function: Callable[[Any, Tensor], Tensor], turns: Iterator[Any], x: Tensor) -> Tensor:
    return function(next(turns), x)


@torch.inference_mode()
def products(shapes: Sequence[tuple[int, int]], rows: Sequence[int], kinds: Sequence[str]) -> Iterator[Timing]:
    """Times random packed weights beside dense ones."""
    for N, K in shapes:
        dense = [torch.randn(N, K) for _ in range(max(2, _DISTINCT_BYTES // (4 * N * K)))]
        for name in kinds:
            first = KINDS[name](N, K)
            packed = [first, *(KINDS[name](N, K) for _ in range(max(2, min(32, _DISTINCT_BYTES // first.nbytes)) - 1))]
            for M in rows:
                x = torch.randn(M, K)
                dense_turns, packed_turns = cycle(dense), cycle(packed)
                calls = (
                    partial(_call, lambda weight, x: torch.nn.functional.linear(x, weight), dense_turns, x),
                    partial(_call, lambda weight, x: weight.matmul(x), packed_turns, x),
                )
                slow, fast = medians(calls, 40 if M <= 16 else 4)
                exact = x[:4].double() @ first.dequantize().double().T
                error = float((first.matmul(x)[:4].double() - exact).norm() / exact.norm())
                yield Timing(name, f"{N} x {K}, {M} rows", slow, fast, fast / slow, error)


@torch.inference_mode()
def models(baseline: Any, subjects: dict[str, Any], new_tokens: int = 64, repeats: int = 5) -> Iterator[Timing]:
    """Times generation and the reading of a sequence.

    Args:
        baseline: dense.
        subjects: packed models by name.
    """
    vocabulary, context = baseline.config.vocab_size, min(2048, context_length(baseline) or 2048)
    prompt, sequence = torch.randint(vocabulary, (1, 16)), torch.randint(vocabulary, (1, context))

    def generate(model: Any) -> None:
        """Exactly `new_tokens` greedy tokens."""
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=new_tokens,
            max_new_tokens=new_tokens, pad_token_id=0,
        )  # fmt: skip

    def read(model: Any) -> None:
        model(sequence, use_cache=False)

    for what, act in ((f"generate {new_tokens} tokens", generate), (f"read {context} tokens", read)):
        for name, subject in subjects.items():
            dense, packed = medians((partial(act, baseline), partial(act, subject)), repeats)
            yield Timing(name, what, dense, packed, packed / dense)


def shaped() -> tuple[Any, dict[str, Any]]:
    """A dense model in SmolLM2-135M's shape, and packed ones, all of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    found = {}
    for name in ("int3", "trellis 2"):
        model = LlamaForCausalLM(config).eval()
        for path, layer in list(model.model.named_modules()):
            if isinstance(layer, nn.Linear):
                model.model.set_submodule(path, QuantizedLinear(KINDS[name](layer.out_features, layer.in_features)))
        found[name] = model
    return LlamaForCausalLM(config).eval(), found


def _ways(subjects: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each model as it runs by default, then with all layers packed."""
    for words, unpack in (("by default", None), ("all packed", False)):
        for name, model in subjects.items():
            for layer in model.modules():
                if isinstance(layer, QuantizedLinear):
                    layer.release()
            choose_unpacked(model, unpack)
            yield f"{name}, {words}", model


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=["x".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--rows", nargs="+", type=int, default=[1])
    parser.add_argument("--only", default="", help="kinds of weights with this word in their names")
    parser.add_argument("--baseline", help="the model that packed ones were made from")
    parser.add_argument("--models", nargs="*", default=[], help="packed checkpoints")
    parser.add_argument("--shaped", action="store_true", help="random weights in SmolLM2-135M's shape")
    parser.add_argument("--json", type=Path, help="write the figures")
    arguments = parser.parse_args()
    if bool(arguments.models) != bool(arguments.baseline):
        parser.error("--models and --baseline go together")
    try:
        shapes = [(int(shape.split("x")[0]), int(shape.split("x")[1])) for shape in arguments.shapes]
    except (ValueError, IndexError):
        parser.error("--shapes are OUTPUTSxINPUTS, for example 4096x4096")
    torch.manual_seed(0)
    found: list[Timing] = []
    print(f"{torch.get_num_threads()} threads")
    print(f"{'what':36} {'case':26} {'dense ms':>9} {'packed ms':>9} {'ratio':>6} error")

    def show(timings: Iterator[Timing]) -> None:
        """Keeps the timings and prints them, those that have a bar with it."""
        for row in timings:
            found.append(row)
            bar = BARS.get(row.what) if row.case.endswith(" 1 rows") else None
            note = "" if row.error is None else f" {row.error:.1e}"
            note += "" if bar is None else f"   bar {bar}{'' if row.ratio <= bar else ': MISSED'}"
            figures = f"{1e3 * row.dense:9.3f} {1e3 * row.packed:9.3f} {row.ratio:6.2f}"
            print(f"{row.what:36} {row.case:26} {figures}{note}", flush=True)

    show(products(shapes, arguments.rows, [name for name in KINDS if arguments.only in name]))
    sets = []
    if arguments.models:
        packed = {Path(folder).name: load(folder, dtype=torch.float32).eval() for folder in arguments.models}
        sets.append((load(arguments.baseline, dtype=torch.float32).eval(), packed))
    if arguments.shaped:
        sets.append(shaped())
    for baseline, subjects in sets:
        for name, model in _ways(subjects):
            show(models(baseline, {name: model}))
    if arguments.json:
        rows = [asdict(row) for row in found]
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "timings": rows}
        arguments.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
