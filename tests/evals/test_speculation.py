"""Drafts: a model drafts perfectly for itself, a damaged one does less well, and the text stays the target's."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.core.errors import QuantkitError
from quantkit.evals.speculation import measure


@pytest.fixture(scope="module")
def target(short_reference):
    return AutoModelForCausalLM.from_pretrained(short_reference, dtype=torch.float32).eval()


def test_drafts(target, short_reference, tokenizer):
    prompts = tokenizer("def main(argv):\n    import os, sys\n", return_tensors="pt").input_ids[:, :8].repeat(2, 1)
    own = measure(target, target, prompts, 17, 3)
    assert own.accepted == own.alike == own.same_text == 1 and own.tokens_per_step == pytest.approx(17 / 5)
    coarse = quantkit.quantize(
        AutoModelForCausalLM.from_pretrained(short_reference, dtype=torch.float32), method="rtn", bits=2, group_size=64
    )
    found = measure(target, coarse.eval(), prompts, 17, 3)
    assert found.same_text == 1 and found.accepted <= found.alike < 1
    assert found.tokens_per_step < own.tokens_per_step and found.seconds > 0 and found.seconds_alone > 0


def test_another_vocabulary(target, model_folder):
    other = AutoModelForCausalLM.from_pretrained(model_folder("llama_small"))
    other.resize_token_embeddings(100)
    with pytest.raises(QuantkitError, match="different vocabularies"):
        measure(target, other, torch.ones(1, 4, dtype=torch.int64), 4, 3)
