"""The check at a run's end: what the packed model does to held-out text, measured on the way.

A few sequences of text, which no statistics read, ride along the walk: through each block as it is and, once its
layers are packed, through it again. Behind the last block norm and head of both models give logits, some places at a
time where the vocabulary is large. So it needs no more than one block in memory and no second walk, but for one case:
what is packed last and runs first (an embedding that shares the head's weight, say) changes what all blocks see, and
then the packed model runs once more, block by block.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.metrics import mean_and_error, token_kl, token_nll
from quantkit.core.weight import QuantizedWeight
from quantkit.models.embedding import put
from quantkit.models.forward import Batch, WeightSource, Wrap, bare, capture, logits_of, outer_input, run_block
from quantkit.models.linear import QuantizedLinear
from quantkit.models.structure import ends, find_blocks
from quantkit.run.aside import Aside
from quantkit.run.report import Check

LOGITS = 2**23
"""Logits of a model that are in memory together; each takes 4 bytes, and a comparison some six times that."""
SHOWN = (3, 192)
"""Sequences whose choices are kept for readers, and tokens of each."""


class HeldOut(Aside):
    """Held-out sequences on their way through both models.

    Args:
        tokens: int64 [sequences, seqlen].

    Attributes:
        tokens: the same.
        choices: first choices of the full and of the packed model for the tokens from the second on, int64 [2, shown],
            of the first sequences.
        seconds: that all this has taken.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.choices: list[Tensor] = []
        self.seconds = 0.0
        self._batches: list[Batch] = []
        self._wrap: Wrap = bare
        self._inputs: list[Tensor] = []
        self._head: nn.Module | None = None
        self._rows: list[dict[str, float]] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What is done meanwhile counts as the check's."""
        start = self._now()
        yield
        self.seconds += self._now() - start

    def _now(self) -> float:
        if self._batches and self._batches[0].full.is_cuda:
            torch.cuda.synchronize(self._batches[0].full.device)
        return time.monotonic()

    def begin(self, model: nn.Module, source: WeightSource, device: torch.device, batch_tokens: int) -> None:
        """Runs the sequences up to the first block, of a model in which nothing is packed yet.

        Args:
            model: that the walk is over.
            source: loads and releases its modules.
            device: where they run.
            batch_tokens: tokens that run together.

        The model says which of its modules gives logits.
        """
        self._model, self._source, self._device, self._batch_tokens = model, source, device, batch_tokens
        self._prefix, self._blocks = find_blocks(model)
        self._name = ends(model)[1] or ""
        with self.timed():
            arguments = (model, self._blocks, self.tokens, source, device, batch_tokens)
            self._batches, self._wrap = capture(*arguments)

    def front_packed(self) -> None:
        """Begins the packed model's stream anew."""
        with self.timed():
            arguments = (self._model, self._blocks, self.tokens, self._source, self._device, self._batch_tokens)
            for batch, behind in zip(self._batches, capture(*arguments, self._wrap)[0], strict=True):
                batch.quantized = behind.quantized

    def through_full(self, index: int) -> None:
        """Passes a block as the full model has it."""
        with self.timed():
            for batch in self._batches:
                batch.full = run_block(self._blocks[index], batch.full, batch.call(index, full=True))

    def through_packed(self, index: int) -> None:
        """Passes it as the packed model has it."""
        with self.timed():
            for batch in self._batches:
                batch.quantized = run_block(self._blocks[index], batch.quantized, batch.call(index))

    def full_ends(self) -> None:
        """Brings the full stream to the head, which is about to be packed, and keeps the head as it is."""
        with self.timed(), self._outer_loaded() as head:
            self._inputs = [self._head_inputs(batch, batch.full) for batch in self._batches]
            fresh = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in head.parameters()}
            self._head = copy.deepcopy(head, memo=fresh)

    def finish(self, again: bool, finished: Callable[[int], dict[str, QuantizedWeight] | None]) -> None:
        """Compares the two models' logits, when all is packed.

        Args:
            again: whether something in front of the blocks was packed behind them, so that the packed model has to run
                once more.
            finished: gives a block's packed layers where the model does not hold them.
        """
        with self.timed():
            if again:
                self._run_again(finished)
            with self._outer_loaded() as head:
                for batch, full_inputs in zip(self._batches, self._inputs, strict=True):
                    inputs = self._head_inputs(batch, batch.quantized)
                    for row, tokens in enumerate(batch.tokens):
                        self._compare(head, tokens, full_inputs[row], inputs[row])
            self._batches, self._inputs, self._head = [], [], None

    def figures(self, source: str) -> Check | None:
        """What was measured on text from `source`; None where a model predicts NaN."""
        columns = {name: [row[name] for row in self._rows] for name in self._rows[0]}
        counts = torch.tensor(columns.pop("count"), dtype=torch.float64)
        means = {name: mean_and_error(values, counts) for name, values in columns.items()}
        if not all(math.isfinite(mean) for mean, _ in means.values()):
            return None
        return Check(
            source=source,
            sequences=self.tokens.shape[0],
            seqlen=self.tokens.shape[1],
            tokens=int(counts.sum()),
            kl=means["kl"][0],
            kl_se=means["kl"][1],
            top1_agreement=means["agree"][0],
            flip_rate=means["flip"][0],
            baseline_perplexity=math.exp(min(means["full_nll"][0], 700.0)),
            perplexity=math.exp(min(means["nll"][0], 700.0)),
            seconds=self.seconds,
        )

    @contextmanager
    def _outer_loaded(self) -> Iterator[nn.Module]:
        """The head, while all that lies outside the blocks is loaded; a packed one unpacked."""
        self._source.load("", self._model, self._device)
        head = self._model.get_submodule(self._name)
        apart = any(parameter.is_meta for parameter in head.parameters())  # a walk has no use for a dense head
        if apart:
            self._source.load(self._name, head, self._device)
        if isinstance(head, QuantizedLinear):
            head.hold(self._batches[0].full.dtype)
        try:
            yield head
        finally:
            if isinstance(head, QuantizedLinear):
                head.release()
            if apart:
                self._source.release(self._name, head)
            self._source.release("", self._model)

    def _head_inputs(self, batch: Batch, hidden: Tensor) -> Tensor:
        tokens = batch.tokens.to(self._device)
        return outer_input(self._model, self._blocks, self._name, tokens, hidden, self._wrap)

    def _run_again(self, finished: Callable[[int], dict[str, QuantizedWeight] | None]) -> None:
        """Runs the packed model over the sequences, a block at a time."""
        self.front_packed()
        for index, block in enumerate(self._blocks):
            name = f"{self._prefix}.{index}"
            self._source.load(name, block, self._device)
            for layer, weight in (finished(index) or {}).items():
                put(block, layer.removeprefix(f"{name}."), weight.map(lambda tensor: tensor.to(self._device)))
            linears = [module for module in block.modules() if isinstance(module, QuantizedLinear)]
            for linear in linears:
                linear.hold(self._batches[0].full.dtype)
            self.through_packed(index)
            for linear in linears:
                linear.release()
            self._source.release(name, block)

    def _compare(self, head: nn.Module, tokens: Tensor, full_inputs: Tensor, inputs: Tensor) -> None:
        """Sums of a sequence's figures.

        Args:
            head: the packed model's.
            tokens: int64 [seqlen].
            full_inputs, inputs: of the full model's head and of the packed one's, [seqlen, features].
        """
        sums = dict.fromkeys(("nll", "full_nll", "kl", "agree", "flip"), 0.0)
        choices: list[Tensor] = []
        size = max(1, LOGITS // self._vocabulary(head, inputs))
        for start in range(0, len(tokens) - 1, size):
            part = slice(start, min(start + size, len(tokens) - 1))
            targets = tokens[part.start + 1 : part.stop + 1].to(self._device)
            full, packed = self._logits(head, full_inputs[part], True), self._logits(head, inputs[part], False)
            sums["nll"] += float(token_nll(packed, targets).double().sum())
            sums["full_nll"] += float(token_nll(full, targets).double().sum())
            sums["kl"] += float(token_kl(full, packed).double().sum())
            both = torch.stack([full.argmax(-1), packed.argmax(-1)])
            sums["agree"] += float((both[0] == both[1]).sum())
            sums["flip"] += float(((both[0] == targets) != (both[1] == targets)).sum())
            choices.append(both.cpu())
        self._rows.append(sums | {"count": float(len(tokens) - 1)})
        if len(self.choices) < SHOWN[0]:
            self.choices.append(torch.cat(choices, 1)[:, : SHOWN[1] - 1])

    def _vocabulary(self, head: nn.Module, inputs: Tensor) -> int:
        return self._logits(head, inputs[:1], False).shape[-1]

    def _logits(self, head: nn.Module, inputs: Tensor, full: bool) -> Tensor:
        """Of one model for inputs [places, features] of its head: [places, vocabulary]."""
        own: Any = self._head if full else head.forward
        return logits_of(self._model, self._blocks, head, self._device, lambda: own(inputs.unsqueeze(0)))[0]
