"""Conversations: what is remembered, what is forgotten, and that the cache changes no answer."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.core.errors import QuantkitError
from quantkit.serve.chat import Conversation

TURNS = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def model(reference):
    return AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()


@pytest.fixture
def tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def afresh(model, tokenizer, messages, count):
    """What the model says without a cache of former turns."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def talk(model, tokenizer, **settings):
    return Conversation(
        model, tokenizer, **{"max_new_tokens": 8, "generation": {"do_sample": False, "pad_token_id": 0}} | settings
    )


def test_turns_go_on_from_the_cache(model, tokenizer):
    made, pieces = talk(model, tokenizer, system="be brief"), []
    first = made.answer("def main():", pieces.append)
    assert first and "".join(pieces) == first
    assert first == afresh(model, tokenizer, made.messages[:2], 8)
    read_first = made.tokens[0]
    second = made.answer("import os")
    assert [message["role"] for message in made.messages] == ["system", *["user", "assistant"] * 2]
    assert second == afresh(model, tokenizer, made.messages[:4], 8)
    assert made.tokens[0] < read_first + 8, "former turns are not read again"
    made.begin()
    assert made.answer("def main():") == first


def test_what_the_template_takes_away_is_read_anew(model, tokenizer):
    """As templates do that drop a model's thoughts from former turns."""
    tokenizer.chat_template = TEMPLATE.replace("turn.content", "turn.content[:3]")
    made = talk(model, tokenizer)
    made.answer("def main():")
    second = made.answer("import os")
    assert second == afresh(model, tokenizer, made.messages[:3], 8)
    assert made.tokens[0] > 8


def test_former_turns_make_way(model, tokenizer):
    """The reference model's context is 512 tokens."""
    made = talk(model, tokenizer, system="keep this")
    for _ in range(4):
        made.answer("x = 1\n" * 50)
    assert made.forgotten and made.messages[0]["content"] == "keep this"
    assert made.messages[-2]["content"].startswith("x = 1")
    before = [*made.messages]
    with pytest.raises(QuantkitError, match="say it shorter"):
        made.answer("x = 1\n" * 500)
    assert made.messages == before


def test_room_is_made_for_the_next_turns_too(model, tokenizer):
    made, forgotten, read = talk(model, tokenizer), [], []
    for _ in range(16):
        made.answer("x = 1\n" * 12)
        forgotten.append(made.forgotten)
        read.append(made.tokens[0])
    full = next(turn for turn, count in enumerate(forgotten) if count)
    assert forgotten[full] > 1 and not any(forgotten[full + 1 : full + 3])
    assert all(count < read[full] / 2 for count in read[full + 1 : full + 3]), "they are read from the cache"


def test_templates_that_refuse(model, tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    talk(model, tokenizer)
    with pytest.raises(QuantkitError, match=r"refuses this \(no system\); leave `system` out"):
        talk(model, tokenizer, system="be brief")
    tokenizer.chat_template = "{% if"
    with pytest.raises(QuantkitError, match="refuses this"):
        talk(model, tokenizer)


def test_an_answer_that_is_stopped(model, tokenizer):
    made = talk(model, tokenizer, max_new_tokens=64)

    def stop(_text):
        made.stopped = True

    made.answer("def main():\n    import os, sys", stop)
    assert made.tokens[1] < 64
    assert made.answer("and now") == afresh(model, tokenizer, made.messages[:3], 64), "goes on from there"


def test_a_compressed_cache(model, tokenizer):
    with quantkit.compressed_kv(model, bits=8) as make_cache:
        made = talk(model, tokenizer, make_cache=make_cache)
        made.answer("def main():\n" * 12)
        made.answer("import os")
        assert made._cache.bits_per_element < 32 and made.tokens[0] < 40


def test_no_chat_template(model, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(QuantkitError, match="no chat template"):
        Conversation(model, tokenizer)
