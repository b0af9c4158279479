"""The walker: quantizes a model block by block, each block fed by the quantized prefix.

For every block, in order: gather the statistics of its linear layers' inputs, quantize the layers,
put the packed ones in their places, and run the block again so that the next one sees what it will
see at inference. Layers are taken in the order in which the block runs them, those that are fed by
the same tensor together (q, k, v; gate, up), so that each sees its own block's earlier layers
quantized and one Hessian serves all that share an input.

Two streams of activations may be carried: `quantized`, behind the layers quantized so far, and `full`,
of the untouched model, for quantizers that read both. Memory is one block plus the streams.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantkit.errors import CalibrationError, QuantkitError
from quantkit.linear import QuantizedLinear, new_linear
from quantkit.metrics import proxy_loss
from quantkit.model import find_blocks, linear_weight
from quantkit.plan import Plan, plan_needs
from quantkit.protocols import Needs, Quantizer
from quantkit.quantizers.target_shift import TargetShift
from quantkit.stats import LayerStats, StatsAccumulator
from quantkit.weight import QuantizedWeight

logger = logging.getLogger(__name__)

Wrap = Callable[[Tensor], Any]
"""Puts hidden states into the form in which a model's blocks return them."""


@dataclass(frozen=True)
class LayerResult:
    """A quantized layer and what it cost.

    Attributes:
        weight: the packed weight.
        relative_error: E(Q) / E(0) with E the proxy loss tr((W - Q) H (W - Q)^T) against the quantizer's
            target; with H = I where no statistics were gathered.
        damping: the damping with which the Hessian factored, or None.
    """

    weight: QuantizedWeight
    relative_error: float
    damping: float | None


class WeightSource(Protocol):
    """Where the weights of a model's modules come from: already there, or read from shards when needed."""

    def load(self, name: str, module: nn.Module, device: torch.device) -> None:
        """Makes the module's tensors real and moves them to `device`."""

    def release(self, name: str, module: nn.Module) -> None:
        """Ends the use that `load` began."""


class Sink(Protocol):
    """Where finished blocks go; also remembers the ones finished by an earlier, interrupted run."""

    def finished(self, index: int) -> dict[str, QuantizedWeight] | None:
        """The layers of block `index` if it is already done."""

    def write(self, index: int, name: str, layers: dict[str, LayerResult]) -> None:
        """Takes a finished block; index -1 stands for all that lies outside the blocks."""


@dataclass
class _Batch:
    """Sequences of equal length on their way through the blocks."""

    quantized: Tensor
    full: Tensor
    calls: list[tuple[tuple, dict[str, Any]]]  # per block: positional and keyword arguments behind the hidden states
    tokens: Tensor


