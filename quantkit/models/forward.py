"""Running parts of a model: capturing what its blocks are called with, and the inputs of their layers.

Blocks are run on their own with the arguments that the model's own forward pass gave them, recorded once with
stubs in their places. A pass stops as soon as what it was run for is known.
"""

from collections.abc import Callable, Collection, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantkit.core.errors import QuantkitError
from quantkit.models.structure import find_blocks

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
    """Sequences of equal length on their way through the blocks.

    Attributes:
        quantized: hidden states behind the quantized prefix, [sequences, tokens, hidden_size].
        full: hidden states of the full-precision model, of the same shape.
        calls: for each block, positional and keyword arguments behind the hidden states.
        tokens: int64 [sequences, tokens].
    """

    quantized: Tensor
    full: Tensor
    calls: list[tuple[tuple, dict[str, Any]]]
    tokens: Tensor


def bare(hidden: Tensor) -> Tensor:
    """The `Wrap` of blocks that return nothing but the hidden states [sequences, tokens, hidden_size]."""
    return hidden


class _Reached(Exception):
    """Stops a forward pass once what it was run for is known."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.value = value


def run_block(block: nn.Module, hidden: Tensor, call: tuple[tuple, dict[str, Any]]) -> Tensor:
    """A block's output for its input, both [sequences, tokens, hidden_size], and recorded arguments."""
    output = block(hidden, *call[0], **call[1])
    return output[0] if isinstance(output, tuple) else output


