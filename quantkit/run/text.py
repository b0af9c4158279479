"""Text in, sequences of tokens out: named datasets, files, and datasets of the hub."""

import json
import logging
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import CalibrationError, QuantkitError, UnknownName, first_line
from quantkit.run.corpus import standard_library

logger = logging.getLogger(__name__)

_HUB_NAMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: (arguments of datasets.load_dataset for calibration, the same for evaluation)
    "wikitext2": (
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
    ),
    "c4": (
        {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"},
        {"path": "allenai/c4", "data_files": {"val": "en/c4-validation.00000-of-00008.json.gz"}, "split": "val"},
    ),
}
_NAMES = ("c4", "stdlib", "wikitext2")
_PIECE = 100_000  # characters that are drawn together
_MOST_HUB_ROWS = 20_000


def documents(source: str, purpose: str) -> list[str]:
    """Reads the documents of a source.

    Args:
        source: "wikitext2", "c4", "stdlib" (this Python's own library; no network), a .txt, .jsonl or .json file
            (JSON rows with a "text" field), or the id of a hub dataset with a "text" column.
        purpose: "calibration" or "evaluation"; named sources keep the two apart.

    Raises:
        UnknownName: neither a name, a file nor a hub id.
        QuantkitError: the text cannot be read, or there is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        texts = _read_file(path)
    elif source == "stdlib":
        texts = standard_library("train" if purpose == "calibration" else "held_out")
    elif source in _HUB_NAMES:
        texts = _read_hub(source, _HUB_NAMES[source][purpose == "evaluation"])
    elif path.exists():
        raise QuantkitError(f"{source} is not a file; give a .txt or .jsonl file, or one of {', '.join(_NAMES)}")
    elif source.count("/") == 1 and not path.suffix and not source.startswith((".", "~", "/")):
        texts = _read_hub(source, {"path": source, "split": "train" if purpose == "calibration" else "test"})
    elif os.sep in source or path.suffix:
        raise QuantkitError(f"no file {source!r}; give a .txt or .jsonl file, or one of {', '.join(_NAMES)}")
    else:
        raise UnknownName("dataset", source, _NAMES)
    if not any(text.strip() for text in texts):
        raise CalibrationError(f"{source} holds no text")
    return texts


def _read_file(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QuantkitError(f"{path} cannot be read as UTF-8 text ({error})") from error
    if path.suffix not in (".jsonl", ".json"):
        return [content]
    try:
        rows = (
            json.loads(content)
            if path.suffix == ".json"
            else [json.loads(row) for row in content.splitlines() if row.strip()]
        )
        texts = [row["text"] for row in rows]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a 'text' that is no string")
        return texts
    except (ValueError, KeyError, TypeError) as error:
        raise QuantkitError(f"{path}: rows must be JSON objects with a 'text' field ({error!r})") from error


def _read_hub(source: str, arguments: dict[str, Any]) -> list[str]:
    from datasets import load_dataset  # slow to import, and needed only here

    try:
        rows = load_dataset(**arguments, streaming="c4" in arguments["path"])
        texts: list[str] = []
        for row in rows:
            texts.append(row["text"])
            if len(texts) == _MOST_HUB_ROWS and "wikitext" not in arguments["path"]:
                break
        return texts
    except Exception as error:  # datasets raises whatever its many back ends raise
        raise QuantkitError(
            f"dataset {source!r} cannot be fetched ({first_line(error)}); without the hub, give a text file or 'stdlib'"
        ) from error


def calibration_sequences(texts: list[str], tokenizer: Any, num_samples: int, seqlen: int, seed: int) -> Tensor:
    """Draws non-overlapping sequences from random places of the text.

    Pieces of the text are shuffled by `seed` and joined by two newlines until they fill the sequences. A sequence
    begins with the tokenizer's BOS token where the tokenizer adds one of its own accord.

    Returns:
        int64 [samples, seqlen]; fewer samples than asked for where the text is short, with a warning.

    Raises:
        CalibrationError: the text does not fill one sequence.
    """
    pieces = [text[i : i + _PIECE] for text in texts for i in range(0, len(text), _PIECE) if text.strip()]
    random.Random(seed).shuffle(pieces)
    bos = _leading_bos(tokenizer)
    body = seqlen - len(bos)
    tokens: list[int] = []
    group: list[str] = []
    for index, piece in enumerate(pieces):
        group.append(piece)
        if sum(map(len, group)) >= _PIECE or index == len(pieces) - 1:
            tokens.extend(_encode(tokenizer, "\n\n".join(group) + "\n\n"))
            group = []
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
    sequences = torch.tensor(tokens[: count * body]).view(count, body)
    return torch.cat([torch.tensor(bos, dtype=torch.int64).expand(count, -1), sequences], dim=1)


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


def evaluation_text(texts: list[str], tokenizer: Any, bos: bool = True) -> EvaluationText:
    """Documents as models are measured on them.

    Args:
        texts: the documents.
        tokenizer: of the model.
        bos: begin every sequence with the BOS token of a tokenizer that adds one; otherwise the first sequence alone,
            as the field's older figures do.

    Raises:
        QuantkitError: fewer than two tokens.
    """
    text = "\n\n".join(texts)
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