@torch.no_grad()
def walk(
    model: nn.Module,
    plan: Plan,
    windows: Tensor | None,
    *,
    source: WeightSource,
    sink: Sink,
    device: torch.device,
    true_sequential: bool = True,
    batch_tokens: int = 8192,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> None:
    """Quantizes all layers of the plan and leaves packed layers in the model.

    Args:
        model: a causal language model; its weights may be on the meta device until `source` loads them.
        plan: quantizers by layer name.
        windows: calibration tokens, int64 [samples, seqlen]; None where the plan needs no statistics.
        source: loads and releases modules.
        sink: takes every finished block.
        device: where blocks run.
        true_sequential: let each layer see its own block's earlier layers quantized, at the price of a pass of the
            streams per group of layers instead of one per block.
        batch_tokens: tokens that run through a block together.
        progress: called with (blocks done, blocks in all, name of the block begun or "").

    Raises:
        CalibrationError: unusable statistics, with the layer's name.
    """
    prefix, blocks = find_blocks(model)
    needs = plan_needs(plan)
    batches: list[_Batch] = []
    wrap: Wrap = _bare
    if needs > Needs.NOTHING:
        if windows is None:
            raise CalibrationError("these quantizers read statistics of the layers' inputs; give calibration text")
        batches, wrap = _capture(model, blocks, windows, source, device, batch_tokens)
    groups: list[list[str]] | None = None
    for index, block in enumerate(blocks):
        name = f"{prefix}.{index}"
        progress(index, len(blocks), name)
        source.load(name, block, device)
        layers = {layer: quantizer for layer, quantizer in plan.items() if layer.startswith(f"{name}.")}
        reference = _shared_copy(block) if needs >= Needs.CROSS else None
        done = sink.finished(index)
        if done is None:
            results, groups = _quantize_block(
                block, reference, f"{name}.", layers, batches, index, true_sequential, groups
            )
            sink.write(index, name, results)
        else:
            for layer, weight in done.items():
                _swap(block, layer.removeprefix(f"{name}."), weight.map(lambda t: t.to(device)))
            _advance_full(reference, batches, index)
        for batch in batches:
            batch.quantized = _run(block, batch.quantized, batch.calls[index])
        del reference
        for module in block.modules():
            if isinstance(module, QuantizedLinear):
                module.release()
        source.release(name, block)
    outer = {layer: quantizer for layer, quantizer in plan.items() if not layer.startswith(f"{prefix}.")}
    sink.write(-1, "", _quantize_outer(model, blocks, outer, batches, wrap, source, device))
    progress(len(blocks), len(blocks), "")


def _quantize_block(
    block: nn.Module,
    reference: nn.Module | None,
    prefix: str,
    plan: Plan,
    batches: list[_Batch],
    index: int,
    true_sequential: bool,
    groups: list[list[str]] | None,
) -> tuple[dict[str, LayerResult], list[list[str]]]:
    """Quantizes one block's layers in the order of their execution, and moves the full stream past the block.

    `groups` are those of the block before, which are this block's too where it has the same layers.
    """
    local = {name.removeprefix(prefix): quantizer for name, quantizer in plan.items()}
    if groups is None or {name for group in groups for name in group} != set(local):
        groups = _input_groups(block, local, batches, index)
    stages = [[group] for group in groups] if true_sequential or not groups else [groups]
    results: dict[str, LayerResult] = {}
    for stage in stages:
        advance = stage is stages[-1] and reference is not None
        stats = _gather(block, reference, prefix, stage, local, batches, index, advance)
        for group in stage:
            for name in group:
                layer = block.get_submodule(name)
                results[prefix + name] = quantize_layer(layer, local[name], stats.get(group[0]), prefix + name)
        for group in stage:
            for name in group:
                _swap(block, name, results[prefix + name].weight)
    if not groups:
        _advance_full(reference, batches, index)
    return {name: results[name] for name in plan}, groups


def _advance_full(reference: nn.Module | None, batches: list[_Batch], index: int) -> None:
    """Moves the full stream past a block that gathers nothing."""
    if reference is not None:
        for batch in batches:
            batch.full = _run(reference, batch.full, batch.calls[index])


def _gather(
    block: nn.Module,
    reference: nn.Module | None,
    prefix: str,
    groups: list[list[str]],
    plan: Plan,
    batches: list[_Batch],
    index: int,
    advance: bool,
) -> dict[str, LayerStats]:
    """Statistics of each group's shared input, by the group's first layer; one pass of each stream.

    With `advance`, the full stream's pass runs to the block's end and its output becomes the next input.
    """
    needs = {group[0]: max(plan[name].needs for name in group) for group in groups}
    probes = [name for name, need in needs.items() if need > Needs.NOTHING]
    accumulators: dict[str, StatsAccumulator] = {}
    for batch in batches:
        call = batch.calls[index]
        full: dict[str, Tensor] = {}
        if reference is not None and (advance or any(need >= Needs.CROSS for need in needs.values())):
            full, output = _inputs_of(reference, probes, batch.full, call, to_the_end=advance)
            if output is not None:
                batch.full = output
        if probes:
            inputs, _ = _inputs_of(block, probes, batch.quantized, call, to_the_end=False)
            for name, x_q in inputs.items():
                x = full.get(name) if needs[name] >= Needs.CROSS else None
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
                f"{prefix}{name}: no calibration token reached this layer; leave it out (--ignore '*{name}') or use RTN"
            )
    return {name: accumulator.finish(prefix + name) for name, accumulator in accumulators.items()}


