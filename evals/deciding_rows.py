"""The rows of the table that decides: every way to quantize that is measured, each once, and what all have in common.

To add a row, add it to `ROWS`: a name without its bits, a label, the bits that are asked for, and the way. A row is
known again by its way, so that one whose settings are changed is measured anew, whatever it is called.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from quantkit.core.constants import TARGET_SHIFT
from quantkit.core.errors import QuantkitError
from quantkit.evals.peers import PeerGrid
from quantkit.evopress.session import Start
from quantkit.run.recipe import Calibration


@dataclass(frozen=True)
class Protocol:
    """What all rows of a table have in common.

    Attributes:
        calibration: source of the calibration text; see `quantkit.run.documents`.
        test: of the text to measure on.
        num_samples, seqlen, seed: of the calibration sequences.
        test_sequences, test_seqlen: the first so many sequences of the test text are measured on.
    """

    calibration: str
    test: str
    num_samples: int = 64
    seqlen: int = 512
    seed: int = 0
    test_sequences: int = 24
    test_seqlen: int = 512

    @property
    def text(self) -> Calibration:
        """The calibration text."""
        return Calibration(self.calibration, self.num_samples, self.seqlen, self.seed)


def protocol_of(arguments: argparse.Namespace) -> Protocol:
    """The protocol that was asked for.

    Raises:
        QuantkitError: a text is missing.
    """
    found = {}
    for name, file in (("calibration", "valid.txt"), ("test", "test.txt")):
        given = getattr(arguments, name)
        if given is None and arguments.data is None:
            raise QuantkitError(f"no text: give `--data`, a folder with {file}, or `--{name}`")
        found[name] = str((arguments.data / file).resolve()) if given is None else given
    return Protocol(
        found["calibration"], found["test"], arguments.num_samples, arguments.seqlen, arguments.seed,
        arguments.test_sequences, arguments.test_seqlen,
    )  # fmt: skip


@dataclass(frozen=True)
class EndToEnd:
    """Settings of `quantkit.tune` after quantization; the rest are its defaults.

    Attributes:
        steps: of the optimizer, which bound the time.
        batch: sequences a step.
        num_samples: sequences of the calibration text, of the seed after the protocol's.
        seqlen: tokens of each; None for the protocol's.
        held_out: of those, only measured.
        evaluate_every: steps between measurements.
        mode, lr: see `PVSettings`; `mode` is None for its default.
        embeddings: whether the embedding, and the head with it where they are tied, is tuned too.
    """

    steps: int = 100
    batch: int = 4
    num_samples: int = 416
    held_out: int = 16
    evaluate_every: int = 25
    mode: str | None = None
    lr: float = 0.003
    embeddings: bool = True
    seqlen: int | None = None


@dataclass(frozen=True)
class Quantized:
    """`quantkit.quantize`, and `quantkit.tune` where it is asked for; see there.

    Attributes:
        method: text of the quantizer.
        target_shift, low_rank_bits, tune_blocks, head_bits, fisher: of `quantkit.quantize`; `low_rank_bits` needs a
            `low_rank` in the text.
        tuning: of the packed model, end to end; None for none.
        sequences: (how many, tokens of each) of the calibration text; None for the protocol's.
        left_out: tokens at each sequence's beginning that statistics do not count.
    """

    method: str
    target_shift: float = TARGET_SHIFT
    low_rank_bits: float = 0
    tune_blocks: int = 0
    head_bits: int | None = None
    fisher: bool | None = None
    tuning: EndToEnd | None = None
    sequences: tuple[int, int] | None = None
    left_out: int = 0

    def text(self, protocol: Protocol) -> Calibration:
        """Its calibration text."""
        if self.sequences is None:
            return protocol.text
        return replace(protocol.text, num_samples=self.sequences[0], seqlen=self.sequences[1])


@dataclass(frozen=True)
class Searched:
    """`quantkit.search`; see there. Its candidates are made in the row's own time.

    Each of SmolLM2's 210 layers is measured on all of the search's text before the first generation, which is most of
    the time: the text is short, and so are the stages.

    Attributes:
        avg_bits: the budget.
        candidates, base: texts of quantizers.
        generations, offspring, stages: of the evolution.
        search_samples, held_out: sequences of the calibration text that it measures on.
        start: what the search begins with; "predicted" measures no layer.
        tuning: of what was found, end to end; None for none.
    """

    avg_bits: float
    candidates: str
    base: str
    generations: int = 20
    offspring: int = 8
    stages: tuple[tuple[int, int], ...] = ((2, 1024), (1, 4096))
    search_samples: int = 16
    held_out: int = 8
    start: Start = "best"
    tuning: EndToEnd | None = None


Way = Quantized | Searched | PeerGrid
LATER: dict[type, dict[str, Any]] = {
    Quantized: {"sequences": None, "left_out": 0},
    Searched: {"start": "best", "tuning": None},
    EndToEnd: {"seqlen": None},
}
"""Settings that came later, by value: rows that do without were measured before, and keep their names."""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        method: its name without bits, without spaces.
        label: for readers.
        bits: asked for, of the layers in the blocks.
        way: how it is made.
        drawn: whether it is in the picture.
    """

    method: str
    label: str
    bits: float
    way: Way
    drawn: bool = False

    @property
    def name(self) -> str:
        """By which it is picked: the method and the bits, such as "gptq-g64-3"."""
        return f"{self.method}-{self.bits:g}"

    @property
    def settings(self) -> dict[str, Any]:
        """JSON of the way; with the model, the text and the protocol a row is known by it."""
        way = _known(self.way)
        if isinstance(tuning := getattr(self.way, "tuning", None), EndToEnd):
            way["tuning"] = _known(tuning)
        return {"way": type(self.way).__name__} | way


