"""The walker: quantizes a model block by block, each block fed by the quantized prefix.

For every block, in order: gather the statistics of its linear layers' inputs, quantize the layers,
put the packed ones in their places, and run the block again so that the next one sees what it will
see at inference. Layers are taken in the order in which the block runs them, those that are fed by
the same tensor together (q, k, v; gate, up), so that each sees its own block's earlier layers
quantized and one Hessian serves all that share an input.

Two streams of activations may be carried: `quantized`, behind the layers quantized so far, and `full`,
of the untouched model, for quantizers that read both. An input embedding that is packed by itself comes first, so that
the blocks see it; one that shares the head's weight comes with the head, last. Memory is one block plus the streams,
and a packed embedding.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from quantkit.core.device import free_memory
from quantkit.core.errors import CalibrationError, QuantkitError
from quantkit.core.metrics import proxy_loss
from quantkit.core.protocols import LayerHook, Needs
from quantkit.core.result import LayerResult
from quantkit.core.stats import LayerStats, StatsAccumulator
from quantkit.core.weight import QuantizedWeight
from quantkit.models.embedding import put
from quantkit.models.forward import (
    Batch,
    Order,
    Replay,
    WeightSource,
    Wrap,
    bare,
    capture,
    execution_order,
    inputs_of,
    outer_input,
    run_block,
    settings,
)
from quantkit.models.linear import QuantizedLinear
from quantkit.models.plan import Plan, Tied, tied
from quantkit.models.structure import find_blocks, is_lookup, linear_weight
from quantkit.quantizers.target_shift import aimed

logger = logging.getLogger(__name__)

REPLAY_SHARE = 1 / 8
"""Share of the free memory in which each stream may keep what a block need not compute again."""


class Tuner(Protocol):
    """Improves a block once its layers are packed."""

    @property
    def batch_tokens(self) -> int:
        """Tokens that run through a block together."""

    def __call__(
        self,
        block: nn.Module,
        names: list[str],
        batches: list[Batch],
        index: int,
        progress: Callable[[int, int], None],
    ) -> tuple[float, float]:
        """See `tuning.block.BlockTuning`."""


class Sink(Protocol):
    """Where finished blocks go; also remembers the ones finished by an earlier, interrupted run."""

    def finished(self, index: int) -> dict[str, QuantizedWeight] | None:
        """The layers of block `index` if it is already done."""

    def write(self, index: int, name: str, layers: dict[str, LayerResult]) -> None:
        """Takes a finished block; index -1 stands for all that lies outside the blocks."""


@torch.no_grad()
def walk(
    model: nn.Module,
    plan: Plan,
    windows: Tensor | None,
    *,
    source: WeightSource,
    sink: Sink,
    device: torch.device,
    on_layer: LayerHook | None = None,
    true_sequential: bool = True,
    tuner: Tuner | None = None,
    lookups_first: bool = True,
    batch_tokens: int = 8192,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> None:
    """Quantizes all layers of the plan and leaves packed layers in the model.

    Args:
        model: a causal language model; its weights may be on the meta device until `source` loads them.
        plan: quantizers by layer name.
        windows: calibration tokens, int64 [samples, seqlen]; None where no layer needs statistics.
        source: loads and releases modules.
        sink: takes every finished block.
        device: where blocks run.
        on_layer: packs each layer of the plan; None for `Pack`, which does as the plan says.
        true_sequential: let each layer see its own block's earlier layers quantized, at the price of a pass of the
            streams per group of layers instead of one per block.
        tuner: improves every block that has packed layers; None for none.
        lookups_first: let the blocks see the packed embedding.
        batch_tokens: tokens that run through a block together.
        progress: called with (blocks done, blocks in all, name of the block begun or "").

    Raises:
        CalibrationError: unusable statistics, with the layer's name.
    """
    prefix, blocks = find_blocks(model)
    hook = Pack(plan) if on_layer is None else on_layer
    needs = max((hook.needs(layer) for layer in plan if layer not in tied(plan)), default=Needs.NOTHING)
    batches: list[Batch] = []
    wrap: Wrap = bare
    outer = {layer: quantizer for layer, quantizer in plan.items() if not layer.startswith(f"{prefix}.")}
    front = {
        layer: quantizer for layer, quantizer in outer.items()
        if lookups_first and layer not in tied(plan) and is_lookup(model.get_submodule(layer))
    }  # fmt: skip
    if needs > Needs.NOTHING or tuner is not None:
        if windows is None:
            raise CalibrationError("this run reads what flows through the layers; give calibration text")
        size = batch_tokens if tuner is None else min(batch_tokens, tuner.batch_tokens)
        batches, wrap = capture(model, blocks, windows, source, device, size)
    for layer in front:
        progress(0, len(blocks), layer)
    found = _quantize_outer(model, blocks, front, hook, batches, wrap, source, device)
    if front and batches and windows is not None:
        for batch, behind in zip(batches, capture(model, blocks, windows, source, device, size)[0], strict=True):
            batch.quantized = behind.quantized
    order: Order | None = None
    before: list[tuple] = []
    for index, block in enumerate(blocks):
        name = f"{prefix}.{index}"
        progress(index, len(blocks), name)
        source.load(name, block, device)
        layers = [layer for layer in plan if layer.startswith(f"{name}.")]
        reference = _shared_copy(block) if needs >= Needs.CROSS or tuner is not None else None
        done = sink.finished(index)
        if done is None:
            order, before = order if settings(block) == before else None, settings(block)
            tune = None
            if tuner is not None:
                told = partial(_tell, progress, index, len(blocks), name)
                tune = partial(tuner, block, batches=batches, index=index, progress=told)
            results, order = _quantize_block(
                block, reference, f"{name}.", layers, hook, batches, index, true_sequential, order, tune
            )
            sink.write(index, name, results)
        else:
            for layer, weight in done.items():
                _swap(block, layer.removeprefix(f"{name}."), weight.map(lambda t: t.to(device)))
            for batch in batches:
                batch.quantized = run_block(block, batch.quantized, batch.calls[index])
            _advance_full(reference, batches, index)
        del reference
        for module in block.modules():
            if isinstance(module, QuantizedLinear):
                module.release()
        source.release(name, block)
    rest = {layer: quantizer for layer, quantizer in outer.items() if layer not in front}
    sink.write(-1, "", found | _quantize_outer(model, blocks, rest, hook, batches, wrap, source, device))
    progress(len(blocks), len(blocks), "")


def _tell(progress: Callable[[int, int, str], None], index: int, blocks: int, name: str, step: int, steps: int) -> None:
    progress(index, blocks, f"{name}, tuning {step}/{steps}")


def _quantize_block(
    block: nn.Module,
    reference: nn.Module | None,
    prefix: str,
    layers: list[str],
    hook: LayerHook,
    batches: list[Batch],
    index: int,
    true_sequential: bool,
    order: Order | None,
    tune: Callable[[list[str]], tuple[float, float]] | None,
) -> tuple[dict[str, LayerResult], Order]:
    """Quantizes one block's layers in the order of their execution, and moves both streams past the block.

    `order` is that of the block before, which is this block's too where it has the same layers. `tune` improves the
    named layers once all are packed, while the streams still stand before (quantized) and behind (full) the block.
    """
    local = {name.removeprefix(prefix): hook.needs(name) for name in layers}
    if order is None or {name for group in order.groups for name in group} != set(local):
        order = execution_order(block, local, batches, index)
    stages = [[group] for group in order.groups] if true_sequential or not order.groups else [order.groups]
    results: dict[str, LayerResult] = {}
    budget = int(REPLAY_SHARE * free_memory(batches[0].quantized.device)) if batches and len(stages) > 1 else 0
    quantized = _Stream(block, Replay(block, local, order, budget), set())
    full = None
    if reference is not None:
        full = _Stream(reference, Replay(reference, local, order, budget), set(local))
    for stage in stages:
        advance = stage is stages[-1]
        stats = _gather(quantized, full, prefix, stage, local, batches, index, advance)
        for group in stage:
            for name in group:
                layer = block.get_submodule(name)
                results[prefix + name] = _packed(hook, layer, stats.get(group[0]), prefix + name)
        for group in stage:
            for name in group:
                _swap(block, name, results[prefix + name].weight)
                quantized.settled.add(name)
    if not order.groups:
        _advance_full(reference, batches, index)
    if tune is not None and results:
        quantized.replay.clear()  # its outputs are of layers that are about to change
        losses = tune([*local])
        for name in local:
            linear = block.get_submodule(name)
            assert isinstance(linear, QuantizedLinear)
            results[prefix + name] = replace(results[prefix + name], weight=linear.packed, tuned=losses)
    for number, batch in enumerate(batches):
        with quantized.replay.running(number, quantized.settled, keep=False):
            batch.quantized = run_block(block, batch.quantized, batch.calls[index])
    return {name: results[name] for name in layers}, order


@dataclass
class _Stream:
    """A block as one of the streams runs it.

    Attributes:
        block: the module.
        replay: its children's outputs that can be used again.
        settled: planned layers whose weights in this stream are final.
    """

    block: nn.Module
    replay: Replay
    settled: set[str]


def _advance_full(reference: nn.Module | None, batches: list[Batch], index: int) -> None:
    """Moves the full stream past a block that gathers nothing."""
    if reference is not None:
        for batch in batches:
            batch.full = run_block(reference, batch.full, batch.calls[index])


def _gather(
    quantized: _Stream,
    full: _Stream | None,
    prefix: str,
    groups: list[list[str]],
    needed: dict[str, Needs],
    batches: list[Batch],
    index: int,
    advance: bool,
) -> dict[str, LayerStats]:
    """Statistics of each group's shared input, by the group's first layer; one pass of each stream.

    With `advance`, the full stream's pass runs to the block's end and its output becomes the next input.
    """
    needs = {group[0]: max(needed[name] for name in group) for group in groups}
    probes = [name for name, need in needs.items() if need > Needs.NOTHING]
    accumulators: dict[str, StatsAccumulator] = {}
    for number, batch in enumerate(batches):
        call = batch.calls[index]
        wanted: dict[str, Tensor] = {}
        if full is not None and (advance or any(need >= Needs.CROSS for need in needs.values())):
            with full.replay.running(number, full.settled, keep=not advance):
                wanted, output = inputs_of(full.block, probes, batch.full, call, to_the_end=advance)
            full.replay.reached(number, wanted)
            if output is not None:
                batch.full = output
        if probes:
            with quantized.replay.running(number, quantized.settled, keep=True):
                inputs, _ = inputs_of(quantized.block, probes, batch.quantized, call, to_the_end=False)
            quantized.replay.reached(number, inputs)
            for name, x_q in inputs.items():
                x = wanted.get(name) if needs[name] >= Needs.CROSS else None
                if needs[name] >= Needs.CROSS and (x is None or x.shape != x_q.shape):
                    raise CalibrationError(
                        f"{prefix}{name}: the two streams send different tokens through this layer (a routed expert?); "
                        "use a target shift of 0"
                    )
                if name not in accumulators:
                    accumulators[name] = StatsAccumulator(x_q.shape[-1], x is not None, x_q.device)
                accumulators[name].add(x_q, x)
    for name in probes:
        if name not in accumulators:
            raise CalibrationError(
                f"{prefix}{name}: no calibration token reached this layer; leave it out (`ignore` '*{name}') or use RTN"
            )
    return {name: accumulator.finish(prefix + name) for name, accumulator in accumulators.items()}


@dataclass(frozen=True)
class Pack:
    """The hook of an ordinary run: every layer by its quantizer of the plan.

    Attributes:
        plan: quantizers by layer name.
    """

    plan: Plan

    def needs(self, name: str) -> Needs:
        """What the layer's quantizer reads."""
        return self.plan[name].needs

    def __call__(self, name: str, weight: Tensor, stats: LayerStats | None) -> LayerResult:
        """The packed layer, and its error against what its quantizer aims at."""
        quantizer = self.plan[name]
        assert not isinstance(quantizer, Tied)
        target, quantizer = aimed(quantizer, weight, stats)
        packed = quantizer.quantize(target, stats)
        return LayerResult(packed, relative_error(target, packed, stats), None if stats is None else stats.damping)