def quantize_layer(module: nn.Module, quantizer: Quantizer, stats: LayerStats | None, name: str) -> LayerResult:
    """Quantizes one linear layer and measures its error."""
    weight = linear_weight(module).detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise QuantkitError(f"{name}: the weight holds NaN or Inf; the checkpoint is damaged")
    target = weight
    if isinstance(quantizer, TargetShift) and stats is not None:
        target, quantizer = quantizer.target(weight, stats), quantizer.inner
    packed = quantizer.quantize(target, stats)
    error = target - packed.dequantize()
    if stats is None:
        relative = float(error.square().sum() / target.square().sum().clamp_min(1e-30))
    else:
        relative = proxy_loss(error, stats.hessian) / max(proxy_loss(target, stats.hessian), 1e-30)
    if stats is not None and stats.raised_damping is not None:
        logger.warning("%s: the Hessian factored only with damping raised to %g", name, stats.raised_damping)
    return LayerResult(packed, relative, None if stats is None else stats.damping)


def _quantize_outer(
    model: nn.Module,
    blocks: nn.ModuleList,
    plan: Plan,
    batches: list[_Batch],
    wrap: Wrap,
    source: WeightSource,
    device: torch.device,
) -> dict[str, LayerResult]:
    """Quantizes layers behind the blocks (lm_head): their inputs are the model's own forward with stubbed blocks."""
    results: dict[str, LayerResult] = {}
    if not plan:
        return results
    source.load("", model, device)
    for name, quantizer in plan.items():
        stats = None
        if quantizer.needs > Needs.NOTHING:
            accumulator = None
            for batch in batches:
                tokens = batch.tokens.to(device)
                x_q = _outer_input(model, blocks, name, tokens, batch.quantized, wrap)
                x = (
                    _outer_input(model, blocks, name, tokens, batch.full, wrap)
                    if quantizer.needs >= Needs.CROSS
                    else None
                )
                accumulator = accumulator or StatsAccumulator(x_q.shape[-1], x is not None, device)
                accumulator.add(x_q, x)
            assert accumulator is not None
            stats = accumulator.finish(name)
        results[name] = quantize_layer(model.get_submodule(name), quantizer, stats, name)
        model.set_submodule(name, new_linear(results[name].weight, model.get_submodule(name)))
    source.release("", model)
    return results


