"""PV-Tuning's step: continuous parts by gradient descent, codes within a trusted subspace.

Every step of a phi(Wq), Wq the dequantized weights, does both (arXiv 2405.14852, sections 3.2 and 3.3):

    P    Adam moves scales, zeros, codebooks, gains, corrections along the gradient that reaches them through Wq
    V    Adam moves a target S of every weight along d phi / d Wq; the fraction of units with the largest |S - Wq| is
         coded again, nearest to S; of those changes the largest are kept while |Wq' - Wq| <= trust * |Wq|, one at least

A full V step would round back to where it came from: a step shorter than half a cell changes no code, unless it is
taken for few weights at once. Modes say what S is:

    "auto"              the buffer, but trellis codes stay (`Coded.moves`)
    "buffer"            S goes on from step to step and is pulled towards Wq by `decay` of their distance (the recipe of
                        the paper's code, there with a decay of 0)
    "linearized"        S starts at Wq in every step (a decay of 1): the V step of the paper
    "straight-through"  as the buffer, but every unit is coded again in every step: the usual estimator, for comparison
    "continuous"        codes stay
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from quantkit.core.weight import QuantizedWeight
from quantkit.tuning.parts.base import Coded, Tunable
from quantkit.tuning.settings import PVSettings


def rate(step: int, steps: int, warmup: float = 0.05) -> float:
    """The fraction of the learning rates in step 0, 1, ...: a linear rise, then a linear fall to a tenth."""
    rising = (step + 1) / max(1.0, warmup * steps)
    return min(1.0, rising, max(0.1, 1 - step / steps))


class Tuned(Protocol):
    """A part of a model while it is tuned: `open`, passes through the model, `close`, and a step of the optimizer."""

    def open(self) -> None:
        """Makes what the passes of one step use."""

    def close(self) -> None:
        """Brings the gradients to where the optimizer looks for them."""

    def gradients(self) -> Iterator[Tensor]:
        """What the passes of a step have added up, [...] as the parameters, 0 where none came by; before `close`."""

    def continuous(self) -> Iterator[tuple[nn.Parameter, float]]:
        """What moves by gradient, fp32 [...] of any shapes, each with the size that learning rates are relative to."""

    def coded(self) -> Iterator[Coded]:
        """The parts whose codes move."""

    def state(self) -> Iterator[Tensor]:
        """Everything that changes, tensors [...] of any shapes, in an order that does not."""


def moving(layer: Tuned, mode: str) -> list[Coded]:
    """The parts of a layer whose codes move in a mode."""
    return [] if mode == "continuous" else [part for part in layer.coded() if part.moves or mode != "auto"]


class TunedTensor:
    """A dense parameter of the model, whatever its dtype, and an fp32 copy that collects steps.

    Args:
        parameter: of the model.
        fraction: of the learning rates.
    """

    def __init__(self, parameter: nn.Parameter, fraction: float) -> None:
        self.parameter, self._fraction = parameter, fraction
        self.copy = nn.Parameter(parameter.detach().float().clone())

    @torch.no_grad()
    def open(self) -> None:
        """See `Tuned`."""
        self.parameter.copy_(self.copy)

    def close(self) -> None:
        """See `Tuned`."""
        self.copy.grad = None if self.parameter.grad is None else self.parameter.grad.float()
        self.parameter.grad = None

    def gradients(self) -> Iterator[Tensor]:
        """See `Tuned`: of the model's parameter, in its shape and dtype."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        yield self.parameter.grad

    def continuous(self) -> Iterator[tuple[nn.Parameter, float]]:
        """See `Tuned`."""
        yield self.copy, self._fraction * float(self.copy.detach().square().mean().sqrt())

    def coded(self) -> Iterator[Coded]:
        """See `Tuned`."""
        yield from ()

    def state(self) -> Iterator[Tensor]:
        """See `Tuned`."""
        yield self.copy


