"""Advice: ways to pack a model, with what each takes and costs, from shapes alone or from a pass over some text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from quantkit.advice import prior
from quantkit.core.constants import HEAD_BITS
from quantkit.core.device import compute_dtype, pick_device
from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Quantizer
from quantkit.core.units import parse_size
from quantkit.evopress.memory import beside_weights
from quantkit.io.checkpoint import read_config
from quantkit.io.hf import resolve_folder
from quantkit.io.shards import Shards
from quantkit.io.source import open_folder
from quantkit.io.stored_forms import quantization_of
from quantkit.kvcache.config import KVCacheConfig
from quantkit.models.structure import block_linears, context_length, ends
from quantkit.run.estimate import expected_seconds, sizes
from quantkit.run.prediction import Prediction, predict
from quantkit.run.recipe import Calibration, Recipe, core, make_quantizer, sequence_length

WAYS: tuple[tuple[str, float, int | None], ...] = (
    ("gptq", 8, None),
    ("gptq", 4, 64),
    ("trellis", 4, None),
    ("gptq", 3, 64),
    ("trellis", 3, None),
    ("trellis", 2, None),
)
"""(method, bits, group size) that advice compares, by falling size."""
MEASURED = 0.25
"""Share by which a prediction from a measurement is taken to be off at most, as `quantkit.evals.predicted` finds of
GPTQ and trellis codes on two models: 7% on one, 25% on the other."""
ENOUGH = 0.05
"""Nats a token below which a packed model is hardly told from the full one: the smallest such way is advised where
memory sets no limit."""


@dataclass(frozen=True)
class Choice:
    """A way to pack a model; what is None was not asked for or is not known.

    Attributes:
        method, bits, options: of the command `quantkit quantize MODEL OPTIONS`; of the model as it is "", 16, "".
        bits_per_weight: of the packed layers, every stored byte counted.
        nbytes: of all tensors.
        memory: peak of generation at the context.
        fits: whether that is within the limit.
        kl, kl_low, kl_high: expected KL to the full model, nats a token, and the range in which it is taken to lie.
        read: bytes that a token's weights take, over those of the model as it is: the least time a token can take.
        seconds: of the run, roughly, on this machine as it is now.
    """

    method: str
    bits: float
    options: str
    bits_per_weight: float
    nbytes: int
    read: float
    kl: float
    kl_low: float
    kl_high: float
    seconds: float
    memory: int | None = None
    fits: bool | None = None


@dataclass(frozen=True)
class Advice:
    """What to do with a model.

    Attributes:
        model: its name.
        device: where it is to run.
        choices: by falling size; the first is the model as it is.
        advised: one of them; None where none fits.
        measured: whether its KL rests on a measurement of this model.
        context, limit: that memory was counted for, and its limit in bytes.
    """

    model: str
    device: str
    choices: tuple[Choice, ...]
    advised: Choice | None
    measured: bool
    context: int | None = None
    limit: int | None = None


def advise(
    model: str | Path,
    *,
    memory: str | None = None,
    context: int | None = None,
    batch: int = 1,
    kv_bits: int | None = None,
    device: str | None = None,
    tokens: float | None = None,
    calibration: Calibration | None = None,
    num_samples: int = 128,
    seqlen: int | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Advice:
    """Compares ways to pack a model.

    Args:
        model: the full-precision model: a folder, hub id or GGUF file.
        memory: that generation may take, weights and all, such as "8GB".
        context, batch: that it is to hold; None for 4096, or the model's context where that is shorter.
        kv_bits: of a compressed KV cache.
        device: where the model is to run, and where it would be packed.
        tokens: that the model was trained on, for the law where nothing is measured.
        calibration: text to measure on; None to go by shapes alone.
        num_samples, seqlen: of the run that is advised.
        progress: see `run.prediction.predict`.

    Raises:
        QuantkitError: bad input; the message says what would work.
    """
    for what, value in (("context", context), ("batch", batch), ("num_samples", num_samples)):
        if value is not None and value < 1:
            raise QuantkitError(f"`{what}` {value}: give at least 1")
    limit = None if memory is None else parse_size(memory)
    where, folder = pick_device(device), resolve_folder(model)
    source = open_folder(folder, compute_dtype(where), structure_only=True)
    head = ends(source.model)[1]
    ways = {way: recipe for way in WAYS if _fits(recipe := _recipe(way, head is not None), source.model)}
    layouts = [
        sizes(open_folder(folder, compute_dtype(where), structure_only=True), recipe) for recipe in ways.values()
    ]
    quantizers = [recipe.quantizer for recipe in ways.values() if recipe.quantizer is not None]
    measured = None
    if calibration is not None:
        measured = predict(
            folder, quantizers, calibration, num_samples=num_samples, device=where, progress=progress
        )  # fmt: skip
    length = sequence_length(seqlen, context_length(source.model))
    asked = min(context or 4096, context_length(source.model) or context or 4096)
    parameters = sum(p.numel() for p in source.model.parameters())
    choices = []
    for ((method, bits, _), recipe), layout in zip(ways.items(), layouts, strict=True):
        low, kl, high = _kl(measured, recipe.quantizer, method, bits, parameters, tokens)
        choices.append(
            Choice(
                method, bits, _options(method, bits, recipe), layout.bits_per_weight, layout.bytes_after,
                layout.bytes_after / layout.bytes_before, kl, low, high,
                expected_seconds(source, recipe, num_samples * length, where),
            )
        )  # fmt: skip
    before = Shards(folder).nbytes() if quantization_of(read_config(folder)) else source.nbytes()
    every = (Choice("", 16, "", 8 * before / parameters, before, 1.0, 0.0, 0.0, 0.0, 0.0), *choices)
    beside = {packed: _beside(folder, packed, where, asked, batch, kv_bits) for packed in (False, True)}
    every = tuple(_placed(choice, beside[bool(choice.method)], limit) for choice in every)
    return Advice(str(model), str(where), every, _advised(every), measured is not None, asked, limit)


def _fits(recipe: Recipe, model: PreTrainedModel) -> bool:
    """Whether the way can be gone with this model: groups may be wider than all of its layers."""
    try:
        recipe.plan(model)
    except QuantkitError:
        return False
    return True


def _recipe(way: tuple[str, float, int | None], packs_head: bool) -> Recipe:
    method, bits, group_size = way
    return Recipe(make_quantizer(method, bits=bits, group_size=group_size), head_bits=HEAD_BITS if packs_head else None)


def _options(method: str, bits: float, recipe: Recipe) -> str:
    """Of the command that packs a model so."""
    group = getattr(core(recipe.quantizer), "group_size", 128) if recipe.quantizer is not None else 128
    more = "" if group == 128 else f" --group-size {group}"
    head = "" if recipe.head_bits is None else f" --head-bits {recipe.head_bits}"
    return f"--method {method} --bits {bits:g}{more}{head}"


def _kl(
    measured: Prediction | None,
    quantizer: Quantizer | None,
    method: str,
    bits: float,
    parameters: int,
    tokens: float | None,
) -> tuple[float, float, float]:
    """(at least, expected, at most), nats a token."""
    if measured is not None and quantizer is not None:
        kl = measured.kl(quantizer)
        return kl * (1 - MEASURED), kl, kl * (1 + MEASURED)
    kl = prior.expected_kl(method, bits, parameters, tokens)
    return kl / prior.UNCERTAINTY, kl, kl * prior.UNCERTAINTY


def _beside(folder: Path, packs: bool, device: torch.device, context: int, batch: int, kv_bits: int | None) -> int:
    """Bytes beside the weights at a context, of the model as it is or of a packed one."""
    model = open_folder(folder, structure_only=True).model
    kv = None if kv_bits is None else KVCacheConfig.gear(kv_bits)
    packed = list(block_linears(model)) if packs else []
    return beside_weights(model, packed, context, batch, kv, device, ends(model)[1] if packs else None).total


def _placed(choice: Choice, beside: int, limit: int | None) -> Choice:
    """The choice with its memory."""
    memory = choice.nbytes + beside
    return replace(choice, memory=memory, fits=None if limit is None else memory <= limit)


def _advised(choices: Sequence[Choice]) -> Choice | None:
    """The least KL that fits; without a limit the smallest of those that are hardly told from the full model."""
    if any(choice.fits is not None for choice in choices):
        fitting = [choice for choice in choices if choice.fits]
        return min(fitting, key=lambda choice: (choice.kl, choice.nbytes), default=None)
    near = [choice for choice in choices if choice.kl <= ENOUGH]
    return min(near, key=lambda choice: choice.nbytes)