def _known(made: Any) -> dict[str, Any]:
    """JSON of a dataclass, without what came later and is as it was before."""
    later = LATER.get(type(made), {})
    return {name: value for name, value in asdict(made).items() if name not in later or value != later[name]}


def _integers() -> Iterator[Row]:
    for bits in (2, 3, 4):
        yield Row("rtn-g64", "RTN, groups of 64", bits, Quantized(f"rtn({bits}, group_size=64)", 0.0), True)
        for name, words, text, shift in (
            ("g64-shift0", "64, target shift 0", "64", 0.0),
            ("g64", "64", "64", TARGET_SHIFT),
            ("g64-asym", "64, asymmetric", "64, symmetric=False", TARGET_SHIFT),
            ("g128", "128", "128", TARGET_SHIFT),
        ):
            way = Quantized(f"gptq({bits}, group_size={text})", shift)
            yield Row(f"gptq-{name}", f"GPTQ, groups of {words}", bits, way, name == "g64")


def _felt() -> Iterator[Row]:
    for bits in (2, 3, 4):
        way = Quantized(f"gptq({bits}, group_size=64)", fisher=True)
        yield Row("gptq-g64-fisher", "GPTQ, groups of 64, with the reverse pass", bits, way, True)
        way = Quantized(f"hadamard(trellis({bits}, state_bits=12))", fisher=False)
        yield Row("trellis-12-no-fisher", "trellis, 2^12 states, without the reverse pass", bits, way)


def _vectors() -> Iterator[Row]:
    for bits in (2, 2.5, 3, 4):
        yield Row("pyramid", "pyramid", bits, Quantized(f"hadamard(pyramid({bits:g}))"), True)
        yield Row("vptq", "VPTQ", bits, Quantized(f"hadamard(vptq({bits:g}))"), True)
        for states in (12, 16):
            way = Quantized(f"hadamard(trellis({bits:g}, state_bits={states}))")
            yield Row(f"trellis-{states}", f"trellis, 2^{states} states", bits, way, True)


def _corrected() -> Iterator[Row]:
    for bits in (2, 3):
        for name, label, text in (
            ("gptq-g64", "GPTQ, groups of 64", f"low_rank(gptq({bits}, group_size=64), 8)"),
            ("trellis-12", "trellis, 2^12 states", f"hadamard(low_rank(trellis({bits}, state_bits=12), 8))"),
        ):
            yield Row(f"{name}-rank8", f"{label}, corrections of rank 8", bits, Quantized(text))
        way = Quantized(f"low_rank(gptq({bits}, group_size=64), 1)", low_rank_bits=0.25)
        yield Row("gptq-g64-rank+0.25", "GPTQ, groups of 64, corrections within 0.25 bit", bits, way)


def _searched() -> Iterator[Row]:
    candidates = ", ".join(f"gptq({bits}, group_size=64)" for bits in (2, 3, 4, 5))
    for bits in (2.5, 3):
        way = Searched(bits, candidates, "gptq(3, group_size=64)")
        yield Row("search-gptq-g64", "search over GPTQ, groups of 64", bits, way, True)
    finer = "hadamard(trellis(3, state_bits=12))"
    first = EndToEnd(400, 1, 416, evaluate_every=100, mode="continuous")
    smaller = EndToEnd(2048, 1, 1056, held_out=32, evaluate_every=256, mode="continuous", seqlen=256)
    for states, tuned in ((14, first), (16, smaller)):
        base = f"hadamard(trellis(2, state_bits={states}))"
        for name, more, tuning in (("", "", None), ("-tuned", ", tuned end to end", tuned)):
            way = Searched(2.03, f"{base}, {finer}", base, generations=0, start="predicted", tuning=tuning)
            label = f"trellis, 2^{states} states, few layers of 3 bits by prediction{more}"
            yield Row(f"trellis-{states}-predicted{name}", label, 2, way)


