"""Running parts of a model: capturing what its blocks are called with, and the inputs of their layers.

Blocks are run on their own with the arguments that the model's own forward pass gave them, recorded once with
stubs in their places. A pass stops as soon as what it was run for is known.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantkit.errors import QuantkitError
from quantkit.model import find_blocks
from quantkit.plan import Plan

Wrap = Callable[[Tensor], Any]
"""Puts hidden states into the form in which a model's blocks return them."""


class WeightSource(Protocol):
    """Where the weights of a model's modules come from: already there, or read from shards when needed."""

    def load(self, name: str, module: nn.Module, device: torch.device) -> None:
        """Makes the module's tensors real and moves them to `device`."""

    def release(self, name: str, module: nn.Module) -> None:
        """Ends the use that `load` began."""


@dataclass
class Batch:
    """Sequences of equal length on their way through the blocks."""

    quantized: Tensor
    full: Tensor
    calls: list[tuple[tuple, dict[str, Any]]]  # per block: positional and keyword arguments behind the hidden states
    tokens: Tensor


def bare(hidden: Tensor) -> Tensor:
    """The `Wrap` of blocks that return nothing but the hidden states."""
    return hidden


class _Reached(Exception):
    """Stops a forward pass once what it was run for is known."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.value = value


def run_block(block: nn.Module, hidden: Tensor, call: tuple[tuple, dict[str, Any]]) -> Tensor:
    """A block's output hidden states for its input hidden states and recorded arguments."""
    output = block(hidden, *call[0], **call[1])
    return output[0] if isinstance(output, tuple) else output


def _stop_with_input(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    raise _Reached(args[0] if args else next(iter(kwargs.values())))


def inputs_of(
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
        return inputs, run_block(block, hidden, call)
    except _Reached:
        return inputs, None
    finally:
        for handle in handles:
            handle.remove()


def input_groups(block: nn.Module, plan: Plan, batches: list[Batch], index: int) -> list[list[str]]:
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
        run_block(block, batches[0].quantized, batches[0].calls[index])
    finally:
        for handle in handles:
            handle.remove()
    groups = [group for _, group in seen]
    reached = {name for group in groups for name in group}
    for name in plan:
        if name not in reached:
            groups.append([name])
    return groups


class Replay:
    """Outputs of a block's children that cannot change any more, so that later passes need not compute them again.

    In a pass, a child whose planned layers are all settled is run once per batch and from then on answers with its
    former output: with true-sequential calibration, attention is not computed anew for every group of the MLP's layers.
    A child that is called more than once in a pass is left alone.

    Args:
        block: the block whose direct children are replayed.
        layers: names of the planned layers in the block.
        enabled: False replays nothing, and keeps no memory.
    """

    def __init__(self, block: nn.Module, layers: Iterable[str], enabled: bool) -> None:
        names = list(layers)
        members = {
            child: [name for name in names if name.startswith(f"{child}.")] for child, _ in block.named_children()
        }
        self._members = {child: inside for child, inside in members.items() if inside and enabled}
        self._block = block
        self._outputs: dict[tuple[str, int], Any] = {}
        self._repeated: set[str] = set()

    @contextmanager
    def running(self, batch: int, settled: Container[str], keep: bool) -> Iterator[None]:
        """A pass of one batch.

        Args:
            batch: the batch's number.
            settled: layers whose weights are final.
            keep: whether a later pass may want this one's outputs.
        """
        children = [
            child
            for child, inside in self._members.items()
            if child not in self._repeated and all(name in settled for name in inside)
        ]
        known = [child for child in children if (child, batch) in self._outputs]
        handles = [self._record(child, batch) for child in children if keep and child not in known]
        modules = nn.ModuleList([self._block.get_submodule(child) for child in known])
        outputs = [self._outputs[child, batch] for child in known]
        try:
            with patched_forwards(modules, [_answer(output) for output in outputs]):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, child: str, batch: int) -> Any:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            if (child, batch) in self._outputs:
                self._repeated.add(child)
            self._outputs[child, batch] = output

        return self._block.get_submodule(child).register_forward_hook(hook)


def _answer(output: Any) -> Callable:
    return lambda *_args, **_kwargs: output


@contextmanager
def patched_forwards(blocks: nn.ModuleList, forwards: list[Callable]) -> Iterator[None]:
    """Puts other functions in the places of modules' forwards for a while."""
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


def capture(
    model: nn.Module,
    blocks: nn.ModuleList,
    windows: Tensor,
    source: WeightSource,
    device: torch.device,
    batch_tokens: int,
) -> tuple[list[Batch], Wrap]:
    """Runs the model with stubbed blocks: the first block's inputs, and what else each block is called with."""
    rows = max(1, batch_tokens // windows.shape[1])
    source.load("", model, device)
    wrap = _output_form(model, blocks, windows[:1].to(device), source, device)
    batches: list[Batch] = []
    for tokens in windows.split(rows):
        calls: list[tuple[int, Tensor, tuple, dict[str, Any]]] = []

        def stop(hidden: Tensor) -> Any:
            raise _Reached(hidden)

        with patched_forwards(blocks, _stubs(blocks, stop, calls, wrap)):
            _forward_until_reached(model, tokens.to(device))
        if [index for index, *_ in calls] != list(range(len(blocks))):
            raise QuantkitError(f"{type(model).__name__} does not run its blocks once each and in order")
        hidden = calls[0][1]
        if not all(torch.equal(other, hidden) for _, other, *_ in calls):
            raise QuantkitError(f"{type(model).__name__} changes the hidden states between its blocks; not supported")
        arguments = [(args, kwargs) for _, _, args, kwargs in calls]
        if batches and _same(batches[0].calls, arguments):
            arguments = batches[0].calls
        batches.append(Batch(hidden, hidden, arguments, tokens))
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

    with patched_forwards(nn.ModuleList([block]), [forward]):
        output = _forward_until_reached(model, tokens)
    source.release(f"{prefix}.0", block)
    if isinstance(output, tuple):
        rest = output[1:]
        return lambda hidden: (hidden, *rest)
    return bare


def outer_input(
    model: nn.Module, blocks: nn.ModuleList, layer: str, tokens: Tensor, hidden: Tensor, wrap: Wrap
) -> Tensor:
    """The input of a layer behind the blocks, given the last block's output."""
    handle = model.get_submodule(layer).register_forward_pre_hook(_stop_with_input, with_kwargs=True)
    try:
        with patched_forwards(blocks, _stubs(blocks, lambda _: wrap(hidden), [], wrap)):
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
