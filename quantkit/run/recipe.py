"""A recipe: everything that a user decides about a run, and the plan that follows for a model."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from quantkit.core import spec
from quantkit.core.constants import TARGET_SHIFT
from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Needs, Quantizer
from quantkit.core.registry import resolve
from quantkit.core.schema import in_words
from quantkit.io.files import parse_json
from quantkit.models.experts import place, sees_text
from quantkit.models.plan import Plan, Rules, Tied, make_plan, plan_needs, with_own_weight
from quantkit.models.rotation import Rotation
from quantkit.models.structure import (
    block_linears,
    check_vocabulary,
    context_length,
    ends,
    is_lookup,
    language_modules,
    linear_weight,
    one_weight,
    outer_linears,
    shared_layers,
)
from quantkit.quantizers.target_shift import TargetShift
from quantkit.run.documents import documents
from quantkit.run.text import sequences_apart

if TYPE_CHECKING:
    from quantkit.run.sequential import Tuner


@dataclass(frozen=True)
class Calibration:
    """The text that statistics are gathered on.

    Attributes:
        source: a dataset name, a file, a hub id, or rows of documents; see `run.documents`.
        num_samples: sequences.
        seqlen: tokens a sequence; None for 2048, or the model's context where that is shorter.
        seed: of the choice of sequences.
    """

    source: str | Path | Sequence[Any] = "wikitext2"
    num_samples: int = 128
    seqlen: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise QuantkitError(f"num_samples={self.num_samples}: give at least one sequence")
        if self.seqlen is not None and self.seqlen < 2:
            raise QuantkitError(f"seqlen={self.seqlen}: a sequence has at least two tokens")

    def sequences(self, tokenizer: Any, model: nn.Module) -> Tensor:
        """int64 [samples, seqlen]; see `run.text.sequences_apart`.

        Raises:
            QuantkitError: there is no such text, or it is too short for one sequence; a sequence exceeds the model's
                context, or a token its vocabulary.
        """
        return self.sequences_apart(tokenizer, model, 0)[0]

    def sequences_apart(self, tokenizer: Any, model: nn.Module, held_out: int) -> tuple[Tensor, Tensor]:
        """(`sequences`, int64 [held_out, seqlen] of other pieces of the text); see `run.text.sequences_apart`."""
        texts = documents(self.source, "calibration", tokenizer)
        length = sequence_length(self.seqlen, context_length(model))
        found = sequences_apart(texts, tokenizer, self.num_samples, length, self.seed, held_out)
        for sequences in found:
            check_vocabulary(sequences, model)
        return found


def sequence_length(seqlen: int | None, context: int | None) -> int:
    """The asked-for sequence, or 2048 cut to the model's context.

    Raises:
        QuantkitError: the asked-for sequence exceeds the context.
    """
    if seqlen is None:
        return min(2048, context or 2048)
    if seqlen < 2:
        raise QuantkitError(f"seqlen={seqlen}: a sequence has at least two tokens")
    if context is not None and seqlen > context:
        raise QuantkitError(f"seqlen={seqlen} exceeds the model's context of {context} tokens; use at most that")
    return seqlen


def make_quantizer(
    method: str | Quantizer, hadamard: bool | None = None, low_rank: int | None = None, **settings: Any
) -> Quantizer:
    """A quantizer by its name in the registry and its settings, by its text, or the object itself.

    Args:
        method: the name; or a text with settings (`quantkit.core.spec`) or an object, which allow nothing beside.
        hadamard: quantize in a rotated basis; None for what suits the method.
        low_rank: rank of a correction; None for none.
        settings: of the method; those that are None are left to its defaults.

    Raises:
        UnknownName: no such method.
        QuantkitError: a setting that the method does not have, or a value that it refuses.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if isinstance(method, str) and "(" in method:
        method = cast(Quantizer, spec.read(method))
    if not isinstance(method, str):
        _check_quantizer("method", method)
        beside = [
            *given,
            *(name for name, value in (("hadamard", hadamard), ("low_rank", low_rank)) if value is not None),
        ]
        if beside:
            raise QuantkitError(
                f"{beside[0]} is given beside a quantizer object, which holds its own settings; write them there, such "
                "as Hadamard(LowRank(VPTQ(bits=2), rank=8)), or give the method's name"
            )
        return method
    quantizer = spec.make(method, **given)
    if low_rank is not None:
        quantizer = spec.make("low_rank", quantizer, low_rank)
    if hadamard is None:
        hadamard = getattr(core(quantizer), "wants_rotation", False)
    return spec.make("hadamard", quantizer) if hadamard else quantizer


