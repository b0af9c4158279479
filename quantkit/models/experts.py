"""Experts of a mixture, taken apart: each gets linear layers of its own, which are packed like all others.

transformers keeps a block's experts in one module with stacked weights, [experts, out, in] or its transpose, and runs
them in one of several ways (`transformers.integrations.moe.use_experts_implementation`). `take_apart` turns such a
module into one of the same class that has a child an expert, named by its number, with a linear layer a projection:

    experts.gate_up_proj[3]   ->   experts.3.gate_up_proj.weight

It keeps its gate, activation and norm, gives the same outputs, and runs the experts one by one. `put_together` takes
that back. Llama 4 has experts that see all tokens, sorted by expert and scaled by the router, in a class of its own.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit.kernels import plans
from quantkit.kernels.experts import MOST

if TYPE_CHECKING:
    from quantkit.models.stacking import Stack

STACKS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of stacked weights, in the order in which an expert uses them."""
_SORTED = {"Llama4TextExperts"}
"""Classes that are given [experts * tokens, features], sorted by expert, and no choice of experts."""
_PLACE = re.compile(r"(?P<experts>(?:.*\.)?\w*experts\w*)\.(?P<number>\d+)\.(?P<what>.+)")
_FLAGS = ("has_gate", "has_bias", "is_transposed")  # newer ones are asked for where they matter


@dataclass(frozen=True)
class Part:
    """Where the weight of an expert's layer is among the stacked ones.

    Attributes:
        stack: name of the stacked tensor in the model.
        expert: number of the expert.
        transposed: whether the stack has [in_features, out_features] of it.
    """

    stack: str
    expert: int
    transposed: bool

    def of(self, stacked: Tensor) -> Tensor:
        """The expert's part of a stacked tensor [experts, ...]."""
        own = stacked[self.expert]
        return own.T if self.transposed else own


def place(layer: str) -> tuple[str, int, str] | None:
    """(name of the experts, number, what it is there) of an expert's layer, by its name; None for all other layers."""
    found = _PLACE.fullmatch(layer)
    return None if found is None else (found["experts"], int(found["number"]), found["what"])


def unnumbered(name: str) -> str:
    """A tensor's name; that of an expert's without the number."""
    of_expert = place(name)
    return name if of_expert is None else f"{of_expert[0]}.{of_expert[2]}"


def number_of(name: str) -> int:
    """The number of the expert whose tensor a name is; 0 where it is none's."""
    of_expert = place(name)
    return 0 if of_expert is None else of_expert[1]


def sees_text(layer: str) -> bool:
    """Whether text can reach a layer of the blocks, by its name: ERNIE 4.5 VL has experts for images alone."""
    return _OF_IMAGES.search(layer) is None


_OF_IMAGES = re.compile(r"\.(vision|image)_(moe|experts)\.")


def of_all(layer: str) -> str:
    """A layer's name, with a star in the place of an expert's number."""
    found = place(layer)
    return layer if found is None else f"{found[0]}.*.{found[2]}"


def is_stacked(module: nn.Module) -> bool:
    """Whether a module holds experts in stacked weights that `take_apart` can take apart."""
    stacks = [name for name in STACKS if isinstance(module._parameters.get(name), Tensor)]
    if len(stacks) != 2 or stacks[1] != "down_proj" or any(module._parameters[name].dim() != 3 for name in stacks):  # type: ignore[union-attr]
        return False
    known = all(hasattr(module, flag) for flag in _FLAGS) and hasattr(type(module), "_apply_gate")
    rest = set(module._parameters) - set(stacks) - {f"{name}_bias" for name in stacks}
    hooked = "forward" in vars(module)  # as accelerate's hooks put one there, which is the class's still
    return (known or type(module).__name__ in _SORTED) and not rest and not hooked


def is_apart(module: nn.Module) -> bool:
    """Whether a module's experts have been taken apart."""
    return isinstance(module, Apart)


