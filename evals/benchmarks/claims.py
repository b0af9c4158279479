"""Sentences of the documents that state measured figures, with where in evals/results each figure is recorded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Value:
    """A recorded value.

    Attributes:
        file: in evals/results.
        name: of the field, with [..] for what is nested in it.
        at: key of the records, or of the record; "" for the file's whole.
        where: field -> value of the one record; texts are patterns as a shell's.
    """

    file: str
    name: str
    at: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Median:
    """The median of a recorded list."""

    of: Value


@dataclass(frozen=True)
class Count:
    """How many records of a file have these values."""

    file: str
    at: str
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ratio:
    """One figure over another."""

    of: "Figure"
    to: "Figure"


@dataclass(frozen=True)
class Less:
    """By what fraction one figure is less than another."""

    of: "Figure"
    than: "Figure"


@dataclass(frozen=True)
class More:
    """By what fraction one figure is more than another."""

    of: "Figure"
    than: "Figure"


Figure = Value | Median | Count | Ratio | Less | More


@dataclass(frozen=True)
class Claim:
    """A sentence, or the part of one that has the figures.

    Attributes:
        page: path of the document.
        text: with a gap in braces for each figure, formatted as a table's cells are.
        figures: of the gaps, in their order.
    """

    page: str
    text: str
    figures: tuple[Figure, ...]


README = "README.md"
TRELLIS = "docs/results/trellis.md"
MEMORY = "docs/results/memory-and-time.md"
KV_GUIDE = "docs/guide/kv-cache.md"
SEARCH_GUIDE = "docs/guide/search.md"
TRUST = "docs/results/trust.md"
DAMAGE = "2026-11-29-fuzz.json"
BUILDS = "kernel-build-triton-3.7.1.json"
PEER = "2026-11-21-cpu-llmcompressor.json"
REAL_PEER = "2026-11-30-cpu-llmcompressor-smollm2.json"
REAL = "2026-11-29-cpu-smollm2.json"


def _quality(label: str, name: str = "kl") -> Value:
    return Value("2026-11-22-cpu-quality.json", name, where={"label": label})


def _real(name: str, what: str = "kl") -> Value:
    return Value(REAL, what, "rows", {"name": name, "current": True})


def _searched(way: str) -> Value:
    return Value("2026-11-22-cpu-search.json", f"kl[{way}][0]", "rows", {"bits": 3})


def _integers(shift: float) -> Value:
    return Value(
        "2026-11-21-cpu-reference-quality.json", "kl", where={"method": "gptq", "bits": 2, "target_shift": shift}
    )


def _part(label: str, shift: float = 0.7) -> Value:
    return Value("2026-11-22-cpu-trellis.json", "kl", where={"label": label, "target_shift": shift, "windows": 128})


def _code(what: str, name: str, bits: int) -> Value:
    return Value("2026-11-22-cpu-trellis-codes.json", name, "values", {"what": what, "bits": bits, "state_bits": 16})


def _found(what: str) -> Value:
    return Value("2026-11-22-cpu-trellis-codes.json", "mse", "searches", {"what": what, "bits": 2})


def _bound(family: str, name: str) -> Value:
    return Value("2026-11-22-cpu-rate-distortion.json", name, "rows", {"family": family, "rate": 2})


def _beside_peer(who: str, run: int) -> Ratio:
    seconds = (Median(Value(PEER, f"{name}[{run}]", "seconds")) for name in (who, "llm-compressor"))
    return Ratio(*seconds)


def _attention(bits: int) -> Value:
    return Value(BUILDS, "instructions_per_weight", "builds", {"name": f"kv attention int{bits}/{bits} D=128 sm_90"})


def _cached(mode: str, bits: int, factor: int) -> Value:
    return Value("2026-11-22-cpu-kv-cache.json", "kl", "rows", {"mode": mode, "bits": bits, "factor": factor})


def _corrected(bits: int, factor: int) -> Less:
    mode = "... weighted by queries (default)"
    return Less(_cached(mode, bits, factor), _cached("per token, groups of 32", bits, factor))


def _search_time(bits: float) -> Value:
    return Value("2026-11-22-cpu-search.json", "seconds", "rows", {"bits": bits})


def _generation(layers: int) -> Value:
    return Value("2026-11-22-cpu-search.json", f"{layers} layers", "scaling.seconds_a_generation")


def _held_out(name: str) -> Value:
    return Value("../reference/model/held_out.json", name)


T16, T12 = "Hadamard(Trellis(bits {}))", "Hadamard(Trellis(bits {}, state_bits 12))"

CLAIMS = [
    Claim(
        README,
        "{:c.0f}% less damage than RTN at 3 bits, {:c.0f}% at 4, on SmolLM2-135M",
        tuple(Less(_real(f"gptq-g64-{bits}"), _real(f"rtn-g64-{bits}")) for bits in (3, 4)),
    ),
    Claim(
        README,
        "{:c.0f}% of GPTQ's KL at 2 bits and {:c.0f}% at 3 on SmolLM2-135M, at fewer bits",
        tuple(Ratio(_real(f"trellis-12-{bits}"), _real(f"gptq-g64-{bits}")) for bits in (2, 3)),
    ),
    Claim(
        README,
        "{:c.0f}% of the time of the whole run, {:c.0f}% more KL at 2 bits",
        (
            Ratio(_quality(T12.format(2), "seconds"), _quality(T16.format(2), "seconds")),
            More(_quality(T12.format(2)), _quality(T16.format(2))),
        ),
    ),
    Claim(README, "{:c.0f}% less KL at 3 bits than uniform levels", (Less(_searched("search"), _searched("uniform")),)),
    Claim(
        README,
        "takes off {:c.0f}% of trellis codes' KL at 2 bits, {:c.0f}% at 3, on SmolLM2-135M",
        (
            Less(_real("trellis-16-predicted-tuned-2"), _real("trellis-16-predicted-2")),
            Less(_real("trellis-12-tuned-3"), _real("trellis-12-3")),
        ),
    ),
    Claim(
        README,
        "the cache at {:.1f} bits a number, near lossless",
        (
            Value(
                "2026-11-22-cpu-kv-cache.json",
                "true_bits",
                "rows",
                {"mode": "... weighted by queries (default)", "bits": 4, "factor": 1},
            ),
        ),
    ),
    Claim(README, "{:,.0f} of {:,.0f} builds", (Count(BUILDS, "builds", {"spills": 0}), Count(BUILDS, "builds"))),
    Claim("docs/kernels.md", "({:,.0f} builds, Triton 3.7.1)", (Count(BUILDS, "builds"),)),
    Claim(
        "docs/kernels.md",
        "takes {:.2f} a number on sm_100, and at 3 bits and 128 channels {:.2f} on sm_120. Products of 3 bits with 16 "
        "and 32 rows take 8 rows at a time on sm_100, at {:.2f} instructions a weight and 8 rows",
        tuple(
            Value(BUILDS, "instructions_per_weight", "builds", {"name": name})
            for name in (
                "kv attention int2/2 D=256 rank 4 sparse sm_100",
                "kv attention int3/3 D=128 sm_120",
                "decode int3 g128 M=16 bf16 sm_100",
            )
        ),
    ),
    Claim(
        "docs/results/integers.md",
        "Full precision: perplexity {:.3f}",
        (Value("2026-11-21-cpu-reference-quality.json", "baseline_perplexity", where={"method": "rtn", "bits": 2}),),
    ),
    Claim(
        "docs/results/integers.md",
        "It removes {:c.0f}% of GPTQ's KL at 2 bits here",
        (Less(_integers(0.7), _integers(0)),),
    ),
    Claim(
        "docs/results/integers.md",
        "another run of GPTQ at 2 bits differs by {:c.1f}%",
        (More(_quality("GPTQ(bits 2)"), _integers(0.7)),),
    ),
    Claim(
        "docs/results/reference-model.md",
        "Held-out perplexity is {:.1f}, against {:.0f} for a unigram model of the training text, and {:c.0f}% of the "
        "answers",
        (_held_out("held_out_perplexity"), _held_out("unigram_perplexity"), _held_out("recall_accuracy")),
    ),
    Claim(
        "docs/results/reference-model.md",
        "its held-out perplexity is {:.1f}",
        (Value("../reference/experts/held_out.json", "held_out_perplexity"),),
    ),
    Claim(
        "docs/results/real-model.md",
        "{:.0f} sequences of {:.0f} tokens of wikitext-2's validation part, and measured on the first {:.0f} sequences "
        "of {:.0f} tokens",
        tuple(Value(REAL, name, "setting") for name in ("num_samples", "seqlen", "test_sequences", "test_seqlen")),
    ),
    Claim(
        "docs/results/real-model.md",
        "Full precision: perplexity {:.2f}",
        (Value(REAL, "baseline_perplexity", "rows", {"name": "rtn-g64-2", "current": True}),),
    ),
    Claim(
        MEMORY,
        "({:.2f} and {:.2f} in two measurements), with its default, which runs a second stream of activations, "
        "{:.2f} and {:.2f}",
        tuple(_beside_peer(who, run) for who in ("quantkit, target shift 0", "quantkit") for run in (0, 1)),
    ),
    Claim(
        MEMORY,
        "with `--target-shift 0` in {:.2f} of its time, by default in {:.2f}",
        tuple(Value(REAL_PEER, who, "ratios") for who in ("quantkit, target shift 0", "quantkit")),
    ),
    Claim(
        TRELLIS,
        "2 bits are {:.3f} in a layer of 4096 x 4096 ({:.2f} in the small layers of the reference model)",
        (_bound("trellis L=16", "bits_per_weight"), _quality(T16.format(2), "bits_per_weight")),
    ),
    Claim(
        TRELLIS,
        "it takes {:c.0f}% off the KL",
        (
            Less(
                _part("Hadamard(Trellis(bits 2, state_bits 12))"),
                _part("Hadamard(Trellis(bits 2, state_bits 12, order none))"),
            ),
        ),
    ),
    Claim(
        TRELLIS,
        "Published codes take {:c.0f}% to {:c.0f}% more instructions; the best of them errs by {:c.0f}% less at 4 bits",
        (
            More(_code("1MAD*", "cost", 2), _code("quantkit*", "cost", 2)),
            More(_code("3INST*", "cost", 2), _code("quantkit*", "cost", 2)),
            Less(_code("1MAD*", "mse", 4), _code("quantkit*", "mse", 4)),
        ),
    ),
    Claim(
        TRELLIS,
        "errs by {:.4f} at 2 bits over 2^16 states and by {:.4f} over 2^12 (`--state-bits 12`), which is no worse than "
        "a beam that is as fast: one that keeps 2^12 of 2^16 states errs by {:.4f}",
        tuple(_found(what) for what in ("all of 2^16 states", "all of 2^12 states", "a beam of 2^12")),
    ),
    Claim(
        "docs/results/vectors.md",
        "2 bits are {:.2f} with it",
        (
            Value(
                "2026-11-21-cpu-activations.json",
                "bits_per_activation",
                where={"method": "pyramid", "hadamard": True, "bits": 2},
            ),
        ),
    ),
    Claim(
        KV_GUIDE,
        "({:c.1f}% with the exact cache)",
        (Value("2026-11-22-cpu-kv-cache.json", "retrieval", "rows", {"mode": "exact", "factor": 1}),),
    ),
    Claim(
        KV_GUIDE,
        "{:.2f} instructions at 2 bits, {:.2f} at 3 and {:.2f} at 4",
        tuple(_attention(bits) for bits in (2, 3, 4)),
    ),
    Claim(
        SEARCH_GUIDE,
        "At 3 bits that is {:c.0f}% less than uniform levels",
        (Less(_searched("search"), _searched("uniform")),),
    ),
    Claim(
        KV_GUIDE,
        "loses {:c.0f}%, {:c.0f}% and {:c.0f}% less; with outliers, {:c.0f}%, {:c.0f}% and {:c.0f}% less",
        tuple(_corrected(bits, factor) for factor in (1, 8) for bits in (2, 3, 4)),
    ),
    Claim(
        SEARCH_GUIDE,
        "The 50 generations of a row took {:.0f} to {:.0f} seconds",
        (_search_time(3.14), _search_time(2.5)),
    ),
    Claim(
        SEARCH_GUIDE,
        "costs 1 : {:.1f} : {:.1f}",
        tuple(Ratio(_generation(layers), _generation(42)) for layers in (84, 168)),
    ),
    Claim(
        TRUST,
        "Of {:,.0f} variants {:,.0f} end in a traceback, {:,.0f} hang, {:,.0f} crash, {:,.0f} load otherwise without a "
        "flipped bit of a payload, {:,.0f} give an error that is no printable line, and {:,.0f} ask for much memory.",
        (
            Value(DAMAGE, "variants"),
            *(Value(DAMAGE, f"kinds[{k}]") for k in ("traceback", "hang", "crash", "wrong", "garbled", "memory")),
        ),
    ),
    Claim(
        TRUST,
        "A refusal takes {:k.0f} ms of the processor in the median, and {:.1f} s at most",
        (Value(DAMAGE, "refused_median_seconds"), Value(DAMAGE, "refused_longest_seconds")),
    ),
    Claim(
        "docs/kernels-trellis.md",
        "{:.2f} / 2 = 2.10 at 2 bits, so the kernel is bound by issue, by the ALU at {:.2f}",
        tuple(
            Value(BUILDS, name, "builds", {"name": "trellis multiply K=2 L=16 M=8 bf16 sm_90"})
            for name in ("instructions_per_weight", "alu_per_weight")
        ),
    ),
    Claim(
        "docs/kernels.md",
        "and the integers take {:.1f}",
        (Value(BUILDS, "instructions_per_weight", "builds", {"name": "pyramid factored D=32 4 bits M=8 bf16 sm_90"}),),
    ),
]
