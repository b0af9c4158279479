"""Blocks run on their own, in two streams side by side."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, OpenAIGPTConfig

from quantkit.core.errors import QuantkitError
from quantkit.io.weights import LoadedWeights
from quantkit.models.forward import capture, head_logits, run_block
from quantkit.models.structure import find_blocks

from ..conftest import CONFIGS, VOCABULARY

FIRST_GPT = OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32)
GEMMA3N = Gemma3nTextConfig(
    vocab_size=VOCABULARY,
    vocab_size_per_layer_input=VOCABULARY,
    hidden_size=32,
    hidden_size_per_layer_input=8,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    laurel_rank=4,
    num_kv_shared_layers=0,
    layer_types=["full_attention"] * 2,
    activation_sparsity_pattern=[0.0, 0.0],
)


@torch.no_grad()
def test_streams_and_batches_share_no_keys_and_values():
    """Layers without keys and values of their own find those of their stream, and of their sequences."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["gemma4"], dtype=torch.float32).eval()
    _, blocks = find_blocks(model)
    tokens = torch.randint(5, VOCABULARY, (4, 24))
    hidden = []
    handle = blocks[-1].register_forward_hook(lambda _module, _args, output: hidden.append(output))
    for rows in tokens.split(2):
        model(rows)
    handle.remove()
    batches, _ = capture(model, blocks, tokens, LoadedWeights(model), torch.device("cpu"), batch_tokens=48)
    assert len(batches) == 2
    for index, block in enumerate(blocks):
        for batch in batches:
            batch.full = run_block(block, batch.full, batch.call(index, full=True))
        for batch in batches:
            batch.quantized = run_block(block, 1.1 * batch.quantized, batch.call(index))
    for batch, expected in zip(batches, hidden, strict=True):
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(batch.full, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(batch.quantized, expected, rtol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("config", [FIRST_GPT, GEMMA3N], ids=lambda config: config.model_type)
def test_blocks_may_return_lists_and_have_versions_in_front_of_the_sequences(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    _, blocks = find_blocks(model)
    tokens = torch.randint(5, VOCABULARY, (2, 8))
    (batch,), wrap = capture(model, blocks, tokens, LoadedWeights(model), torch.device("cpu"), batch_tokens=48)
    for index, block in enumerate(blocks):
        batch.quantized = run_block(block, batch.quantized, batch.call(index))
    assert batch.quantized.shape[:2] == tokens.shape
    found = head_logits(model, blocks, tokens, batch.quantized, wrap)
    torch.testing.assert_close(found, model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_what_is_drawn_at_random_calibrates_nothing():
    """As the canvas is that DiffusionGemma writes its text over."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).eval()
    model.model.embed_tokens.register_forward_hook(lambda _module, _args, output: output + torch.rand_like(output))
    tokens = torch.randint(5, VOCABULARY, (2, 8))
    with pytest.raises(QuantkitError, match="draws random numbers"):
        capture(model, find_blocks(model)[1], tokens, LoadedWeights(model), torch.device("cpu"), batch_tokens=48)