def take_apart(model: nn.Module) -> None:
    """Takes all stacked experts of a model apart, in place; weights stay where they are, as views."""
    for parent in list(model.modules()):
        for module in filter(is_stacked, list(parent.children())):
            _take_apart(module)
            parent._is_hf_initialized = True  # type: ignore[assignment]  # Qwen3-Omni draws its children's stacks
    if is_stacked(model):
        _take_apart(model)


def parts(model: nn.Module) -> dict[str, Part]:
    """Tensors of experts that were taken apart, by name in the model, and where they come from."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Apart):
            for expert in range(module.num_experts):
                for stack in module.stacks:
                    own = f"{name}.{expert}.{stack}"
                    found[f"{own}.weight"] = Part(f"{name}.{stack}", expert, module.transposed)
                    if module.biased:
                        found[f"{own}.bias"] = Part(f"{name}.{stack}_bias", expert, False)
    return found


def put_together(model: nn.Module, used: Collection[str]) -> dict[str, list[str]]:
    """Gives experts none of whose layers are used the form back that they came in.

    Args:
        model: changed in place.
        used: names of layers.

    Returns:
        Stacked tensors that the model has again, and the names that their parts had.
    """
    idle = {
        name: module for name, module in model.named_modules()
        if isinstance(module, Apart) and not any(layer.startswith(f"{name}.") for layer in used)
    }  # fmt: skip
    found: dict[str, list[str]] = {}
    for own, part in parts(model).items():
        if part.stack.rpartition(".")[0] in idle:
            found.setdefault(part.stack, []).append(own)
    for module in idle.values():
        module.put_together()
    return found


@contextmanager
def routed(model: nn.Module, **settings: Any) -> Iterator[None]:
    """While it lasts, all experts that were taken apart have these attributes; see `Apart`."""
    modules = [module for module in model.modules() if isinstance(module, Apart)]
    before = [{name: getattr(module, name) for name in settings} for module in modules]
    try:
        for module in modules:
            for name, value in settings.items():
                setattr(module, name, value)
        yield
    finally:
        for module, values in zip(modules, before, strict=True):
            for name, value in values.items():
                setattr(module, name, value)


class Expert(nn.Module):
    """The layers of one expert; `changes` counts how often any expert got another one in a layer's place."""

    changes = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            Expert.changes += 1
        super().__setattr__(name, value)


