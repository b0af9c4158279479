"""A conversation with a model, turn by turn; what was said stays in its cache of keys and values."""

from collections.abc import Callable
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import StoppingCriteria, TextStreamer

from quantkit.core.errors import QuantkitError, first_line
from quantkit.kvcache.cache import cache_argument
from quantkit.models.structure import context_length

LEAST = 4
"""An answer has room for a quarter of the context at least, or for what is asked for; former turns make way for it."""


def check_template(tokenizer: Any, system: str | None = None) -> None:
    """Looks whether a conversation can be had by a tokenizer's chat template.

    Raises:
        QuantkitError: it has none, or it refuses a first turn.
    """
    if not tokenizer.chat_template:
        raise QuantkitError(
            "the tokenizer has no chat template, so the model was not made for conversations; "
            "`quantkit generate` without --chat goes on from any text"
        )
    rendered(tokenizer, [*_beginning(system), {"role": "user", "content": "?"}])


def rendered(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    """Turns in the chat template's words, up to where the model's answer begins.

    Raises:
        QuantkitError: the template refuses them, as some do a system's, or cannot be read.
    """
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        hint = "; leave `system` out" if turns[0]["role"] == "system" else ""
        raise QuantkitError(f"the tokenizer's chat template refuses this ({first_line(error)}){hint}") from error


def _beginning(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


class Conversation:
    """Turns between a user and a model, by the tokenizer's chat template.

    Args:
        model: a causal language model on its device, in eval mode.
        tokenizer: its own, with a chat template.
        system: a message in front of all turns; None for the template's own.
        max_new_tokens: of an answer, at most.
        make_cache: makes an empty cache of keys and values; None for the model's own kind.
        generation: further arguments of `model.generate`.

    Attributes:
        messages: what was said, in the template's form.
        tokens: of the last turn: read anew, and written.
        forgotten: how many former turns made way in the last one.
        stopped: set it, from anywhere, to end the answer that is being written.

    Raises:
        QuantkitError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        system: str | None = None,
        *,
        max_new_tokens: int = 1024,
        make_cache: Callable[[], Any] | None = None,
        generation: dict[str, Any] | None = None,
    ) -> None:
        check_template(tokenizer, system)
        self._model, self._tokenizer, self._make_cache = model, tokenizer, make_cache
        self._most, self._generation = max_new_tokens, generation or {}
        self._first = _beginning(system)
        self.tokens = (0, 0)
        self.begin()

    def begin(self) -> None:
        """Forgets all turns."""
        self.messages: list[dict[str, str]] = [*self._first]
        self.stopped, self.forgotten = False, 0
        self._forget()

    def _forget(self) -> None:
        """An empty cache."""
        self._cache, self._cached, self._text = None, torch.empty(0, dtype=torch.int64), ""

    @torch.no_grad()
    def answer(self, said: str, write: Callable[[str], None] = lambda text: None) -> str:
        """The model's next turn.

        Args:
            said: the user's.
            write: called with pieces of the answer as they come.

        Returns:
            The whole answer, or what there was of it when `stopped` was set.

        Raises:
            QuantkitError: this turn alone is longer than the model's context.
        """
        self.stopped, self.forgotten = False, 0
        turns, tokens, room = self._prompt([*self.messages, {"role": "user", "content": said}])
        if self._cache is None and self._make_cache is not None:
            self._cache = self._make_cache()
        settings: dict[str, Any] = self._generation | {"max_new_tokens": room}
        if self._cache is not None:
            settings[cache_argument(self._model)] = self._cache
        ids = tokens[None].to(self._model.device)
        try:
            found = self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), streamer=_Writer(self._tokenizer, write),
                stopping_criteria=[_Stopped(self)], return_dict_in_generate=True, **settings,
            )  # fmt: skip
        except BaseException:
            self._forget()  # it may hold a part of the answer
            raise
        made = found.sequences[0, len(tokens) :].cpu()
        self.tokens = (len(tokens) - max(len(self._cached) - 1, 0), len(made))
        self._cache, self._cached = getattr(found, cache_argument(self._model)), torch.cat([tokens, made])
        self._text += self._tokenizer.decode(made, clean_up_tokenization_spaces=False)
        text: str = self._tokenizer.decode(made, skip_special_tokens=True)
        self.messages = [*turns, {"role": "assistant", "content": text}]
        return text

    def _prompt(self, turns: list[dict[str, str]]) -> tuple[list[dict[str, str]], torch.Tensor, int]:
        """(the turns that there is room for; all their tokens, int64 [n]; how many may be written).

        Where room has to be made, enough is made for the next turns too: these then find in the cache what is left.
        """
        context = context_length(self._model)
        least = min(self._most, context // LEAST) if context else self._most
        wanted = least
        while True:
            text = rendered(self._tokenizer, turns)
            goes_on = bool(self._text) and text.startswith(self._text)
            rest = text.removeprefix(self._text) if goes_on else text
            asked = self._tokenizer(rest, add_special_tokens=False, return_tensors="pt", verbose=False)
            new = asked.input_ids[0].long()
            tokens = torch.cat([self._cached, new]) if goes_on else new
            left = self._most if context is None else context - len(tokens)
            may_forget = len(turns) >= len(self._first) + 3
            if left >= wanted or (left >= least and not may_forget):
                break
            if not may_forget:
                raise QuantkitError(f"{len(tokens)} tokens, and the model's context has {context}; say it shorter")
            del turns[len(self._first) : len(self._first) + 2]
            self.forgotten += 1
            wanted = context // 2 if context else least
        if not goes_on:
            self._forget()
        self._text = text
        return turns, tokens, min(self._most, left)


class _Writer(TextStreamer):
    """Hands on pieces of text as they come."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece of text that will not change any more."""
        self._write(text)


class _Stopped(StoppingCriteria):
    """Ends an answer that its conversation has stopped."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_more: Any) -> torch.Tensor:
        """bool [batch] for int64 [batch, tokens]."""
        return torch.full((len(input_ids),), self._conversation.stopped, device=input_ids.device)