class TunedLinear(nn.Module):
    """A linear layer whose weight is taken apart; between `open` and `close` it multiplies by one dense copy.

    Args:
        weight: the parts.
        bias: [out_features] or None; stays.
    """

    leaf: Tensor

    def __init__(self, weight: Tunable, bias: Tensor | None) -> None:
        super().__init__()
        self.parts, self.bias = weight, bias
        self._made: Tensor | None = None

    def open(self) -> None:
        """Makes the copy: the passes of one step all use it and add their gradients up in it."""
        self._made = self.parts()
        self.leaf = self._made.detach().requires_grad_()

    def close(self) -> None:
        """Hands the copy's gradient on to the parts."""
        assert self._made is not None
        if self.leaf.grad is not None and self._made.requires_grad:
            self._made.backward(self.leaf.grad)
        self._made = None

    def gradients(self) -> Iterator[Tensor]:
        """See `Tuned`: of the dense copy, fp32 [out_features, in_features]."""
        if self.leaf.grad is None:
            self.leaf.grad = torch.zeros_like(self.leaf)
        yield self.leaf.grad

    def continuous(self) -> Iterator[tuple[nn.Parameter, float]]:
        """See `Tuned`; all are near 1."""
        yield from ((parameter, 1.0) for parameter in self.parts.parameters())

    def coded(self) -> Iterator[Coded]:
        """See `Tuned`."""
        yield from self.parts.coded()

    def state(self) -> Iterator[Tensor]:
        """See `Tuned`."""
        yield from self.parts.state_dict().values()

    @property
    def packed(self) -> QuantizedWeight:
        """The weight as it is now, stored."""
        return self.parts.packed()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return nn.functional.linear(x, self.leaf.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class PVOptimizer:
    """Adam on continuous parts and on targets, and the V step.

    Args:
        layers: what is tuned.
        settings: see `PVSettings`.
    """

    def __init__(self, layers: Sequence[Tuned], settings: PVSettings) -> None:
        self.layers, self.settings = layers, settings
        continuous = [pair for layer in layers for pair in layer.continuous()]
        self.continuous = [parameter for parameter, _ in continuous]
        self.coded = [part for layer in layers for part in moving(layer, settings.mode)]
        self.targets: list[Tensor] = []
        sizes = sorted({size for _, size in continuous})
        groups = [{"params": [p for p, s in continuous if s == size], "lr": settings.lr * size} for size in sizes]
        for part in self.coded:
            with torch.no_grad():
                weight = part()
            size = float(weight.square().mean().sqrt()) * 2.0**-part.bits
            self.targets.append(nn.Parameter(weight.detach().clone()))
            groups.append({"params": [self.targets[-1]], "lr": settings.code_lr * part.pace * size})
        self.adam = torch.optim.Adam(groups, betas=settings.betas, fused=True)
        for group in self.adam.param_groups:
            group["initial_lr"] = group["lr"]

    def open(self) -> None:
        """Begins a step: clears gradients and makes the weights that passes use."""
        self.adam.zero_grad(set_to_none=True)
        for layer in self.layers:
            layer.open()

    def step(self, scale: float = 1.0) -> int:
        """Ends a step: moves everything once.

        Args:
            scale: of the learning rates, from 0 to 1.

        Returns:
            How many units got another code.
        """
        for layer in self.layers:
            layer.close()
        for part, target in zip(self.coded, self.targets, strict=True):
            target.grad = part.latest.grad
        for group in self.adam.param_groups:
            group["lr"] = scale * group["initial_lr"]
        self.adam.step()
        return sum(self._recode(part, target) for part, target in zip(self.coded, self.targets, strict=True))

    @torch.no_grad()
    def _recode(self, part: Coded, target: Tensor) -> int:
        """The V step of a layer, with the continuous parts as they are by now."""
        settings = self.settings
        if settings.fraction == 0:
            return 0
        weight = part.decode()
        present, wanted = part.units(weight), part.units(target)
        if settings.mode == "straight-through":
            chosen = torch.arange(len(present), device=weight.device)
        else:
            distance = (wanted - present).square().sum(1)
            chosen = distance.topk(max(1, int(settings.fraction * len(distance)))).indices
        codes, values = part.nearest(chosen, wanted[chosen])
        moved = (values - present[chosen]).square().sum(1)
        # no farther from the target than before: the search of a pyramid's point is not exhaustive
        better = (values - wanted[chosen]).square().sum(1) < (present[chosen] - wanted[chosen]).square().sum(1)
        keep = better & (moved > 0)
        if settings.mode != "straight-through":
            spent = torch.where(keep, moved, torch.zeros_like(moved)).cumsum(0)
            within = spent <= (settings.trust * weight.norm()) ** 2
            first = keep & (keep.cumsum(0) == 1)
            keep &= within | first
        part.assign(chosen[keep], codes[keep])
        decay = 1.0 if settings.mode == "linearized" else settings.decay
        if decay:
            target.lerp_(part.decode(), decay)
        return int(keep.sum())