class Apart(nn.Module):
    """Mixed into the class of a module whose experts have been taken apart.

    Attributes:
        num_experts: how many; each is a child named by its number.
        stacks: names of an expert's layers, as the stacked weights were called.
        transposed, biased: whether the weights were stacked as [experts, in, out], and whether there are biases.
        trained: whether the stacks were parameters that want gradients.
        chooses: whether it is told which experts each token has chosen.
        sizes_only: run as though all experts were chosen alike, on tensors whose numbers nobody knows.
        everywhere: run all experts on all tokens, though each counts for those alone that chose it.
        records: whether to remember the choice of the last call.
        taken: that choice, as (index, weights).
        given: the choice to use instead of what is handed in; None for none.
        at_once: the layers stacked, where they are on a GPU and have been tried; see `models.stacking`.
        changes: `Expert.changes` of that time.
    """

    num_experts: int
    stacks: tuple[str, ...]
    transposed: bool
    biased: bool
    trained: bool
    chooses: bool
    sizes_only: bool = False
    everywhere: bool = False
    records: bool = False
    taken: tuple[Tensor, Tensor] | None = None
    given: tuple[Tensor, Tensor] | None = None
    at_once: "tuple[Stack, ...] | None" = None
    changes: int = 0

    def like_stack(self, name: str) -> Tensor:
        """A tensor without numbers, of the shape and dtype that a stack had: [experts, ...]."""
        is_bias = name.endswith("_bias")
        own = self.get_parameter(f"0.{name.removesuffix('_bias')}.{'bias' if is_bias else 'weight'}")
        shape = own.T.shape if self.transposed and not is_bias else own.shape
        return torch.empty(self.num_experts, *shape, dtype=own.dtype, device="meta")

    def forward(self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Any = None) -> Tensor:
        """As the class does it: what the chosen experts make of each token, weighted and added up.

        Args:
            hidden_states: [tokens, hidden_size], or with more dimensions in front.
            top_k_index: int64 [tokens, k], numbers of experts; others than theirs stand for none.
            top_k_weights: [tokens, k].
        """
        if top_k_index is None:
            return self._of_sorted(hidden_states)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        choices = top_k_index.shape[-1]
        index, weights = self.given or (top_k_index.reshape(-1, choices), top_k_weights.reshape(-1, choices))
        if self.records:
            self.taken = index, weights
        result = torch.zeros_like(x)
        if self.sizes_only:
            for expert in range(self.num_experts):
                self.run(expert, x[: -(-len(x) * index.shape[1] // self.num_experts)])
            return result.view_as(hidden_states)
        if x.is_cuda and not self.everywhere and plans.direct(x) and index.numel() <= MOST:
            outputs = self._at_once(x, index)
            if outputs is not None:
                weights = weights * ((index >= 0) & (index < self.num_experts))  # others stand for none
                outputs = outputs.view(*index.shape, -1) * weights.unsqueeze(-1)
                return outputs.sum(1).to(result.dtype).view_as(hidden_states)
        if len(x) == 1 and not self.everywhere:
            for nth, expert in enumerate(index[0].tolist()):
                if 0 <= expert < self.num_experts:
                    result += (self.run(expert, x) * weights[:, nth, None]).to(result.dtype)
            return result.view_as(hidden_states)
        hit = range(self.num_experts) if self.everywhere else index.unique().tolist()
        for expert in hit:
            if not 0 <= expert < self.num_experts:
                continue
            token, slot = torch.where(index == expert)
            output = self.run(expert, x)[token] if self.everywhere else self.run(expert, x[token])
            result.index_add_(0, token, (output * weights[token, slot, None]).to(result.dtype))
        return result.view_as(hidden_states)

    def _of_sorted(self, hidden_states: Tensor) -> Tensor:
        """Of [experts * tokens, features], where a token is zero for the experts that it did not choose."""
        result = torch.zeros_like(hidden_states)
        rows = len(hidden_states) // self.num_experts
        for expert in range(self.num_experts):
            own = slice(expert * rows, (expert + 1) * rows)
            chosen = hidden_states[own].any(1).nonzero().flatten()
            if len(chosen):
                result[own][chosen] = self.run(expert, hidden_states[own][chosen])
        return result

    def _at_once(self, x: Tensor, index: Tensor) -> Tensor | None:
        """[pairs, hidden_size] of all chosen experts in one launch a projection, without a word to the host.

        None where their layers are not packed alike, or no kernel takes them.
        """
        own = self.at_once
        if own is None or self.changes != Expert.changes or not all(found.whole for found in own):
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return None
            own = self.at_once = self._stacked()
            self.changes = Expert.changes
        if len(own) < len(self.stacks):
            return None
        chosen = index.reshape(-1)
        inner = own[0].chosen(x, chosen)
        output = None if inner is None else own[1].chosen(self._gated(inner), chosen)
        return None if output is None else self._finished(output)

    def _stacked(self) -> "tuple[Stack, ...]":
        """The stacks of the layers that are in place now; of a projection that cannot be stacked none."""
        from quantkit.models.stacking import stack  # of packed layers, of which there may be none

        before = self.at_once or ()
        if len(before) == len(self.stacks) and all(
            old.whole and old.of(self._layers(name)) for old, name in zip(before, self.stacks, strict=True)
        ):
            return before
        for old in before:
            old.take_apart()
        return tuple(one for name in self.stacks if (one := stack(self._layers(name))) is not None)

    def _layers(self, stack: str) -> list[nn.Module]:
        """What all experts have at one place."""
        return [self.get_submodule(f"{expert}.{stack}") for expert in range(self.num_experts)]

    def run(self, expert: int, x: Tensor) -> Tensor:
        """One expert's output for x, both [tokens, hidden_size]."""
        first, last = (self._modules[str(expert)]._modules[stack] for stack in self.stacks)  # type: ignore[union-attr]
        assert first is not None and last is not None
        output: Tensor = self._finished(last(self._gated(first(x))))
        return output

    def _gated(self, inner: Tensor) -> Tensor:
        """What the second layer is given, of what the first gave, [tokens, features] both."""
        if not getattr(self, "has_gate", True):
            inner = self.act_fn(inner)  # type: ignore[operator]
        elif hasattr(self, "_apply_gate"):
            inner = self._apply_gate(inner)  # type: ignore[operator]
        else:
            gate, up = inner.chunk(2, dim=-1)
            inner = up * self.act_fn(gate)  # type: ignore[operator]
        return inner

    def _finished(self, output: Tensor) -> Tensor:
        """What comes of the second layer's outputs, [tokens, hidden_size]."""
        if getattr(self, "has_post_expert_norm", False):
            output = self.post_expert_norm(output)  # type: ignore[operator]
        return output

    def put_together(self) -> None:
        """Becomes what it was; the weights are copied."""
        for name in self.stacks:
            own: list[Any] = self._layers(name)
            weights = torch.stack([layer.weight.T if self.transposed else layer.weight for layer in own])
            self.register_parameter(name, nn.Parameter(weights.detach(), requires_grad=self.trained))
            if self.biased:
                biases = torch.stack([layer.bias for layer in own])
                self.register_parameter(f"{name}_bias", nn.Parameter(biases.detach(), requires_grad=self.trained))
        for expert in range(self.num_experts):
            del self._modules[str(expert)]
        self.given = self.taken = self.at_once = None
        self.__class__ = type(self).__mro__[2]

    def let_go(self) -> None:
        """Copies what others have been packed beside: as views, a few dense layers would keep the whole stack."""
        for name in self.stacks:
            own = self._layers(name)
            dense = [(layer, weight) for layer in own if (weight := layer._parameters.get("weight")) is not None]
            for layer, weight in dense if len(dense) < len(own) else ():
                layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and files know the class by that which it was made of."""
        return _made_again, (type(self).__mro__[2],), self.__dict__


def _take_apart(module: nn.Module) -> None:
    stacks = tuple(name for name in STACKS if name in module._parameters)
    own = {name: module._parameters.pop(name) for name in [*module._parameters] if name.split("_bias")[0] in stacks}
    transposed = bool(getattr(module, "is_transposed", True))  # Llama 4's are
    count = len(own[stacks[0]])  # type: ignore[arg-type]
    for number in range(count):
        expert = Expert()
        for name in stacks:
            expert.add_module(name, _layer(own[name], own.get(f"{name}_bias"), number, transposed))  # type: ignore[arg-type]
        module.add_module(str(number), expert)
    module.num_experts, module.stacks = count, stacks  # type: ignore[assignment]
    module.transposed, module.biased = transposed, f"{stacks[0]}_bias" in own  # type: ignore[assignment]
    module.chooses = type(module).__name__ not in _SORTED  # type: ignore[assignment]
    module.trained = bool(own[stacks[0]].requires_grad)  # type: ignore[union-attr, assignment]
    module._is_hf_initialized = True  # type: ignore[assignment]  # transformers would draw the stacks anew
    module.__class__ = _apart(type(module))  # type: ignore[arg-type]


def _layer(stacked: Tensor, bias: Tensor | None, number: int, transposed: bool) -> nn.Linear:
    """A linear layer over an expert's part of a stacked weight."""
    weight = stacked.detach()[number]
    weight = weight.T if transposed else weight
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=stacked.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach()[number], requires_grad=bias.requires_grad)
    return layer


def _made_again(cls: type[nn.Module]) -> nn.Module:
    made = _apart(cls)  # type: ignore[arg-type]
    return made.__new__(made)


@lru_cache
def _apart(cls: type[nn.Module]) -> type[nn.Module]:
    """A class whose experts are taken apart; its forward is `Apart`'s, all else its own."""
    return type(f"{cls.__name__}Apart", (Apart, cls), {"__module__": cls.__module__})
