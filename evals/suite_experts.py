"""What the GPU suite launches of experts: a projection of those that some tokens chose, beside torch's product."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.evals.kernel_kinds import Kind
from quantkit.evals.suite_groups import Group, Run, call
from quantkit.models.stacking import Stack, stack

EXPERTS, SHAPE, CHOICES = 64, (1536, 2048), 8
"""Experts of a block, the shape of a projection, and the experts of a token: about Qwen3-30B-A3B's, of half as many."""
TOKENS = (1, 4, 8)


def groups(kinds: Sequence[Kind], shape: tuple[int, int] = SHAPE, experts: int = EXPERTS) -> list[Group]:
    """Products with stacked experts of each kind."""

    def group(kind: Kind) -> Group:
        """Those of one kind."""

        def launch(device: torch.device) -> None:
            weight = _stack(kind, shape, 4, device)
            for tokens in TOKENS:
                x, chosen = _of_tokens(tokens, shape[1], 4, device)
                weight.chosen(x, chosen)

        name = f"{experts} of {shape[0]} x {shape[1]}"
        return Group("experts", name, kind.name, launch, lambda run: _measure(run, kind, shape, experts))

    return [group(kind) for kind in kinds]


def _stack(kind: Kind, shape: tuple[int, int], experts: int, device: torch.device, seed: int = 0) -> Stack:
    layers: list[Any] = [kind.layer(*shape, device, experts * seed + number).linear for number in range(experts)]
    found = stack(layers)
    assert found is not None
    return found


def _of_tokens(tokens: int, features: int, experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(x [tokens, features], the experts that each chose, one after the other)."""
    chosen = torch.stack([torch.randperm(experts, device=device)[:CHOICES] for _ in range(tokens)])
    return torch.randn(tokens, features, device=device, dtype=torch.bfloat16), chosen.flatten()


def _measure(run: Run, kind: Kind, shape: tuple[int, int], experts: int) -> None:
    stacks = [_stack(kind, shape, experts, run.device)]
    each = sum(tensor.nbytes for tensor in stacks[0].weight.state().values()) // experts
    stacks += [_stack(kind, shape, experts, run.device, seed) for seed in range(1, run.distinct(each * CHOICES, 2))]
    dense = torch.stack([stacks[0].weight.part(e).dequantize(torch.bfloat16) for e in range(experts)])
    for tokens in TOKENS:
        x, chosen = _of_tokens(tokens, shape[1], experts, run.device)
        rows, choices = x.repeat_interleave(len(chosen) // tokens, dim=0), dense.index_select(0, chosen)
        exact = torch.bmm(choices.double(), rows.double().unsqueeze(2)).squeeze(2)
        column = f"{tokens} tokens"
        replays = run.checked(column, [call(own.chosen, x, chosen) for own in stacks], exact, limit=1e-2)
        if not replays or not run.timing:
            continue
        seconds, moved = replays.seconds(), int(chosen.unique().numel()) * each
        base = run.replays([call(torch.bmm, choices, rows.unsqueeze(2))] * len(stacks)).seconds()
        run.baseline("torch bf16, weights side by side", column, base)
        run.report.time(column, seconds, speed_up=base / seconds, bandwidth_share=moved / seconds / run.bandwidth)