def default_bits(method: str | Quantizer) -> float | None:
    """Bits for a method that is named without any: 3, and None for one that has no such setting, or an object.

    Raises:
        UnknownName: no installed package has the method.
    """
    if not isinstance(method, str) or "(" in method:
        return None
    return 3 if "bits" in {entry.name for entry in dataclasses.fields(resolve(spec.GROUP, method))} else None


def read_plan(path: Path) -> dict[str, Quantizer]:
    """Quantizers by layer from a plan: JSON {"layers": {layer: what `spec.read` reads}}.

    Raises:
        QuantkitError: the file is no plan.
    """
    try:
        found = parse_json(path)
        layers = found.get("layers") if isinstance(found, dict) else None
        if not isinstance(layers, dict) or not layers:
            raise ValueError("it lists no layers")
        other = next((layer for layer, text in layers.items() if not isinstance(text, str)), None)
        if other is not None:
            raise ValueError(f"{other!r} has {in_words(layers[other])}")
    except ValueError as error:
        raise QuantkitError(
            f'{path} is no plan ({error}); it holds {{"layers": {{"LAYER": "gptq(3)", ...}}}}'
        ) from error
    return {layer: spec.read(text) for layer, text in layers.items()}


def core(quantizer: Quantizer) -> Quantizer:
    """The method inside all wrappers."""
    while isinstance(inner := getattr(quantizer, "inner", None), Quantizer):
        quantizer = inner
    return quantizer


def with_bits(quantizer: Quantizer, bits: float) -> Any:
    """The same quantizer, wrappers and all, with other bits in its core."""
    if isinstance(inner := getattr(quantizer, "inner", None), Quantizer):
        return dataclasses.replace(quantizer, inner=with_bits(inner, bits))  # type: ignore[type-var]
    return dataclasses.replace(quantizer, bits=bits)  # type: ignore[type-var]


def fraction_of(quantizer: Quantizer) -> float | None:
    """Bits that are a fraction where a layer can only have a whole number of them, or None."""
    inner: Any = core(quantizer)
    return inner.bits if getattr(inner, "whole_bits", False) and inner.bits != int(inner.bits) else None


def allocate_fractions(plan: Plan, weights: Mapping[str, int]) -> Plan:
    """Gives layers whole numbers of bits where their method has no others and a fraction is asked for on average.

    The smallest layers of those that share a quantizer get the number above it, as far as the average allows: a bit
    there costs least, and keys and values, small where heads share them, gain most by one. Of layers of one size some
    do, evenly over the depth, where not all can.

    Args:
        plan: quantizers by layer, in model order.
        weights: of every layer.
    """
    parts: dict[Quantizer, list[str]] = {}
    for name, quantizer in with_own_weight(plan).items():
        if fraction_of(quantizer) is not None:
            parts.setdefault(quantizer, []).append(name)
    changed: Plan = {}
    for quantizer, names in parts.items():
        low, rest = divmod(fraction_of(quantizer) or 0.0, 1)
        budget = rest * sum(weights[name] for name in names)
        for size in sorted({weights[name] for name in names}):
            alike = [name for name in names if weights[name] == size]
            more = min(len(alike), int(budget / size + 1e-9))
            budget -= more * size
            for i, name in enumerate(alike):
                extra = (i + 1) * more // len(alike) - i * more // len(alike)
                changed[name] = with_bits(quantizer, int(low) + extra)
    return plan | changed


