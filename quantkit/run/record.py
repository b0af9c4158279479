"""What a run remembers of itself from its beginning to the checkpoint's report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core import spec
from quantkit.core.constants import HEAD_BITS, TOWER_BITS
from quantkit.core.device import pick_device
from quantkit.core.result import LayerResult
from quantkit.core.units import size
from quantkit.models.experts import sees_text
from quantkit.models.plan import Plan, tied
from quantkit.models.structure import bypassed, ends, find_blocks, fused_expert_parameters, is_linear, linear_weight
from quantkit.run.card import model_card
from quantkit.run.experts import starved_experts
from quantkit.run.page import report_page
from quantkit.run.report import Check, LayerReport, Report, Samples, peak_device_bytes, peak_memory_bytes

RECORD, PAGE, CARD = "quantkit_report.json", "quantkit_report.html", "README.md"
"""The report, for programs and for readers, and the model's card."""

MANY, FEW = 0.1, 0.01
"""Shares of a model's weights from which a dense head and embedding, and what is beside the language model, are worth a
word."""


def begin(device: str | torch.device | None) -> tuple[torch.device, float]:
    """(the run's device, with its peak memory counted from now; the time)."""
    where = pick_device(device)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    return where, time.monotonic()


@dataclass(frozen=True)
class Run:
    """What a report says of a run, beyond what came out.

    Attributes:
        start: time.monotonic() at its beginning.
        device: where it takes place.
        bytes_before: all tensors of the model.
        weights: (weights in the plan's layers, weights of the model).
        settings: everything that the result depends on.
        notes: what a user should know.
    """

    start: float
    device: torch.device
    bytes_before: int
    weights: tuple[int, int]
    settings: dict[str, Any]
    notes: tuple[str, ...]

    def report(
        self,
        model: str,
        plan: Plan,
        results: Mapping[str, LayerResult],
        dense_bytes: int,
        check: Check | None = None,
        samples: Samples | None = None,
    ) -> Report:
        """The record of the finished run.

        Args:
            model: its name.
            plan: what each packed layer was quantized with.
            results: of the plan's layers.
            dense_bytes: of all tensors outside the plan.
            check, samples: of held-out text, where there was any.
        """
        results = {name: results[name] for name in plan}
        nbytes = sum(result.weight.nbytes for result in results.values())
        layers = tuple(
            LayerReport(
                name,
                spec.write(plan[name]),
                r.weight.label,
                r.weight.bits_per_weight,
                r.relative_error,
                r.damping,
                r.tuned,
                r.predicted_kl,
                r.tokens,
            )
            for name, r in results.items()
        )
        packed, in_all = self.weights
        starved = starved_experts({name: result for name, result in results.items() if result.tokens is not None})
        return Report(
            model=model,
            layers=layers,
            bits_per_weight=8 * nbytes / packed,
            bytes_before=self.bytes_before,
            bytes_after=dense_bytes + nbytes,
            packed_weights=packed,
            all_weights=in_all,
            seconds=time.monotonic() - self.start,
            peak_memory_bytes=peak_memory_bytes(),
            peak_device_bytes=peak_device_bytes(self.device),
            settings=self.settings,
            notes=(*self.notes, *starved),
            check=check,
            samples=samples,
        )


def files_of(report: Report, config: dict[str, Any], original: str) -> dict[str, bytes]:
    """What lies beside a checkpoint to tell of it, by name.

    Args:
        report: of the run.
        config: JSON of the original model's config.json.
        original: the original model's card, or "".
    """
    texts = {
        RECORD: json.dumps(report.to_json(), indent=2) + "\n",
        PAGE: report_page(report),
        CARD: model_card(report, config, original),
    }
    return {name: text.encode(errors="backslashreplace") for name, text in texts.items()}


