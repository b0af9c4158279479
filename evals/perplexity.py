"""Perplexity, and how far a model has moved from its baseline, on held-out text.

Protocol (the field's): all documents joined by two newlines and tokenized at once; sequences of `seqlen` tokens,
each predicted on its own, tokens after the first of a sequence scored; fp32 log-softmax; perplexity = exp of the
mean NLL over all scored tokens. Where the tokenizer puts a BOS token in front of text of its own accord, every sequence
begins with one. Sequences do not overlap unless a smaller `stride` is asked for: then each scores only the tokens that
the one before did not reach. A last, incomplete sequence is dropped.

With a baseline both models read the same sequences: KL(baseline || model) has far less noise than a difference
of perplexities. Standard errors are over sequences.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import QuantkitError
from quantkit.core.metrics import mean_and_error, token_kl, token_nll
from quantkit.run.text import EvaluationText

_POSITIONS = 512  # positions whose logits are turned to fp32 at once


@dataclass(frozen=True)
class Quality:
    """One model's figures on one text.

    Attributes:
        perplexity, perplexity_se: exp(mean NLL) and its standard error.
        nll: mean nats a token.
        bits_per_byte: mean bits a byte of text.
        tokens, windows: tokens scored, sequences they came from.
        available: sequences that the whole text has.
        kl, kl_se: mean KL(baseline || model) in nats a token; None without a baseline, like all that follows.
        top1_agreement: fraction of positions where both models' first choices are the same token.
        flip_rate: fraction of positions where exactly one of the two has the true token as its first choice.
        baseline_perplexity: of the baseline, on the same tokens.
    """

    perplexity: float
    perplexity_se: float
    nll: float
    bits_per_byte: float
    tokens: int
    windows: int
    available: int
    kl: float | None = None
    kl_se: float | None = None
    top1_agreement: float | None = None
    flip_rate: float | None = None
    baseline_perplexity: float | None = None


class Stopped(KeyboardInterrupt):
    """A measurement that was stopped by hand.

    Attributes:
        measured: what was found until then.
    """

    def __init__(self, measured: Any) -> None:
        super().__init__()
        self.measured = measured


def evaluate(
    model: Any,
    text: EvaluationText,
    seqlen: int,
    *,
    stride: int | None = None,
    prefix: int = 0,
    baseline: Any = None,
    num_samples: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Measures a causal language model.

    Args:
        model: a transformers model in evaluation mode.
        text: whole.
        seqlen: tokens a sequence, a BOS token in front included.
        stride: tokens between sequences; by default as many as a sequence takes from the text.
        prefix: so many of a sequence's first tokens, and the one after, are not scored.
        baseline: the model to compare with, of the same vocabulary.
        num_samples: stop after so many sequences.
        progress: called with (sequences done, sequences in all).

    Raises:
        QuantkitError: the text is shorter than a sequence, or the stride makes no sense.
        Stopped: on Ctrl-C, once a sequence is measured; it holds the figures of those that are.
    """
    body = text.body(seqlen)
    stride = body if stride is None else stride
    if num_samples is not None and num_samples < 1:
        raise QuantkitError(f"`num_samples` {num_samples}: measure at least one sequence")
    if not 1 <= stride <= seqlen:
        raise QuantkitError(f"`stride` {stride}: use 1 to {seqlen}, the tokens of a sequence")
    stride = min(stride, body)
    if not 0 <= prefix < seqlen - 1:
        raise QuantkitError(f"a prefix of {prefix} leaves nothing to score of sequences of {seqlen} tokens")
    available = range(0, len(text.tokens) - body + 1, stride)
    starts = list(available)[:num_samples]
    if not starts:
        raise QuantkitError(
            f"the text has {len(text.tokens)} tokens, one sequence takes {seqlen}; use a shorter `seqlen`"
        )
    rows: list[dict[str, float]] = []
    try:
        for index, start in enumerate(starts):
            window = text.sequence(start, seqlen)
            first = max(1 if index == 0 or stride == body else seqlen - stride, prefix + 1)
            rows.append(_score_window(model, baseline, window, first))
            progress(index + 1, len(starts))
    except KeyboardInterrupt:
        if not rows:
            raise
        raise Stopped(_quality(rows, text, len(available))) from None
    return _quality(rows, text, len(available))


def _quality(rows: list[dict[str, float]], text: EvaluationText, available: int) -> Quality:
    """The figures of sequences whose sums `_score_window` gave.

    Raises:
        QuantkitError: the model predicts NaN.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    counts = torch.tensor(columns.pop("count"), dtype=torch.float64)
    means = {name: mean_and_error(values, counts) for name, values in columns.items()}
    nll, nll_se = means["nll"]
    if not math.isfinite(nll):
        raise QuantkitError(
            "the model predicts NaN; its weights are damaged, or its dtype overflows: try `dtype` float32"
        )
    compared: dict[str, float] = {}
    if "kl" in means:
        compared = {
            "kl": means["kl"][0],
            "kl_se": means["kl"][1],
            "top1_agreement": means["agree"][0],
            "flip_rate": means["flip"][0],
            "baseline_perplexity": math.exp(means["base_nll"][0]),
        }
    return Quality(
        perplexity=math.exp(min(nll, 700.0)),
        perplexity_se=math.exp(min(nll, 700.0)) * nll_se,
        nll=nll,
        bits_per_byte=nll / math.log(2) / text.bytes_per_token,
        tokens=int(counts.sum()),
        windows=len(rows),
        available=available,
        **compared,
    )


@torch.no_grad()
def _score_window(model: Any, baseline: Any, window: Tensor, first: int) -> dict[str, float]:
    """Sums over the scored tokens (those from position `first` on) of one sequence."""
    logits = model(input_ids=window.unsqueeze(0).to(model.device), use_cache=False).logits[0]
    sums = {"nll": 0.0, "count": float(len(window) - first)}
    base = None
    if baseline is not None:
        base = baseline(input_ids=window.unsqueeze(0).to(baseline.device), use_cache=False).logits[0].to(logits.device)
        if base.shape != logits.shape:
            raise QuantkitError(f"the baseline has a vocabulary of {base.shape[1]}, the model one of {logits.shape[1]}")
        sums |= {"base_nll": 0.0, "kl": 0.0, "agree": 0.0, "flip": 0.0}
    for part in _slices(first, len(window)):
        predicting = slice(part.start - 1, part.stop - 1)
        targets = window[part].to(logits.device)
        sums["nll"] += float(token_nll(logits[predicting], targets).double().sum())
        if base is not None:
            sums["base_nll"] += float(token_nll(base[predicting], targets).double().sum())
            sums["kl"] += float(token_kl(base[predicting], logits[predicting]).double().sum())
            choice, base_choice = logits[predicting].argmax(-1), base[predicting].argmax(-1)
            sums["agree"] += float((choice == base_choice).sum())
            sums["flip"] += float(((choice == targets) != (base_choice == targets)).sum())
    return sums


def _slices(start: int, stop: int) -> Iterator[slice]:
    for first in range(start, stop, _POSITIONS):
        yield slice(first, min(first + _POSITIONS, stop))