def _check_quantizer(what: str, value: object) -> None:
    if isinstance(value, type) or not isinstance(value, Quantizer):
        found = value.__name__ if isinstance(value, type) else type(value).__name__
        raise QuantkitError(f"{what} is given {found}; give a quantizer object such as GPTQ(bits=4)")


def _check_embedding(model: nn.Module, name: str, quantizer: Quantizer | Tied) -> None:
    """Raises QuantkitError where the input embedding cannot be packed by this quantizer."""
    module = model.get_submodule(name)
    if not is_lookup(module):
        raise QuantkitError(
            f"{name} is a {type(module).__name__}, which gives more than rows of its weight; leave it dense "
            f"(`ignore` {name})"
        )
    if not isinstance(quantizer, Tied) and quantizer.needs > Needs.NOTHING:
        raise QuantkitError(
            f"{name}: {core(quantizer)} reads statistics of a layer's inputs, and an embedding has none; give it one "
            "that reads none, such as RTN(bits=6)"
        )


def _group(in_features: int) -> int:
    """A group size that divides a layer's width, where one of the usual ones does."""
    return next((size for size in (128, 64, 32) if in_features % size == 0), min(128, in_features))


def _check_reached(model: nn.Module, plan: Mapping[str, Quantizer], head: str | None) -> None:
    """Raises QuantkitError where a quantizer is to read text at a layer that text does not reach, as in a tower."""
    for name in beside_text(model, (name for name in plan if name != head)):
        if plan[name].needs > Needs.NOTHING:
            raise QuantkitError(
                f"text does not reach {name}, and {spec.write(plan[name])} reads it; give it rtn, or `include` it"
            )


