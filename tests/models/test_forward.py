"""Blocks run on their own, in two streams side by side."""

import torch
from transformers import AutoModelForCausalLM

from quantkit.io.weights import LoadedWeights
from quantkit.models.forward import capture, run_block
from quantkit.models.structure import find_blocks

from ..conftest import CONFIGS, VOCABULARY


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
