"""Running parts of a model: capturing what its blocks are called with, and the inputs of their layers.

Blocks are run on their own with the arguments that the model's own forward pass gave them, recorded once with
stubs in their places. A pass stops as soon as what it was run for is known.
"""

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantkit.core.errors import QuantkitError
from quantkit.models.experts import is_apart, place
from quantkit.models.structure import find_blocks

BATCH_TOKENS = 8192
"""Tokens that run through a block together."""
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
        quantized: hidden states behind the quantized prefix, [sequences, tokens, ..., hidden_size].
        full: hidden states of the full-precision model, of the same shape.
        calls: for each block, positional and keyword arguments behind the hidden states.
        tokens: int64 [sequences, tokens].
        full_calls: those of the full stream; None for the same. What a block leaves there for later ones, as layers do
            that share keys and values, is each stream's own.
        axis: of the sequences in the hidden states that the model's blocks take.
    """

    quantized: Tensor
    full: Tensor
    calls: list["Call"]
    tokens: Tensor
    full_calls: list["Call"] | None = None
    axis: int = 0

    def call(self, index: int, full: bool = False) -> tuple[tuple, dict[str, Any], int]:
        """What a block is called with, in one of the streams, and the axis of the sequences there; see `run_block`."""
        return *((self.full_calls or self.calls)[index] if full else self.calls[index]), self.axis


Call = tuple[tuple, dict[str, Any]]
"""Positional and keyword arguments behind the hidden states."""


def bare(hidden: Tensor) -> Tensor:
    """The `Wrap` of blocks that return nothing but the hidden states [sequences, tokens, hidden_size]."""
    return hidden


class _Reached(Exception):
    """Stops a forward pass once what it was run for is known."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.value = value


def run_block(block: nn.Module, hidden: Tensor, call: tuple[tuple, dict[str, Any], int]) -> Tensor:
    """A block's output for its input, both [sequences, tokens, ..., hidden_size], and what it is called with."""
    args, kwargs, axis = call
    output = block(_as_blocks_take(hidden, axis), *args, **kwargs)
    return _by_sequence(output[0] if isinstance(output, tuple | list) else output, axis)


def _axis(hidden: Tensor, tokens: Tensor) -> int:
    """Of the sequences in a block's input: Gemma 3n stacks several versions of its hidden states in front of them."""
    axes = range(hidden.dim() - 1)
    return next((axis for axis in axes if hidden.shape[axis : axis + 2] == tokens.shape), 0)


def _by_sequence(hidden: Tensor, axis: int) -> Tensor:
    return hidden.movedim((axis, axis + 1), (0, 1)) if axis else hidden


def _as_blocks_take(hidden: Tensor, axis: int) -> Tensor:
    return hidden.movedim((0, 1), (axis, axis + 1)) if axis else hidden