def beside_text(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Those of some layers that text does not reach, such as a vision tower's."""
    reached = language_modules(model)
    return [name for name in layers if not sees_text(name) or model.get_submodule(name) not in reached]


def _stars(names: Iterable[str]) -> list[str]:
    """Patterns that cover names, one for what comes before a number, or before the last dot."""
    return [*dict.fromkeys(re.sub(r"\.(\d+\..*|[^.]+)$", ".*", name) if "." in name else name for name in names)]


@dataclass(frozen=True)
class Recipe:
    """What to do to a model.

    Attributes:
        quantizer: for every linear layer in the decoder blocks; None to quantize only what rules name.
        rules: patterns over layer names -> quantizer or None; the last match decides.
        target_shift: 0 to 1, for all quantizers that read statistics.
        calibration: the text behind the statistics.
        true_sequential: let each layer see its own block's earlier layers quantized.
        rotation: rotate the model's residual stream first; None to leave it as it is.
        low_rank_bits: bits per weight that low-rank corrections may cost, shared out over the layers (see
            `quantkit.run.ranks`); 0 for the ranks that the quantizers have.
        tuner: improves every block once it is quantized; None to leave it as it is.
        head_bits: of the head (GPTQ; RTN where nothing else reads text) and the input embedding (RTN), symmetric, in
            groups of 128 or what divides; where they are tied one weight serves both, quantized as the head. Rules go
            before it. None leaves both dense.
        fisher: weigh tokens and outputs by how much the model's predictions feel them, which a reverse pass over the
            text finds (`quantkit.run.fisher`); None where a quantizer wants it.
        check: sequences of other pieces of the text that the packed model is measured on beside the full one, at the
            run's end (see `run.check`); 0 for none. Packed bytes do not depend on it.
        all_experts: gather each expert's statistics from all tokens, not from those alone that the router sends to it.
        experts_bits: of experts' layers; None for the quantizer's own.
        include: patterns over names of layers outside the blocks -> bits, such as those of a vision tower, to pack
            them too: as `head_bits` packs the head and, by RTN, all that text does not reach.
    """

    quantizer: Quantizer | None
    rules: Rules = field(default_factory=dict)
    target_shift: float = TARGET_SHIFT
    calibration: Calibration = Calibration()
    true_sequential: bool = True
    rotation: Rotation | None = None
    low_rank_bits: float = 0
    tuner: "Tuner | None" = None
    head_bits: int | None = None
    fisher: bool | None = None
    check: int = 0
    all_experts: bool = False
    experts_bits: float | None = None
    include: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.check < 0:
            raise QuantkitError(f"check={self.check} sequences: give 0 (off) or more, such as 8")
        if not 0 <= self.target_shift <= 1:
            raise QuantkitError(f"target shift {self.target_shift}: use 0 (off) to 1 (least squares)")
        if not 0 <= self.low_rank_bits <= 16:
            raise QuantkitError(f"{self.low_rank_bits:g} extra bits for corrections: give 0 (off) to 16, such as 0.1")
        if self.head_bits not in (None, *range(1, 9)):
            raise QuantkitError(
                f"{self.head_bits} bits for head and embedding: give 1 to 8, or none to leave them dense"
            )
        for pattern, quantizer in self.rules.items():
            if quantizer is not None:
                _check_quantizer(f"the rule {pattern!r}", quantizer)

    def reads_text(self, plan: Plan) -> bool:
        """Whether a run needs calibration text."""
        return self.tuner is not None or self.low_rank_bits > 0 or plan_needs(plan) > Needs.NOTHING

    def runs_back(self, plan: Plan) -> bool:
        """Whether a run begins with a reverse pass over its text."""
        if self.fisher is not None:
            return self.fisher and plan_needs(plan) > Needs.NOTHING
        return any(getattr(core(quantizer), "wants_fisher", False) for quantizer in with_own_weight(plan).values())

    def plan(self, model: nn.Module) -> Plan:
        """Each layer's quantizer, shifted where it reads statistics.

        Raises:
            QuantkitError: no decoder blocks, a rule that matches nothing, a group size wider than every layer, or an
                embedding that cannot be packed so.
        """
        rules = {pattern: self._shifted(quantizer) for pattern, quantizer in self.rules.items()}
        embedding, head = ends(model)
        defaults: dict[str, Quantizer | Tied | None] = {} if embedding is None else {embedding: None}
        defaults |= dict.fromkeys(block_linears(model), self._shifted(self.quantizer))
        if self.experts_bits is not None:
            defaults |= self._for_experts(block_linears(model))
        defaults |= dict.fromkeys(outer_linears(model))
        if self.head_bits is not None:
            defaults |= self._for_ends(model, embedding, head)
        for pattern, bits in self.include.items():
            defaults |= self._for_outer(model, pattern, bits, head)
        unseen = [name for name, one in defaults.items() if one is not None and one.needs and not sees_text(name)]
        defaults |= dict.fromkeys(unseen)
        plan = make_plan(defaults, rules, [] if embedding is None else [embedding])
        if embedding is not None and embedding in plan:
            if head in plan and plan[head] == plan[embedding] and self._keeps_tie(model, embedding, head):
                plan[embedding] = Tied(head)
            _check_embedding(model, embedding, plan[embedding])
        plan |= {name: Tied(first) for name, first in shared_layers(model).items() if first in plan}
        _check_reached(model, with_own_weight(plan), head)
        plan = allocate_fractions(plan, {name: linear_weight(model.get_submodule(name)).numel() for name in plan})
        widest = max(linear_weight(model.get_submodule(name)).shape[1] for name in plan)
        for quantizer in dict.fromkeys(map(core, with_own_weight(plan).values())):
            if getattr(quantizer, "group_size", -1) > widest:
                raise QuantkitError(
                    f"{quantizer}: the group size exceeds the widest layer's {widest} input features; "
                    "use -1 for one group a row"
                )
        return plan

    def _for_experts(self, layers: Iterable[str]) -> dict[str, Quantizer | Tied | None]:
        """What `experts_bits` gives experts' layers."""
        bits, experts = self.experts_bits, [layer for layer in layers if place(layer) is not None]
        assert bits is not None
        if not experts or self.quantizer is None or not hasattr(core(self.quantizer), "bits"):
            raise QuantkitError(
                f"{bits:g} bits for experts: "
                + ("the method has no bits to set" if experts else "the model has no experts that are packed")
                + "; leave `experts_bits` out"
            )
        try:
            other = with_bits(self.quantizer, int(bits) if bits == int(bits) else bits)
        except ValueError as error:
            raise QuantkitError(f"`experts_bits`: {error}") from error
        return dict.fromkeys(experts, self._shifted(other))

    def _for_outer(self, model: nn.Module, pattern: str, bits: int, head: str | None) -> Plan:
        """What `include` gives the layers outside the blocks whose names a pattern matches."""
        if bits not in range(1, 9):
            raise QuantkitError(f"{bits} bits for {pattern!r}: give 1 to 8")
        outer = {name: linear_weight(layer).shape[1] for name, layer in outer_linears(model).items()}
        names = [name for name in outer if fnmatchcase(name, pattern)]
        if not names:
            known = f"; there are {', '.join(_stars(outer))}" if outer else ""
            raise QuantkitError(f"`include` {pattern!r} matches no linear layer outside the blocks{known}")
        return {name: self._of_end("gptq" if name == head else "rtn", bits, outer[name]) for name in names}

    def _of_end(self, method: str, bits: int, in_features: int) -> Quantizer:
        """A quantizer of a layer outside the blocks; RTN where nothing else reads text."""
        others = [quantizer for quantizer in (self.quantizer, *self.rules.values()) if quantizer is not None]
        text = self.tuner or self.low_rank_bits or any(quantizer.needs > Needs.NOTHING for quantizer in others)
        made = self._shifted(spec.make(method if text else "rtn", bits, _group(in_features)))
        assert made is not None
        return made

    def _for_ends(self, model: nn.Module, embedding: str | None, head: str | None) -> Plan:
        """What `head_bits` gives the input embedding and the head."""
        if embedding is None or head not in outer_linears(model):
            raise QuantkitError(
                f"{type(model).__name__} gives no embedding and no linear head that could be packed at "
                f"{self.head_bits} bits; leave `head_bits` out"
            )
        assert self.head_bits is not None and head is not None
        bits = int(self.head_bits)
        widths = {name: linear_weight(model.get_submodule(name)).shape[1] for name in (embedding, head)}
        first = Tied(head) if self._keeps_tie(model, embedding, head) else self._of_end("rtn", bits, widths[embedding])
        return {embedding: first, head: self._of_end("gptq", bits, widths[head])}

    def _keeps_tie(self, model: nn.Module, embedding: str, head: str) -> bool:
        """Whether the head's weight is the embedding's; a rotation of the model ends that."""
        return self.rotation is None and one_weight(model, embedding, head)

    def _shifted(self, quantizer: Quantizer | None) -> Quantizer | None:
        if quantizer is None or quantizer.needs != Needs.HESSIAN or self.target_shift == 0:
            return quantizer
        return TargetShift(quantizer, self.target_shift)

    def identity(self, plan: Plan, sequences: Tensor | None) -> dict[str, Any]:
        """The `settings` by which a run is known again: a text is known by its tokens, wherever it lies.

        Args:
            plan: quantizers by layer.
            sequences: int64 [samples, seqlen], or None where no text is read.
        """
        settings = self.settings(plan, sequences)
        if settings["calibration"] is not None:
            settings["calibration"] = {key: value for key, value in settings["calibration"].items() if key != "source"}
        return settings

    def settings(self, plan: Plan, sequences: Tensor | None) -> dict[str, Any]:
        """JSON of all that packed bytes depend on, but for the model; the text is int64 [samples, seqlen] or None."""
        source = self.calibration.source
        return {
            "quantizers": {name: spec.write(quantizer) for name, quantizer in plan.items()},
            "true_sequential": self.true_sequential,
            "rotation": self.rotation and dataclasses.asdict(self.rotation),
            "tuner": self.tuner and repr(self.tuner),
            "fisher": self.runs_back(plan),
            **({"all_experts": True} if self.all_experts else {}),
            "calibration": None
            if sequences is None
            else {
                "source": str(source) if isinstance(source, str | Path) else "documents",
                "num_samples": sequences.shape[0],
                "seqlen": sequences.shape[1],
                "seed": self.calibration.seed,
                "tokens_sha256": hashlib.sha256(sequences.numpy().tobytes()).hexdigest(),
            },
        }
