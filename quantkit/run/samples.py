"""Text before and after, for readers of a report: differing first choices, and how both models go on with a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from quantkit.core.device import free_memory
from quantkit.core.errors import first_line
from quantkit.core.units import size
from quantkit.core.weight import QuantizedWeight
from quantkit.models.embedding import put
from quantkit.models.linear import QuantizedLinear
from quantkit.models.plan import Plan
from quantkit.models.structure import context_length
from quantkit.run.check import HeldOut
from quantkit.run.report import Continuation, Piece, Samples

if TYPE_CHECKING:
    from quantkit.io.source import Source

LARGEST = 2**30
"""Bytes of a model in the type of its computation, at most, that is held in memory whole for continuations."""
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 32, 32


class Readings:
    """Collects the samples of a run.

    Args:
        source: the full-precision model, in which nothing is packed yet.
        plan: of the run.
        device: where blocks run; a model that is held in memory stays where it is.
        held_out: the sequences; prompts are their beginnings.
        tokenizer: of the model.
    """

    def __init__(self, source: Source, plan: Plan, device: torch.device, held_out: HeldOut, tokenizer: Any) -> None:
        self._source, self._device, self._held_out, self._tokenizer = source, device, held_out, tokenizer
        self._again = source.unpacked(plan)
        tokens = held_out.tokens
        self._prompts = tokens[:PROMPTS, : min(PROMPT_TOKENS, tokens.shape[1] // 2)]
        context = context_length(source.model) or PROMPT_TOKENS + NEW_TOKENS
        self._count = min(NEW_TOKENS, context - self._prompts.shape[1])
        self._left_out = _too_large(source, device)
        self._before: Tensor | None = None
        self._on_disk = source.model.device.type == "meta"
        if not self._on_disk and not self._left_out:
            self._before = self._greedy(source.model)

    def samples(self, finished: Callable[[int], dict[str, QuantizedWeight] | None]) -> Samples:
        """The samples, once all is packed.

        Args:
            finished: gives a block's packed layers where the model does not hold them; -1 for all else.
        """
        rows = zip(self._held_out.tokens, self._held_out.choices, strict=False)
        texts = tuple(tuple(_pieces(self._tokenizer, tokens, choices)) for tokens, choices in rows)
        before, after = self._before, None
        if not self._left_out and not self._on_disk:
            after = self._greedy(self._source.model)
        elif not self._left_out:
            source = self._again()
            model = source.in_memory(self._device)
            before = self._greedy(model)
            for index in (*range(len(source.blocks)), -1):
                for layer, weight in (finished(index) or {}).items():
                    put(model, layer, weight.map(lambda tensor: tensor.to(self._device)))
            after = self._greedy(model)
        if before is None or after is None:
            return Samples(texts, left_out=self._left_out)
        columns = (map(self._tokenizer.decode, rows) for rows in (self._prompts, before, after))
        return Samples(texts, tuple(Continuation(*row) for row in zip(*columns, strict=True)))

    def _greedy(self, model: Any) -> Tensor | None:
        """Continuations of the prompts by first choices, int64 [prompts, count]."""
        try:
            return greedy(model, self._prompts, self._count)
        except Exception as error:  # models' code; samples are no reason to lose a run
            self._left_out = f"the model does not generate here ({first_line(error)})"
            return None


def greedy(model: Any, prompts: Tensor, count: int) -> Tensor:
    """A model's first choices one after the other, int64 [prompts, count]; an end of text is never one.

    Args:
        model: a causal language model; packed layers are unpacked meanwhile.
        prompts: int64 [prompts, tokens].
        count: of new tokens.
    """
    training = model.training
    model.eval()
    config = GenerationConfig(do_sample=False, num_beams=1, min_new_tokens=count, max_new_tokens=count, pad_token_id=0)
    tokens = prompts.to(model.device)
    try:
        with _unpacked(model):
            made: Tensor = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
    finally:
        model.train(training)
    return made[:, prompts.shape[1] :].cpu()


@contextmanager
def _unpacked(model: nn.Module) -> Iterator[None]:
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for linear in linears:
        linear.hold(getattr(model, "dtype", torch.float32))
    try:
        yield
    finally:
        for linear in linears:
            linear.release()


def _too_large(source: Source, device: torch.device) -> str:
    """Why a model is not held in memory for continuations, or ""."""
    itemsize = getattr(source.model, "dtype", torch.float32).itemsize
    needed = sum(p.numel() for p in source.model.parameters()) * itemsize
    if needed > LARGEST:
        return f"the model would take {size(needed)} as a whole, and at most {size(LARGEST)} are taken for this"
    if 3 * needed > free_memory(device):
        return f"the model would take {size(needed)} as a whole, and memory is short"
    return ""


def _pieces(tokenizer: Any, tokens: Tensor, choices: Tensor) -> Iterator[Piece]:
    """The beginning of a sequence, token by token.

    Args:
        tokenizer: of the model.
        tokens: int64 [seqlen].
        choices: first choices of both models for the tokens from the second on, int64 [2, shown].
    """
    held: list[int] = []
    differing: tuple[str, str] | None = None
    shown = tokens[: choices.shape[1] + 1].tolist()
    for index, token in enumerate(shown):
        if index and choices[0, index - 1] != choices[1, index - 1] and differing is None:
            before, after = (tokenizer.decode([int(choice)]) for choice in choices[:, index - 1])
            differing = before, after
        held.append(token)
        text = tokenizer.decode(held)
        if text.endswith("\ufffd") and len(held) < 4 and index + 1 < len(shown):  # a part of a character
            continue
        yield Piece(text, differing)
        held, differing = [], None
