"""How a block runs its layers, and what later passes through it need not compute again."""

from collections.abc import Callable, Collection, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.models.experts import place
from quantkit.models.forward import Batch, Wrap, bare, patched_forwards, run_block

REPLAY_FRACTION = 1 / 8
"""Fraction of the free memory in which a stream may keep what a block need not compute again."""


@dataclass(frozen=True)
class Order:
    """How a block runs its planned layers.

    Attributes:
        stages: layers in order of their first call: groups that are fed by the same tensor; and such groups side by
            side, where they are what all experts have at the same place.
        steady: children of the block (attention, MLP) that are called once and whose output nobody changes, so that
            it can stand for a later call.
        tails: those of them whose output is that of one of their planned layers, which is called once and after the
            others: child -> (layer, the form in which the child returns it).
    """

    stages: list[list[list[str]]]
    steady: frozenset[str] = frozenset()
    tails: dict[str, tuple[str, Wrap]] = field(default_factory=dict)

    @property
    def groups(self) -> list[list[str]]:
        """All groups, in order."""
        return [group for stage in self.stages for group in stage]


def _staged(groups: list[list[str]], layers: Collection[str]) -> list[list[list[str]]]:
    """Groups with those of all experts at the same place side by side, and layers that no token reached with theirs."""
    stages: dict[Any, list[list[str]]] = {}
    keys: dict[tuple[str, str], Any] = {}  # experts and what a layer is there -> its stage
    for group in groups:
        found = place(group[0])
        key = group[0] if found is None else keys.get((found[0], found[2]), (found[0], found[2]))
        keys |= {(other[0], other[2]): key for other in map(place, group) if other is not None}
        stages.setdefault(key, []).append(group)
    reached = {name for group in groups for name in group}
    for name in (name for name in layers if name not in reached):
        found = place(name)
        key = name if found is None else keys.get((found[0], found[2]), (found[0], found[2]))
        stage = stages.setdefault(key, [])
        beside = [group for group in stage if found is not None and place(group[0])[:2] == found[:2]]  # type: ignore[index]
        beside[0].append(name) if beside else stage.append([name])
    return list(stages.values())


def execution_order(block: nn.Module, layers: Collection[str], batches: list[Batch], index: int) -> Order:
    """How a block runs its planned layers, from watching one batch run through it.

    Args:
        block: the block.
        layers: names of the planned layers in it.
        batches: of which the first runs; without any, each layer is a group of its own.
        index: of the block among the model's.
    """
    if not batches:
        return Order([[[name]] for name in layers])
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
            run_block(block, batches[0].quantized, batches[0].call(index))
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
    return Order(_staged(ordered, layers), steady, tails)


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
