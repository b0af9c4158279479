import logging

import pytest
import torch

from quantkit.core.errors import CalibrationError, QuantkitError
from quantkit.run.corpus import HELD_OUT_MODULES, standard_library
from quantkit.run.text import calibration_sequences, evaluation_text


def test_held_out_text_is_kept_apart():
    train, held_out = standard_library("train"), standard_library("held_out")
    assert not set(train) & set(held_out)
    assert len(held_out) >= len(HELD_OUT_MODULES)
    assert any("class ArgumentParser" in text for text in held_out)
    assert not any("class ArgumentParser" in text for text in train)


def test_windows_are_real_text_and_follow_the_seed(tokenizer, texts):
    windows = calibration_sequences(texts, tokenizer, 8, 64, seed=0)
    assert windows.shape == (8, 64)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, calibration_sequences(texts, tokenizer, 8, 64, seed=0))
    assert not torch.equal(windows, calibration_sequences(texts, tokenizer, 8, 64, seed=1))
    decoded = tokenizer.decode(windows[0])
    assert any(decoded[10:60] in text for text in texts)


def test_short_text(tokenizer, caplog):
    with pytest.raises(CalibrationError, match=r"one sequence takes seqlen=64; give more text or `seqlen`"):
        calibration_sequences(["just a few words"], tokenizer, 8, 64, seed=0)
    with caplog.at_level(logging.WARNING):
        windows = calibration_sequences(["many words " * 200], tokenizer, 1000, 64, seed=0)
    assert 0 < len(windows) < 1000
    assert "only" in caplog.text


class WithBos:
    """A tokenizer that begins every text with a token of its own, as Llama's and Gemma's do."""

    bos_token_id = 3

    def __call__(self, text, add_special_tokens=False, verbose=True):
        return {"input_ids": [self.bos_token_id] * add_special_tokens + [10 + ord(letter) for letter in text]}


def test_evaluation_joins_documents(tokenizer):
    text = evaluation_text(["ab", "cd é"], tokenizer)
    assert tokenizer.decode(text.tokens) == "ab\n\ncd é"
    assert text.bytes_per_token == len("ab\n\ncd é".encode()) / len(text.tokens)
    assert text.bos is None and text.body(5) == 5
    with pytest.raises(QuantkitError, match="nothing to predict"):
        evaluation_text([""], tokenizer)


def test_evaluation_puts_the_bos_token_where_calibration_has_it():
    text = evaluation_text(["abcdef"], WithBos())
    assert text.bos == 3 and 3 not in text.tokens
    assert text.sequence(2, 4).tolist() == [3, 109, 110, 111]
    assert calibration_sequences(["abcdef" * 9], WithBos(), 2, 4, seed=0)[:, 0].tolist() == [3, 3]
    plain = evaluation_text(["abcdef"], WithBos(), bos=False)
    assert plain.bos is None and plain.tokens[0] == 3, "the first sequence alone has one"