def _stop_with_input(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    raise _Reached(args[0] if args else next(iter(kwargs.values())))


def inputs_of(
    block: nn.Module, layers: list[str], hidden: Tensor, call: tuple[tuple, dict[str, Any], int], to_the_end: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Inputs of some layers of a block, and the block's output.

    Args:
        block: run with hooks on these layers.
        layers: names in the block.
        hidden: [sequences, tokens, hidden_size].
        call: the block's other arguments.
        to_the_end: run the block to its end; otherwise only until all inputs are known.

    Returns:
        (inputs [..., in_features] by layer, but of experts that no token chose; the output like `hidden`, or None where
        the pass was stopped).
    """
    inputs: dict[str, Tensor] = {}
    experts = {found[0] for found in map(place, layers) if found is not None}
    experts = {
        name for name in experts if is_apart(block.get_submodule(name))
    }  # others give no sign when they are done
    waiting = {name for name in layers if (found := place(name)) is None or found[0] not in experts} | experts

    def reached(name: str) -> None:
        waiting.discard(name)
        if not waiting and not to_the_end:
            raise _Reached

    def record(name: str) -> Callable:
        """A hook that keeps the input of a layer, and ends the pass where the last of them has come."""

        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs[name] = args[0] if args else next(iter(kwargs.values()))
            reached(name)

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(record(name), with_kwargs=True) for name in layers]
    handles += [
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: reached(name)) for name in experts
    ]
    try:
        return inputs, run_block(block, hidden, call)
    except _Reached:
        return inputs, None
    finally:
        for handle in handles:
            handle.remove()


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


def _stubs(
    blocks: nn.ModuleList, last: Callable[[Tensor], Any], calls: list, wrap: Wrap, tokens: Tensor | None
) -> list[Callable]:
    """Forwards that record their arguments and hand the hidden states on; the last one calls `last`.

    Hidden states are recorded and handed on as [sequences, tokens, ...] where it is known of which `tokens` they are.
    """

    def make(index: int) -> Callable:
        """A stand-in for a block: notes what it is called with, and hands its input on."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            arguments = list(args)
            taken = arguments.pop(0) if arguments else kwargs.pop("hidden_states")
            axis = 0 if tokens is None else _axis(taken, tokens)
            hidden = _by_sequence(taken, axis)
            calls.append((index, hidden, tuple(arguments), kwargs, axis))
            return last(hidden) if index == len(blocks) - 1 else wrap(hidden)

        return forward

    return [make(index) for index in range(len(blocks))]


def divided(sequences: Tensor, batch_tokens: int) -> tuple[Tensor, ...]:
    """Sequences int64 [sequences, tokens] in batches of at most so many tokens, unless a sequence alone has more."""
    return sequences.split(max(1, batch_tokens // sequences.shape[1]))


def capture(
    model: nn.Module,
    blocks: nn.ModuleList,
    sequences: Tensor,
    source: WeightSource,
    device: torch.device,
    batch_tokens: int,
    wrap: Wrap | None = None,
    only: slice = slice(None),
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
        only: of the batches, those that are wanted.

    Returns:
        (batches, the form in which blocks return hidden states).

    Raises:
        QuantkitError: the model does not run its blocks once each, in order and one on the other's output, or draws
            random numbers, as models do that write text by diffusion.
    """
    source.load("", model, device)
    wrap = wrap or _output_form(model, blocks, sequences[:1].to(device), source, device)
    batches: list[Batch] = []
    for tokens in divided(sequences, batch_tokens)[only]:
        calls: list[tuple[int, Tensor, tuple, dict[str, Any], int]] = []

        def stop(hidden: Tensor) -> Any:
            raise _Reached(hidden)

        with patched_forwards(blocks, _stubs(blocks, stop, calls, wrap, tokens)):
            before = _random_state(device)
            _forward_until_reached(model, tokens.to(device))
        if not torch.equal(before, _random_state(device)):
            raise QuantkitError(
                f"{type(model).__name__} draws random numbers on the way to its blocks, so that no run could be "
                "repeated; RTN can pack it, which reads nothing of that"
            )
        if [index for index, *_ in calls] != list(range(len(blocks))):
            raise QuantkitError(f"{type(model).__name__} does not run its blocks once each and in order")
        hidden = calls[0][1]
        if not all(torch.equal(other, hidden) for _, other, *_ in calls):
            raise QuantkitError(f"{type(model).__name__} changes the hidden states between its blocks; not supported")
        arguments = [(args, kwargs) for _, _, args, kwargs, _ in calls]
        states: dict[int, Any] = {}
        of_full_stream = _with_states(arguments, states)
        if batches and not states and _same(batches[0].calls, arguments):
            arguments = batches[0].calls
        batches.append(Batch(hidden, hidden, arguments, tokens, of_full_stream if states else None, calls[0][4]))
    source.release("", model)
    return batches, wrap


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _forward_until_reached(model: nn.Module, tokens: Tensor, what: str = "its decoder blocks") -> Any:
    try:
        model(input_ids=tokens, use_cache=False)
    except _Reached as reached:
        return reached.value
    raise QuantkitError(f"the forward pass of {type(model).__name__} never reached {what} with text")


def _output_form(
    model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, source: WeightSource, device: torch.device
) -> Wrap:
    """How a block returns its hidden states: bare, or first in a tuple or a list."""
    block, prefix = blocks[0], find_blocks(model)[0]
    source.load(f"{prefix}.0", block, device)
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise _Reached((_axis(args[0] if args else kwargs["hidden_states"], tokens), original(*args, **kwargs)))

    with patched_forwards(nn.ModuleList([block]), [forward]):
        axis, output = _forward_until_reached(model, tokens)
    source.release(f"{prefix}.0", block)
    if isinstance(output, tuple | list):
        rest = output[1:]
        return lambda hidden: (_as_blocks_take(hidden, axis), *rest)
    return partial(_as_blocks_take, axis=axis) if axis else bare


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
        with patched_forwards(blocks, _stubs(blocks, lambda _: wrap(hidden), [], wrap, tokens)):
            return _forward_until_reached(model, tokens, layer)
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
    with patched_forwards(blocks, _stubs(blocks, lambda _: wrap(hidden), [], wrap, tokens)):
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
    stubs = _stubs(blocks, bare, [], bare, None)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with patched_forwards(nn.ModuleList([*blocks, head]), [*stubs, lambda *_args, **_kwargs: product()]):
        logits: Tensor = model(input_ids=token, use_cache=False).logits
    return logits


def _with_states(value: Any, states: dict[int, Any]) -> Any:
    """Nested arguments with other objects in the places of those that blocks write into: mappings, empty as yet.

    Args:
        value: the arguments.
        states: gets these other objects, by the id of those whose places they take.
    """
    if isinstance(value, MutableMapping) and not value:
        return states.setdefault(id(value), copy.copy(value))
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_with_states(each, states) for each in value)
    if type(value) is dict:
        return {name: _with_states(each, states) for name, each in value.items()}
    return value


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
