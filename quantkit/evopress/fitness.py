"""How good an assignment is: KL of the compressed model's predictions to the full model's, on some of the text."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from quantkit.core.metrics import token_nll
from quantkit.evopress.evolve import Assignment, Space
from quantkit.run.teacher import CachedTeacher, Teacher, predict

Measure = Literal["kl", "perplexity"]


def sequences_for(tokens: int, drawn: int, seqlen: int) -> int:
    """How many of the `drawn` sequences of `seqlen` tokens come nearest to `tokens` of text; one at least."""
    return max(1, min(drawn, round(tokens / seqlen)))


class ModelFitness:
    """Measures assignments on a model; several processes share them out.

    An assignment is measured by one process as a whole, so that figures do not depend on their number.

    Args:
        space: the model and what assignments mean.
        teacher: the full model's predictions of `sequences`.
        sequences: int64 [sequences, length].
        held_out: so many of the first sequences are never drawn; `on` measures them.
        measure: "kl", or "perplexity", the mean negative log-likelihood of the text.
        mixed: see `run.teacher.predict`.
        micro_batch: sequences that run through the model together.

    Attributes:
        evaluations: assignments that were measured so far, by all processes.
        tokens: of text that they were measured on, all added up.
    """

    def __init__(
        self,
        space: Space,
        teacher: CachedTeacher | Teacher,
        sequences: Tensor,
        held_out: int = 0,
        measure: Measure = "kl",
        mixed: bool = False,
        micro_batch: int = 4,
    ) -> None:
        self.space, self.sequences, self._held_out = space, sequences, held_out
        self.teacher, self._measure, self.mixed, self._micro_batch = teacher, measure, mixed, micro_batch
        self._processes = PartialState()
        self.evaluations = self.tokens = 0

    def __call__(self, assignments: Sequence[Assignment], tokens: int, draw: int) -> list[float]:
        """See `evolve.Fitness`."""
        drawn = len(self.sequences) - self._held_out
        count = sequences_for(tokens, drawn, self.sequences.shape[1])
        generator = torch.Generator().manual_seed(7_368_787 + draw)
        return self.on(assignments, self._held_out + torch.randperm(drawn, generator=generator)[:count])

    def on(self, assignments: Sequence[Assignment], indices: Tensor) -> list[float]:
        """Each assignment's figure on the sequences with these indices, int64 [n]."""
        found = torch.zeros(len(assignments), dtype=torch.float64)
        processes = self._processes
        self.evaluations += len(assignments)
        self.tokens += len(assignments) * len(indices) * self.sequences.shape[1]
        for place in range(processes.process_index, len(assignments), processes.num_processes):
            found[place] = self.each(assignments[place], indices).mean()
        if processes.num_processes > 1:
            found = reduce(found.to(processes.device), "sum").cpu()
        return [figure if math.isfinite(figure) else math.inf for figure in found.tolist()]

    @torch.no_grad()
    def each(self, assignment: Assignment, indices: Tensor) -> Tensor:
        """An assignment's figure on each sequence, fp64 [len(indices)]."""
        self.space.apply(assignment)
        return torch.cat([self._loss(part).double().mean(1).cpu() for part in indices.split(self._micro_batch)])

    def _loss(self, indices: Tensor) -> Tensor:
        tokens = self.sequences[indices]
        predictions = predict(self.space.model, tokens, self.mixed)
        if self._measure == "kl":
            return self.teacher.divergence(tokens, indices, predictions)[0]
        return token_nll(predictions.logits[:, :-1], tokens[:, 1:].to(predictions.logits.device))