def _packed(hook: LayerHook, module: nn.Module, stats: LayerStats | None, name: str) -> LayerResult:
    weight = linear_weight(module).detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise QuantkitError(f"{name}: the weight holds NaN or Inf; the checkpoint is damaged")
    result = hook(name, weight, stats)
    if stats is not None and stats.raised_damping is not None:
        logger.warning("%s: the Hessian factored only with damping raised to %g", name, stats.raised_damping)
    return result


def relative_error(target: Tensor, packed: QuantizedWeight, stats: LayerStats | None) -> float:
    """E(Q) / E(0) with E the proxy loss; see `LayerResult`."""
    error = target - packed.dequantize()
    if stats is None:
        return float(error.square().sum() / target.square().sum().clamp_min(1e-30))
    return proxy_loss(error, stats.hessian) / max(proxy_loss(target, stats.hessian), 1e-30)


def _quantize_outer(
    model: nn.Module,
    blocks: nn.ModuleList,
    plan: Plan,
    hook: LayerHook,
    batches: list[Batch],
    wrap: Wrap,
    source: WeightSource,
    device: torch.device,
) -> dict[str, LayerResult]:
    """Quantizes layers outside the blocks; a head's inputs are those of the model's own forward with stubbed blocks."""
    results: dict[str, LayerResult] = {}
    if not plan:
        return results
    source.load("", model, device)
    sharing = tied(plan)
    for name in plan:
        if name in sharing:
            continue
        stats, needs = None, hook.needs(name)
        if needs > Needs.NOTHING:
            accumulator = None
            for batch in batches:
                tokens = batch.tokens.to(device)
                x_q = outer_input(model, blocks, name, tokens, batch.quantized, wrap)
                x = outer_input(model, blocks, name, tokens, batch.full, wrap) if needs >= Needs.CROSS else None
                accumulator = accumulator or StatsAccumulator(x_q.shape[-1], x is not None, device)
                accumulator.add(x_q, x)
            assert accumulator is not None
            stats = accumulator.finish(name)
        results[name] = _packed(hook, model.get_submodule(name), stats, name)
        put(model, name, results[name].weight)
    for name, head in sharing.items():
        layout = plan[name].layout(*results[head].weight.shape)
        results[name] = replace(results[head], weight=layout)
        put(model, name, layout)
    source.release("", model)
    return results


def _swap(root: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Puts the packed layer in place, its weight unpacked for as long as the calibration text runs through it."""
    dtype = linear_weight(root.get_submodule(name)).dtype
    linear = put(root, name, weight)
    assert isinstance(linear, QuantizedLinear)
    linear.hold(dtype)


def _shared_copy(block: nn.Module) -> nn.Module:
    """A copy of the module tree over the same tensors, so that replacing layers in one leaves the other whole."""
    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, memo={id(tensor): tensor for tensor in tensors})