def count_weights(model: nn.Module, plan: Plan) -> tuple[int, int]:
    """(weights in the plan's layers, weights of the model)."""
    packed = sum(linear_weight(model.get_submodule(name)).numel() for name in plan.keys() - tied(plan).keys())
    return packed, sum(p.numel() for p in model.parameters())


def model_notes(model: nn.Module, plan: Plan, untied: bool, rotated: bool) -> tuple[str, ...]:
    """What a user should know of a packed model: what is rotated, tied, untied, or stays dense."""
    notes = []
    if rotated:
        notes.append("the residual stream is rotated: embedding, norms and head differ from the original model's")
    inside, _ = find_blocks(model)
    shared = [name for name in tied(plan) if name.startswith(f"{inside}.")]
    if shared:
        notes.append(
            f"{and_others(shared)} share weights with earlier blocks: each is packed by what flows at its first place, "
            "stored and counted once"
        )
    for embedding, head in tied(plan).items():
        if embedding not in shared:
            notes.append(f"{embedding} and {head} stay one weight, packed as {head}, stored and counted once")
    if untied and not tied(plan):
        notes.append("the head was tied to the embedding; each is stored by itself now")
    fused = fused_expert_parameters(model)
    if unseen := [name for name in fused if not sees_text(name)]:
        fraction = 100 * sum(fused.pop(name) for name in unseen) / sum(p.numel() for p in model.parameters())
        notes.append(f"{and_others(unseen)} stay dense ({fraction:.0f}% of the weights): text does not reach them")
    if fused:
        fraction = 100 * sum(fused.values()) / sum(p.numel() for p in model.parameters())
        notes.append(
            f"{len(fused)} tensors of stacked experts ({fraction:.0f}% of the weights), {next(iter(fused))} among "
            "them, stay dense"
        )
    if left := [name for name in bypassed(model) if name.startswith(f"{inside}.")]:
        notes.append(f"{and_others(left)} stay dense: the model's own code multiplies by their weights")
    if note := _dense_ends(model, plan):
        notes.append(note)
    return (*notes, *_dense_towers(model, plan))


def and_others(names: Sequence[str]) -> str:
    """A few of some names."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} others" if len(names) > 2 else "")


def _dense_towers(model: nn.Module, plan: Plan) -> list[str]:
    """What stays dense beside the language model, such as a vision tower, with its share of the weights."""
    blocks, _ = find_blocks(model)
    path = blocks.split(".")
    around = {".".join(path[:depth]) for depth in range(len(path))}  # modules that the blocks are in
    found, whole = [], sum(p.numel() for p in model.parameters())
    for name, module in model.named_modules():
        if name in (*around, blocks, *ends(model)) or name.rpartition(".")[0] not in around:
            continue
        layers = {layer: one for layer, one in module.named_modules(prefix=name) if layer not in plan}
        weights = [p for one in layers.values() for p in one.parameters(recurse=False) if p.dim() > 1]
        count = sum(p.numel() for p in weights)
        if count >= FEW * whole and any(map(is_linear, layers.values())):
            found.append(
                f"{name} stays dense: {100 * count / whole:.0f}% of the weights; `include` '{name}*' packs its linear "
                f"layers at {TOWER_BITS} bits"
            )
    return found


def _dense_ends(model: nn.Module, plan: Plan) -> str:
    """What a dense head and embedding cost, where that is much of the model."""
    weights: dict[int, Tensor] = {}
    for name in ends(model):
        weight = None if name is None or name in plan else getattr(model.get_submodule(name), "weight", None)
        if isinstance(weight, Tensor):
            weights[id(weight)] = weight
    count = sum(weight.numel() for weight in weights.values())
    share = count / max(sum(p.numel() for p in model.parameters()), 1)
    if share < MANY:
        return ""
    return (
        f"head and embedding stay dense: {100 * share:.0f}% of the weights, {size(2 * count)} at 16 bits; "
        f"`head_bits` {HEAD_BITS} would make that {size(HEAD_BITS * count / 8)}"
    )
