import pytest
import torch
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import RTN
from quantkit.core.errors import QuantkitError
from quantkit.evals.decode import bytes_per_token, measure


def test_a_run_is_measured_beside_its_ideal(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32).eval()
    dense = measure(model, prompt_tokens=8, new_tokens=5)
    quantkit.quantize(model, method=RTN(4, 64))
    packed = measure(model, prompt_tokens=8, new_tokens=5)
    for found in (dense, packed):
        assert found.tokens_per_second == pytest.approx(1 / found.token_seconds)
        assert found.ideal_token_seconds == pytest.approx(found.bytes_per_token / found.bandwidth)
        assert 0 < found.ideal_token_seconds < found.token_seconds
        assert found.how == "eager"
    assert packed.bytes_per_token < dense.bytes_per_token
    assert packed.peak_bytes < dense.peak_bytes


@pytest.mark.parametrize("architecture", ["llama", "llama_tied"])
def test_the_embedding_counts_where_it_is_the_head(architecture, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder(architecture), dtype=torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    read = parameters - (0 if architecture == "llama_tied" else embedding)
    buffers = sum(buffer.numel() for buffer in model.buffers())
    assert 4 * read <= bytes_per_token(model) <= 4 * (read + buffers)


def test_senseless_lengths_are_refused(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    for prompt, new, message in [(0, 5, "at least 1 and 2"), (5, 1, "at least 1 and 2"), (250, 7, "context of 256")]:
        with pytest.raises(QuantkitError, match=message):
            measure(model, prompt, new)
