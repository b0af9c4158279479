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


@dataclass(frozen=True)
class Order:
    """How a block runs its planned layers.

    Attributes:
        groups: layers in order of execution, those fed by the same tensor together.
        tails: children of the block (attention, MLP) whose output is that of one of their planned layers, which is
            the last that they run: child -> (layer, the form in which the child returns it).
    """

    groups: list[list[str]]
    tails: dict[str, tuple[str, Wrap]]


def execution_order(block: nn.Module, plan: Plan, batches: list[Batch], index: int) -> Order:
    """Watches one batch run through the block."""
    if not batches:
        return Order([[name] for name in plan], {})
    inputs: list[tuple[Tensor, list[str]]] = []
    outputs: dict[str, Tensor] = {}
    returned: dict[str, list[Any]] = {child: [] for child, _ in block.named_children()}

    def enter(name: str) -> Callable:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            for known, group in inputs:
                if known is x:
                    group.append(name)
                    return
            inputs.append((x, [name]))

        return hook

    def leave(name: str) -> Callable:
        return lambda _module, _args, output: outputs.__setitem__(name, output)

    def leave_child(child: str) -> Callable:
        return lambda _module, _args, output: returned[child].append(output)

    layers = [(name, block.get_submodule(name)) for name in plan]
    handles = [layer.register_forward_pre_hook(enter(name), with_kwargs=True) for name, layer in layers]
    handles += [layer.register_forward_hook(leave(name)) for name, layer in layers]
    handles += [module.register_forward_hook(leave_child(child)) for child, module in block.named_children()]
    try:
        run_block(block, batches[0].quantized, batches[0].calls[index])
    finally:
        for handle in handles:
            handle.remove()
    groups = [group for _, group in inputs]
    reached = {name for group in groups for name in group}
    groups += [[name] for name in plan if name not in reached]
    tails = {}
    for child, runs in returned.items():
        last = [inside for group in groups if (inside := [name for name in group if name.startswith(f"{child}.")])][-1:]
        for name in last[0] if last and len(runs) == 1 else []:
            if name in outputs and (form := _form(runs[0], outputs[name])) is not None:
                tails[child] = (name, form)
    return Order(groups, tails)


def _form(returned: Any, output: Tensor) -> Wrap | None:
    """How `returned` holds the very tensor `output`: bare, or first in a tuple of nothing else; None if it does not."""
    if returned is output:
        return bare
    if isinstance(returned, tuple) and returned[0] is output and all(rest is None for rest in returned[1:]):
        return lambda tensor: (tensor, *returned[1:])
    return None


class Replay:
    """What later passes through a block need not compute again, so that each part of it runs once per batch.

    True-sequential calibration stops a pass at the next layer whose input it wants. The pass after that begins
    again, but answers for a child whose layers are all final with the child's former output; and a child that ends
    in a layer whose input is known already runs that layer alone. A child that is called more than once in a pass
    is left alone.

    Args:
        block: the block whose direct children are replayed.
        layers: names of the planned layers in the block.
        tails: see `Order`.
        enabled: False replays nothing, and keeps no memory.
    """

    def __init__(
        self, block: nn.Module, layers: Iterable[str], tails: dict[str, tuple[str, Wrap]], enabled: bool
    ) -> None:
        names = list(layers)
        members = {
            child: [name for name in names if name.startswith(f"{child}.")] for child, _ in block.named_children()
        }
        self._members = {child: inside for child, inside in members.items() if inside and enabled}
        self._block = block
        self._tails = tails if enabled else {}
        self._inputs: dict[tuple[str, int], Tensor] = {}
        self._outputs: dict[tuple[str, int], Any] = {}
        self._repeated: set[str] = set()

    def reached(self, batch: int, inputs: dict[str, Tensor]) -> None:
        """Takes the inputs at which a pass stopped; all that lies before them is final."""
        self._inputs |= {(name, batch): inputs[name] for name, _ in self._tails.values() if name in inputs}

    @contextmanager
    def running(self, batch: int, settled: Container[str], keep: bool) -> Iterator[None]:
        """A pass of one batch.

        Args:
            batch: the batch's number.
            settled: layers whose weights are final.
            keep: whether a later pass may want this one's outputs.
        """
        answers: dict[str, Callable] = {}
        final = []
        for child, inside in self._members.items():
            if child in self._repeated:
                continue
            if (child, batch) in self._outputs:
                answers[child] = _answer(self._outputs[child, batch])
                continue
            if child in self._tails and (self._tails[child][0], batch) in self._inputs:
                name, form = self._tails[child]
                answers[child] = _run_tail(self._block.get_submodule(name), self._inputs.pop((name, batch)), form)
            if all(name in settled for name in inside):
                final.append(child)
        handles = [self._record(child, batch) for child in final if keep]
        modules = nn.ModuleList([self._block.get_submodule(child) for child in answers])
        try:
            with patched_forwards(modules, list(answers.values())):
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


def _run_tail(layer: nn.Module, x: Tensor, form: Wrap) -> Callable:
    return lambda *_args, **_kwargs: form(layer(x))


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