def _stop_with_input(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    raise _Reached(args[0] if args else next(iter(kwargs.values())))


def inputs_of(
    block: nn.Module, layers: list[str], hidden: Tensor, call: tuple[tuple, dict[str, Any]], to_the_end: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Inputs of some layers of a block, and the block's output.

    Args:
        block: run with hooks on these layers.
        layers: names in the block.
        hidden: [sequences, tokens, hidden_size].
        call: the block's other arguments.
        to_the_end: run the block to its end; otherwise only until all inputs are known.

    Returns:
        (inputs [..., in_features] by layer, the output like `hidden`, or None where the pass was stopped).
    """
    inputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable:
        """A hook that keeps the input of a layer, and ends the pass where the last of them has come."""

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
        groups: layers in order of their first call, those fed by the same tensor together.
        steady: children of the block (attention, MLP) that are called once and whose output nobody changes, so that
            it can stand for a later call.
        tails: those of them whose output is that of one of their planned layers, which is called once and after the
            others: child -> (layer, the form in which the child returns it).
    """

    groups: list[list[str]]
    steady: frozenset[str] = frozenset()
    tails: dict[str, tuple[str, Wrap]] = field(default_factory=dict)


def execution_order(block: nn.Module, layers: Collection[str], batches: list[Batch], index: int) -> Order:
    """How a block runs its planned layers, from watching one batch run through it.

    Args:
        block: the block.
        layers: names of the planned layers in it.
        batches: of which the first runs; without any, each layer is a group of its own.
        index: of the block among the model's.
    """
    if not batches:
        return Order([[name] for name in layers])
    groups: list[tuple[Tensor, list[str]]] = []
    outputs: dict[str, list[tuple[Any, list[object]]]] = {}  # of layers and of children, with the tensors' versions

    def enter(name: str) -> Callable:
        """A hook that puts a layer beside those that have the same tensor for input, in the order of first calls."""

        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if any(name in group for _, group in groups):
                return
            for known, group in groups:
                if known is x:
                    group.append(name)
                    return
            groups.append((x, [name]))

        return hook

    def leave(name: str) -> Callable:
        return lambda _module, _args, output: outputs.setdefault(name, []).append((output, _versions(output)))

    children = {name: child for name, child in block.named_children() if not child._forward_hooks}
    handles = [block.get_submodule(name).register_forward_pre_hook(enter(name), with_kwargs=True) for name in layers]
    handles += [block.get_submodule(name).register_forward_hook(leave(name)) for name in {*layers, *children}]
    try:
        with torch.inference_mode(False), torch.no_grad():  # versions are counted
            run_block(block, batches[0].quantized, batches[0].calls[index])
    finally:
        for handle in handles:
            handle.remove()
    steady = frozenset(
        child for child in children
        if len(outputs.get(child, [])) == 1 and _versions(outputs[child][0][0]) == outputs[child][0][1]
    )  # fmt: skip
    ordered = [group for _, group in groups]
    tails = {}
    for child in steady:
        last = [inside for group in ordered if (inside := [n for n in group if n.startswith(f"{child}.")])][-1:]
        for name in last[0] if last else []:
            form = _form(outputs[child][0], outputs[name][0]) if len(outputs.get(name, [])) == 1 else None
            if form is not None:
                tails[child] = (name, form)
    reached = {name for group in ordered for name in group}
    return Order(ordered + [[name] for name in layers if name not in reached], steady, tails)


def settings(block: nn.Module) -> list[tuple]:
    """What the code of a block's modules can depend on, but for their place in the model: equal blocks run alike."""
    simple = (bool, int, float, str, type(None))
    return [
        (
            name,
            type(module).__qualname__,
            bool(module._forward_hooks or module._forward_pre_hooks),
            sorted((k, v) for k, v in vars(module).items() if isinstance(v, simple) and k not in _PLACES),
        )
        for name, module in block.named_modules()
        if not isinstance(module, nn.Linear)
    ]


_PLACES = {"layer_idx", "layer_id", "layer_number", "block_idx", "training"}


def _tensors(output: Any) -> list[Tensor]:
    """The tensors that a module returned, alone or in a tuple."""
    return [part for part in (output if isinstance(output, tuple | list) else (output,)) if isinstance(part, Tensor)]


def _versions(output: Any) -> list[object]:
    """How often each returned tensor has been changed in place; equal to nothing where nobody counts."""
    return [object() if tensor.is_inference() else tensor._version for tensor in _tensors(output)]


def _form(returned: tuple[Any, list[object]], made: tuple[Any, list[object]]) -> Wrap | None:
    """How a child's return holds a layer's very output, unchanged: bare, or first in a tuple of nothing else."""
    output = made[0]
    if returned[1][:1] != made[1]:
        return None
    if returned[0] is output:
        return bare
    if isinstance(returned[0], tuple) and returned[0][0] is output and all(rest is None for rest in returned[0][1:]):
        rest = returned[0][1:]
        return lambda tensor: (tensor, *rest)
    return None


class Replay:
    """What later passes through a block need not compute again, so that each part of it runs once per batch.

    True-sequential calibration stops a pass at the next layer whose input it wants. The pass after that begins
    again, but answers for a steady child whose layers are all final with the child's former output; and a child that
    ends in a layer whose input is known already runs that layer alone. What does not fit the budget is computed anew.

    Args:
        block: the block whose direct children are replayed.
        layers: names of the planned layers in the block.
        order: how the block runs them.
        budget: bytes that may be kept.
    """

    def __init__(self, block: nn.Module, layers: Iterable[str], order: Order, budget: int) -> None:
        names = list(layers)
        members = {child: [name for name in names if name.startswith(f"{child}.")] for child in sorted(order.steady)}
        self._members = {child: inside for child, inside in members.items() if inside}
        self._block = block
        self._tails = order.tails
        self._budget = budget
        self._inputs: dict[tuple[str, int], Tensor] = {}
        self._outputs: dict[tuple[str, int], Any] = {}

    def clear(self) -> None:
        """Forgets everything: settled layers have changed after all."""
        self._budget += sum(tensor.nbytes for kept in self._inputs.values() for tensor in _tensors(kept))
        self._budget += sum(tensor.nbytes for kept in self._outputs.values() for tensor in _tensors(kept))
        self._inputs.clear()
        self._outputs.clear()

    def reached(self, batch: int, inputs: dict[str, Tensor]) -> None:
        """Takes the inputs [..., in_features] at which a pass stopped; all that lies before them is final."""
        for name, _ in self._tails.values():
            if name in inputs and self._fits(inputs[name]):
                self._inputs[name, batch] = inputs[name]

    @contextmanager
    def running(self, batch: int, settled: Container[str], keep: bool) -> Iterator[None]:
        """Context of the pass of one batch through the block.

        Args:
            batch: index of the batch.
            settled: layers whose weights are final.
            keep: whether a later pass may want this one's outputs.
        """
        answers: dict[str, Callable] = {}
        handles = []
        for child, inside in self._members.items():
            if (child, batch) in self._outputs:
                answers[child] = _answer(self._outputs[child, batch])
                continue
            name, form = self._tails.get(child, ("", bare))
            if (name, batch) in self._inputs:
                x = self._inputs.pop((name, batch))
                self._budget += x.nbytes
                answers[child] = _run_tail(self._block.get_submodule(name), x, form)
            if keep and all(name in settled for name in inside):
                handles.append(self._record(child, batch))
        modules = nn.ModuleList([self._block.get_submodule(child) for child in answers])
        try:
            with patched_forwards(modules, list(answers.values())):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _fits(self, output: Any) -> bool:
        size = sum(tensor.nbytes for tensor in _tensors(output))
        if size > self._budget:
            return False
        self._budget -= size
        return True

    def _record(self, child: str, batch: int) -> Any:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            if self._fits(output):
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
        """A stand-in for a block: notes what it is called with, and hands its input on."""

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
    sequences: Tensor,
    source: WeightSource,
    device: torch.device,
    batch_tokens: int,
    wrap: Wrap | None = None,
) -> tuple[list[Batch], Wrap]:
    """The first block's inputs and what else each block is called with, from running the model with stubbed blocks.

    Args:
        model: any decoder.
        blocks: of the model.
        sequences: int64 [sequences, tokens].
        source: of the weights in front of the blocks, and of the first block's.
        device: where the model runs.
        batch_tokens: tokens of a batch, at most, unless a sequence alone has more.
        wrap: the form in which blocks return hidden states, where it is known; else the first block tells it.

    Returns:
        (batches, the form in which blocks return hidden states).

    Raises:
        QuantkitError: the model does not run its blocks once each, in order and one on the other's output.
    """
    rows = max(1, batch_tokens // sequences.shape[1])
    source.load("", model, device)
    wrap = wrap or _output_form(model, blocks, sequences[:1].to(device), source, device)
    batches: list[Batch] = []
    for tokens in sequences.split(rows):
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
    """The input of a layer behind the blocks, [sequences, tokens, in_features].

    Args:
        model: any decoder.
        blocks: of the model; they do not run.
        layer: name in the model.
        tokens: int64 [sequences, tokens].
        hidden: the last block's output, [sequences, tokens, hidden_size].
        wrap: the form in which blocks return it.

    Raises:
        QuantkitError: the pass does not reach the layer.
    """
    handle = model.get_submodule(layer).register_forward_pre_hook(_stop_with_input, with_kwargs=True)
    try:
        with patched_forwards(blocks, _stubs(blocks, lambda _: wrap(hidden), [], wrap)):
            return _forward_until_reached(model, tokens)
    finally:
        handle.remove()


def head_logits(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, hidden: Tensor, wrap: Wrap) -> Tensor:
    """The model's logits [sequences, tokens, vocabulary] behind given hidden states.

    Args:
        model: any decoder.
        blocks: of the model; they do not run.
        tokens: int64 [sequences, tokens].
        hidden: the last block's output, [sequences, tokens, hidden_size].
        wrap: the form in which blocks return it.
    """
    with patched_forwards(blocks, _stubs(blocks, lambda _: wrap(hidden), [], wrap)):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits


def logits_of(
    model: nn.Module, blocks: nn.ModuleList, head: nn.Module, device: torch.device, product: Callable[[], Tensor]
) -> Tensor:
    """What a model makes of its head's outputs, soft caps and scales included, [sequences, tokens, vocabulary].

    Args:
        model: any decoder; what lies in front of its head runs on a single token, and nobody looks at that.
        blocks: of the model; they do not run.
        head: the module of the model that gives logits; it does not run either.
        device: where all but the blocks is.
        product: gives the head's outputs instead, of the returned shape.
    """
    stubs = _stubs(blocks, bare, [], bare)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with patched_forwards(nn.ModuleList([*blocks, head]), [*stubs, lambda *_args, **_kwargs: product()]):
        logits: Tensor = model(input_ids=token, use_cache=False).logits
    return logits


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
