"""What a student learns from: the teacher's predictions, from the model itself or from a cache of them on disk.

The cache holds the log-probabilities of the top-k tokens at each place; the rest of the vocabulary counts as one event,
the tail. KL over these k + 1 events is never more than the full KL (merging events loses information); by how
much it is less is measured on the held-out sequences and said.
"""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.core.metrics import token_kl
from quantkit.io.run_folder import RunFolder
from quantkit.io.shards import checksum_of, open_shard

FILE_SEQUENCES = 64
"""Sequences in one file of a cache: what an interrupted run has to compute anew, at most."""


@dataclass(frozen=True)
class Predictions:
    """A model's outputs.

    Attributes:
        logits: [sequences, length, vocabulary].
        hidden: what the head reads, [sequences, length, features].
    """

    logits: Tensor
    hidden: Tensor


def predict(model: PreTrainedModel, tokens: Tensor, mixed: bool = False) -> Predictions:
    """A forward pass of int64 [sequences, length].

    Args:
        model: student or teacher.
        tokens: of the text.
        mixed: multiply in bf16 and add up in fp32, by torch's autocast.
    """
    hidden: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _module, args: hidden.append(args[0]))
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
            logits = model(input_ids=tokens.to(model.device), use_cache=False).logits
    finally:
        handle.remove()
    return Predictions(logits, hidden[-1])


class Teacher:
    """The full-precision model, asked each time.

    Args:
        model: in evaluation mode.
        mixed: see `predict`.
    """

    def __init__(self, model: PreTrainedModel, mixed: bool = False) -> None:
        self.model, self.mixed = model, mixed

    def divergence(self, tokens: Tensor, indices: Tensor, found: Predictions) -> tuple[Tensor, Tensor | None]:
        """How far a student is from the teacher.

        Args:
            tokens: int64 [sequences, length].
            indices: of those sequences in the text.
            found: the student's outputs.

        Returns:
            (KL(teacher || student) [sequences, length]; squared distance of what the heads read, relative to the
            teacher's size, of the same shape, or None where it is not known).

        Raises:
            QuantkitError: logits of another shape.
        """
        with torch.no_grad():
            wanted = predict(self.model, tokens, self.mixed)
        logits, hidden = wanted.logits.to(found.logits.device), wanted.hidden.to(found.hidden.device).float()
        if logits.shape != found.logits.shape:
            raise QuantkitError(
                f"the teacher's logits are {tuple(logits.shape)}, the model's {tuple(found.logits.shape)}"
            )
        distance = None
        if hidden.shape == found.hidden.shape:
            difference = (found.hidden.float() - hidden).square().sum(-1)
            distance = difference / hidden.square().sum(-1).clamp_min(1e-30)
        return token_kl(logits, found.logits), distance


class CachedTeacher:
    """A teacher's predictions, read from disk.

    Args:
        cache: filled by `fill`.
    """

    def __init__(self, cache: RunFolder) -> None:
        self._cache = cache
        self._files: dict[int, Any] = {}

    @staticmethod
    def fill(
        cache: RunFolder,
        model: PreTrainedModel,
        sequences: Tensor,
        top: int,
        progress: Callable[[int, int], None],
        mixed: bool = False,
    ) -> "CachedTeacher":
        """Makes what is not there yet.

        Args:
            cache: where.
            model: the teacher.
            sequences: int64 [sequences, length].
            top: k, the likeliest tokens that are kept.
            progress: called with (sequences done, sequences in all).
            mixed: see `predict`.

        Raises:
            QuantkitError: the folder holds a cache of another text, another k or another teacher, or is being filled.
        """
        if top < 1:
            raise QuantkitError(f"{top} kept tokens: keep at least 1")
        top = min(top, model.config.get_text_config().vocab_size)
        with torch.no_grad():
            probe = predict(model, sequences[:1]).logits.double().sum()
        identity = {
            "tokens": hashlib.sha256(sequences.numpy().tobytes()).hexdigest(),
            "top": top,
            "teacher": f"{float(probe):.6g}",
            "mixed": mixed,
        }
        parts = {_file(first // FILE_SEQUENCES): first for first in range(0, len(sequences), FILE_SEQUENCES)}
        whole = all(map(cache.has, parts))
        with nullcontext() if whole and not cache.differing(identity) else cache.begin(identity):
            for name, first in parts.items():
                if not cache.has(name):
                    kept = [
                        _likeliest(model, tokens, top, mixed)
                        for tokens in sequences[first : first + FILE_SEQUENCES].split(4)
                    ]
                    tensors = {name: torch.cat([part[name] for part in kept]) for name in kept[0]}
                    save = partial(save_file, tensors, metadata={"checksum": checksum_of(tensors)})
                    cache.write(name, save, sum(tensor.nbytes for tensor in tensors.values()))
                progress(min(first + FILE_SEQUENCES, len(sequences)), len(sequences))
        return CachedTeacher(cache)

    def divergence(self, tokens: Tensor, indices: Tensor, found: Predictions) -> tuple[Tensor, Tensor | None]:
        """See `Teacher`; KL over the top-k tokens and the tail, fp32 [sequences, length], and None for hidden states.

        Raises:
            CheckpointError: a file of the cache is not as it was written.
        """
        rows = [self._sequence(int(index)) for index in indices]
        logs = torch.stack([row["logs"] for row in rows]).to(found.logits.device).float()
        kept = torch.stack([row["tokens"] for row in rows]).to(found.logits.device).long()
        own = torch.log_softmax(found.logits.float(), -1).gather(-1, kept)
        tail, own_tail = _log_rest(logs), _log_rest(own)
        return (logs.exp() * (logs - own)).sum(-1) + tail.exp() * (tail - own_tail), None

    def _sequence(self, index: int) -> dict[str, Tensor]:
        file, row = divmod(index, FILE_SEQUENCES)
        if file not in self._files:
            self._files[file] = _opened(self._cache.path(_file(file)))
        return {name: self._files[file].get_slice(name)[row] for name in ("logs", "tokens")}


def _opened(path: Path) -> Any:
    """A file of a cache, as it was written.

    Raises:
        CheckpointError: it is damaged.
    """
    part, way = open_shard(path), "remove it, and the next run makes it anew"
    try:
        tensors = {name: part.get_tensor(name) for name in part.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); {way}") from error
    if (part.metadata() or {}).get("checksum") != checksum_of(tensors):
        raise CheckpointError(f"{path} is not as it was written; {way}")
    return part


def _likeliest(model: PreTrainedModel, tokens: Tensor, top: int, mixed: bool) -> dict[str, Tensor]:
    with torch.no_grad():
        logs = torch.log_softmax(predict(model, tokens, mixed).logits.float(), -1)
    values, kept = logs.topk(top)
    return {"logs": values.half().cpu().contiguous(), "tokens": kept.int().cpu().contiguous()}


def _log_rest(logs: Tensor) -> Tensor:
    """log(1 - sum of the probabilities), bounded below where rounding leaves nothing."""
    return torch.log((1 - logs.exp().sum(-1)).clamp_min(1e-6))


def _file(index: int) -> str:
    return f"teacher-{index:05d}.safetensors"