def _swap(root: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Puts the packed layer in place, its weight unpacked for as long as the calibration text runs through it."""
    replaced = root.get_submodule(name)
    linear = new_linear(weight, replaced)
    linear.hold(linear_weight(replaced).dtype)
    root.set_submodule(name, linear)


def _shared_copy(block: nn.Module) -> nn.Module:
    """A copy of the module tree over the same tensors, so that replacing layers in one leaves the other whole."""
    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, memo={id(tensor): tensor for tensor in tensors})


def _bare(hidden: Tensor) -> Tensor:
    return hidden


class _Reached(Exception):
    """Stops a forward pass once what it was run for is known."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.value = value


def _run(block: nn.Module, hidden: Tensor, call: tuple[tuple, dict[str, Any]]) -> Tensor:
    output = block(hidden, *call[0], **call[1])
    return output[0] if isinstance(output, tuple) else output


def _stop_with_input(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    raise _Reached(args[0] if args else next(iter(kwargs.values())))


def _inputs_of(
    block: nn.Module, layers: list[str], hidden: Tensor, call: tuple[tuple, dict[str, Any]], to_the_end: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Inputs of some layers, and the block's output where it is run to its end."""
    inputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs[name] = args[0] if args else next(iter(kwargs.values()))
            if not to_the_end and len(inputs) == len(layers):
                raise _Reached

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(record(name), with_kwargs=True) for name in layers]
    try:
        return inputs, _run(block, hidden, call)
    except _Reached:
        return inputs, None
    finally:
        for handle in handles:
            handle.remove()


def _input_groups(block: nn.Module, plan: Plan, batches: list[_Batch], index: int) -> list[list[str]]:
    """The plan's layers in order of execution, those fed by the same tensor together."""
    if not batches:
        return [[name] for name in plan]
    seen: list[tuple[Tensor, list[str]]] = []

    def record(name: str) -> Callable:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            for known, group in seen:
                if known is x:
                    group.append(name)
                    return
            seen.append((x, [name]))

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(record(name), with_kwargs=True) for name in plan]
    try:
        _run(block, batches[0].quantized, batches[0].calls[index])
    finally:
        for handle in handles:
            handle.remove()
    groups = [group for _, group in seen]
    reached = {name for group in groups for name in group}
    for name in plan:
        if name not in reached:
            groups.append([name])
    return groups


@contextmanager
def _patched_forwards(blocks: nn.ModuleList, forwards: list[Callable]) -> Iterator[None]:
    before = [block.__dict__.get("forward") for block in blocks]  # accelerate's hooks put one there
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:
                block.forward = own


def _stubs(blocks: nn.ModuleList, last: Callable[[Tensor], Any], calls: list, wrap: Wrap) -> list[Callable]:
    """Forwards that record their arguments and hand the hidden states on; the last one calls `last`."""

    def make(index: int) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            arguments = list(args)
            hidden = arguments.pop(0) if arguments else kwargs.pop("hidden_states")
            calls.append((index, hidden, tuple(arguments), kwargs))
            return last(hidden) if index == len(blocks) - 1 else wrap(hidden)

        return forward

    return [make(index) for index in range(len(blocks))]


def _capture(
    model: nn.Module,
    blocks: nn.ModuleList,
    windows: Tensor,
    source: WeightSource,
    device: torch.device,
    batch_tokens: int,
) -> tuple[list[_Batch], Wrap]:
    """Runs the model with stubbed blocks: the first block's inputs, and what else each block is called with."""
    rows = max(1, batch_tokens // windows.shape[1])
    source.load("", model, device)
    wrap = _output_form(model, blocks, windows[:1].to(device), source, device)
    batches: list[_Batch] = []
    for tokens in windows.split(rows):
        calls: list[tuple[int, Tensor, tuple, dict[str, Any]]] = []

        def stop(hidden: Tensor) -> Any:
            raise _Reached(hidden)

        with _patched_forwards(blocks, _stubs(blocks, stop, calls, wrap)):
            _forward_until_reached(model, tokens.to(device))
        if [index for index, *_ in calls] != list(range(len(blocks))):
            raise QuantkitError(f"{type(model).__name__} does not run its blocks once each and in order")
        hidden = calls[0][1]
        if not all(torch.equal(other, hidden) for _, other, *_ in calls):
            raise QuantkitError(f"{type(model).__name__} changes the hidden states between its blocks; not supported")
        arguments = [(args, kwargs) for _, _, args, kwargs in calls]
        if batches and _same(batches[0].calls, arguments):
            arguments = batches[0].calls
        batches.append(_Batch(hidden, hidden, arguments, tokens))
    source.release("", model)
    return batches, wrap


def _forward_until_reached(model: nn.Module, tokens: Tensor) -> Any:
    try:
        model(input_ids=tokens, use_cache=False)
    except _Reached as reached:
        return reached.value
    raise QuantkitError(f"the forward pass of {type(model).__name__} never reached its decoder blocks")


def _output_form(
    model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, source: WeightSource, device: torch.device
) -> Wrap:
    """How a block returns its hidden states: bare, or first in a tuple."""
    block, prefix = blocks[0], find_blocks(model)[0]
    source.load(f"{prefix}.0", block, device)
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise _Reached(original(*args, **kwargs))

    with _patched_forwards(nn.ModuleList([block]), [forward]):
        output = _forward_until_reached(model, tokens)
    source.release(f"{prefix}.0", block)
    if isinstance(output, tuple):
        rest = output[1:]
        return lambda hidden: (hidden, *rest)
    return _bare


def _outer_input(
    model: nn.Module, blocks: nn.ModuleList, layer: str, tokens: Tensor, hidden: Tensor, wrap: Wrap
) -> Tensor:
    """The input of a layer behind the blocks, given the last block's output."""
    handle = model.get_submodule(layer).register_forward_pre_hook(_stop_with_input, with_kwargs=True)
    try:
        with _patched_forwards(blocks, _stubs(blocks, lambda _: wrap(hidden), [], wrap)):
            return _forward_until_reached(model, tokens)
    finally:
        handle.remove()


def _same(left: Any, right: Any) -> bool:
    """Equality of nested arguments; tensors by value."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return False
    return bool(left == right)
