"""Documents in, sequences of tokens out."""

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import CalibrationError, QuantkitError
from quantkit.run.documents import Document

logger = logging.getLogger(__name__)

_PIECE = 8
"""Characters that are drawn together, a token of a sequence: about two sequences. The more places a text is read in,
the more it is like another."""
_TOGETHER = 100_000  # characters that are tokenized together


def calibration_sequences(texts: list[Document], tokenizer: Any, num_samples: int, seqlen: int, seed: int) -> Tensor:
    """Draws non-overlapping sequences from random places of the text; see `sequences_apart`, which holds none out."""
    return sequences_apart(texts, tokenizer, num_samples, seqlen, seed, 0)[0]


def sequences_apart(
    texts: list[Document], tokenizer: Any, num_samples: int, seqlen: int, seed: int, held_out: int
) -> tuple[Tensor, Tensor]:
    """Draws non-overlapping sequences from random places of the text, and after them others that are held out.

    Pieces of the text are shuffled by `seed` and joined by two newlines until they fill the sequences, short documents
    with one another; documents of token ids are put one behind the other. A sequence begins with the tokenizer's BOS
    token where the tokenizer adds one of its own accord. The first sequences are the same however many are held out;
    of those each is from a piece of its own, as far as the text goes.

    Returns:
        (int64 [samples, seqlen]; int64 [held_out, seqlen]), fewer of either where the text is short, with a warning
        about the first; of the second there may be none.

    Raises:
        CalibrationError: the text does not fill one sequence.
    """
    runs = _token_runs(texts, tokenizer, seed, seqlen)
    bos = _leading_bos(tokenizer)
    body = seqlen - len(bos)
    tokens: list[int] = []
    for run in runs:
        tokens.extend(run)
        if len(tokens) >= num_samples * body:
            break
    count = min(num_samples, len(tokens) // body)
    if not tokens:
        raise CalibrationError("the calibration text is empty; give documents with text")
    if count == 0:
        raise CalibrationError(
            f"the calibration text has {len(tokens)} tokens, one sequence takes seqlen={seqlen}; "
            f"give more text or `seqlen` {max(2, len(tokens) // 2)}"
        )
    if count < num_samples:
        logger.warning("the calibration text holds only %d sequences of %d tokens, not %d", count, seqlen, num_samples)
    others = _spread(tokens[count * body :], runs, body, held_out)
    front = torch.tensor(bos, dtype=torch.int64)
    first, second = (
        torch.cat([front.expand(len(rows), -1), torch.tensor(rows, dtype=torch.int64).view(-1, body)], dim=1)
        for rows in ([tokens[i * body : (i + 1) * body] for i in range(count)], others)
    )
    return first, second


def _token_runs(texts: list[Document], tokenizer: Any, seed: int, seqlen: int) -> Iterator[list[int]]:
    """The shuffled pieces of the text, of about two sequences, as tokens; short texts together."""
    of_text, of_tokens = max(1024, _PIECE * seqlen), 2 * seqlen
    pieces = [
        text[i : i + size]
        for text in texts
        for size in (of_text if isinstance(text, str) else of_tokens,)
        for i in range(0, len(text), size)
        if not isinstance(text, str) or text.strip()
    ]
    random.Random(seed).shuffle(pieces)
    group: list[str] = []
    for index, piece in enumerate(pieces):
        tokens: list[int] = []
        if isinstance(piece, str):
            group.append(piece)
        if group and (not isinstance(piece, str) or sum(map(len, group)) >= _TOGETHER or index == len(pieces) - 1):
            tokens.extend(_encode(tokenizer, "\n\n".join(group) + "\n\n"))
            group = []
        if not isinstance(piece, str):
            tokens.extend(piece)
        if tokens:
            yield tokens


def _spread(rest: list[int], runs: Iterator[list[int]], body: int, count: int) -> list[list[int]]:
    """Sequences of `body` tokens, at most `count`, each from another run as far as there are so many.

    Args:
        rest: what is left of the run that was read last; it serves last.
        runs: those that follow; no more of them are read than are needed.
    """
    places: list[list[int]] = []
    open_run: list[int] = []
    while len(places) < count and (run := next(runs, None)) is not None:
        open_run = open_run + run
        if len(open_run) >= body:
            places.append(open_run)
            open_run = []
    places.append(rest)
    found: list[list[int]] = []
    for start in range(0, max(map(len, places)), body):
        found += [place[start : start + body] for place in places if len(place) >= start + body]
        if len(found) >= count:
            break
    return found[:count]


@dataclass(frozen=True)
class EvaluationText:
    """Text that a model is measured on.

    Attributes:
        tokens: int64 [count], all documents joined by two newlines and tokenized at once.
        bytes_per_token: of its UTF-8.
        bos: token that begins every sequence, as in calibration, where the tokenizer adds one of its own accord; None
            for none. A model that was trained with one in front loses much without (gemma-3-270m: perplexity 294
            instead of 64).
    """

    tokens: Tensor
    bytes_per_token: float
    bos: int | None = None

    def body(self, seqlen: int) -> int:
        """Tokens of the text in a sequence of `seqlen` tokens."""
        return seqlen - (self.bos is not None)

    def sequence(self, start: int, seqlen: int) -> Tensor:
        """int64 [seqlen], of the text from token `start` on."""
        body = self.tokens[start : start + self.body(seqlen)]
        return body if self.bos is None else torch.cat([torch.tensor([self.bos]), body])


def evaluation_text(texts: list[Document], tokenizer: Any, bos: bool = True) -> EvaluationText:
    """Documents as models are measured on them.

    Args:
        texts: the documents.
        tokenizer: of the model.
        bos: begin every sequence with the BOS token of a tokenizer that adds one; otherwise the first sequence alone,
            as the field's older figures do.

    Raises:
        QuantkitError: fewer than two tokens, or documents of token ids, whose bytes are not known.
    """
    if not all(isinstance(text, str) for text in texts):
        raise QuantkitError("a model is measured on text, by its bytes; rows of 'input_ids' are for calibration")
    text = "\n\n".join(map(str, texts))
    leading = _leading_bos(tokenizer) if bos else []
    tokens = torch.tensor(_encode(tokenizer, text, add_special_tokens=not leading))
    if len(tokens) < 2:
        raise QuantkitError(f"the evaluation text has {len(tokens)} tokens; there is nothing to predict")
    return EvaluationText(tokens, len(text.encode()) / len(tokens), leading[0] if leading else None)


def _encode(tokenizer: Any, text: str, add_special_tokens: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


def _leading_bos(tokenizer: Any) -> list[int]:
    plain, special = _encode(tokenizer, "a"), _encode(tokenizer, "a", add_special_tokens=True)
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and special[:1] == [bos] and plain[:1] != [bos] else []