def _tuned() -> Iterator[Row]:
    for bits in (2, 3):
        for name, label, method, mode in (
            ("gptq-g64", "GPTQ, groups of 64", f"gptq({bits}, group_size=64)", None),
            ("trellis-12", "trellis, 2^12 states", f"hadamard(trellis({bits}, state_bits=12))", "continuous"),
        ):
            yield Row(f"{name}-blocks", f"{label}, blocks tuned", bits, Quantized(method, tune_blocks=100), True)
            way = Quantized(method, tuning=EndToEnd(mode=mode))
            yield Row(f"{name}-tuned", f"{label}, tuned end to end", bits, way, True)


def _heads() -> Iterator[Row]:
    for head in (8, 6, 4):
        way = Quantized("hadamard(trellis(3, state_bits=16))", head_bits=head)
        yield Row(f"trellis-16-head{head}", f"trellis, 2^16 states, head of {head} bits", 3, way)


def _peers() -> Iterator[Row]:
    for bits in (2, 3, 4):
        for name, words, group, symmetric in (
            ("g64", "64", 64, True),
            ("g64-asym", "64, asymmetric", 64, False),
            ("g128", "128", 128, True),
        ):
            grid = PeerGrid("llm-compressor", bits, group, symmetric, 0)
            yield Row(f"llm-compressor-{name}", f"llm-compressor GPTQ, groups of {words}", bits, grid, name == "g64")
        for name, words, iterations in (("", "", 200), ("-rtn", ", 0 iterations", 0)):
            grid = PeerGrid("auto-round", bits, 64, True, iterations)
            yield Row(f"auto-round{name}-g64", f"auto-round{words}, groups of 64", bits, grid, iterations > 0)


def _other_settings() -> Iterator[Row]:
    """One setting after the other away from GPTQ's and the trellis' defaults."""
    gptq, trellis = "gptq(3, group_size=64{})", "hadamard(trellis(2, state_bits=12{}))"
    yield Row("gptq", "GPTQ, groups of 64, as it comes", 3, Quantized(gptq.format("")))
    for shift in (0, 0.35, 0.5, 0.85, 1):
        yield Row(f"shift{shift:g}", f"target shift {shift:g}", 3, Quantized(gptq.format(""), shift))
    for damp in (0.001, 0.003, 0.03, 0.1):
        yield Row(f"damp{damp:g}", f"damping {damp:g}", 3, Quantized(gptq.format(f", damp={damp:g}")))
    for order in ("none", "act"):
        yield Row(f"order-{order}", f"order {order}", 3, Quantized(gptq.format(f", order={order!r}")))
    yield Row("range", "grids by range, not by error", 3, Quantized(gptq.format(", search=False")))
    for count in (1, 4):
        way = Quantized(gptq.format(""), left_out=count)
        yield Row(f"sinks{count}", f"the first {count} tokens of a sequence not counted", 3, way)
    yield Row("hadamard", "in a rotated basis", 3, Quantized(f"hadamard({gptq.format('')})"))
    yield Row("fisher", "with the reverse pass", 3, Quantized(gptq.format(""), fisher=True))
    yield Row("hadamard-fisher", "both", 3, Quantized(f"hadamard({gptq.format('')})", fisher=True))
    for count, length in ((16, 512), (32, 512), (128, 512), (256, 512), (256, 128), (32, 1024), (16, 2048)):
        way = Quantized(gptq.format(""), sequences=(count, length))
        yield Row(f"text{count}x{length}", f"{count} sequences of {length}", 3, way)
    yield Row("trellis", "trellis, 2^12 states, as it comes", 2, Quantized(trellis.format("")))
    for shift in (0, 0.5, 1):
        yield Row(f"trellis-shift{shift:g}", f"target shift {shift:g}", 2, Quantized(trellis.format(""), shift))
    for damp in (0.003, 0.03):
        yield Row(f"trellis-damp{damp:g}", f"damping {damp:g}", 2, Quantized(trellis.format(f", damp={damp:g}")))
    yield Row("trellis-text128x512", "128 sequences of 512", 2, Quantized(trellis.format(""), sequences=(128, 512)))


def _grids() -> Iterator[Row]:
    """What another program's grids and groups cost, beside those that quantkit has by itself."""
    for bits in (2, 3, 4, 8):
        for group in (32, 64, 128):
            for grid in ("half", "int"):
                text = f"gptq({bits}, group_size={group}, grid={grid!r})"
                where = "around a whole number" if grid == "int" else "half a step off"
                yield Row(f"{grid}-g{group}", f"groups of {group}, {where}", bits, Quantized(text))


SETS: dict[str, tuple[Row, ...]] = {"settings": tuple(_other_settings()), "grids": tuple(_grids())}
"""Rows by what they are for; "methods" are the table that decides."""

ROWS: tuple[Row, ...] = tuple(
    sorted(
        (*_integers(), *_felt(), *_vectors(), *_corrected(), *_searched(), *_tuned(), *_heads(), *_peers()),
        key=lambda row: row.bits,  # stable: methods stay in their order
    )
)
"""All rows of methods, by bits."""
SETS["methods"] = ROWS
