"""What a compressed cache takes while it is used, by counting tensors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit.evopress.memory import LiveBytes
from quantkit.kvcache.attention import compressed_kv
from quantkit.kvcache.cache import GearLayer
from quantkit.kvcache.config import KVCacheConfig


class Allocated(TorchDispatchMode):
    """Bytes of all storages that operations make, whether they live or not."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        outputs = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in known:
                self.bytes += leaf.untyped_storage().nbytes()
        return outputs


@pytest.mark.parametrize("config", [KVCacheConfig.gear(4), KVCacheConfig.gear(2, paper=True)], ids=str)
def test_steps_allocate_as_much_in_a_long_cache_as_in_a_short_one(config):
    """A token makes about as many bytes at 16k tokens as at 2k: tensors are not copied whole from step to step."""
    found = {}
    for tokens in (2048, 16384):
        layer = GearLayer(config)
        layer.update(*(torch.randn(1, 1, tokens, 64) for _ in range(2)))
        layer.compress(0)
        with Allocated() as allocated:
            for _ in range(1024):
                layer.update(*(torch.ones(1, 1, 1, 64) for _ in range(2)))
        found[tokens] = allocated.bytes
    assert found[16384] < 1.5 * found[2048], found


@pytest.mark.parametrize("chunk", [None, 256])
def test_the_peak_of_generation_is_less_by_what_the_cache_is_smaller(chunk):
    """Beside the weights; also while the prompt is read."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=2,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randint(0, 64, (1, 4096))
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "prefill_chunk_size": chunk}
    weights = [*model.parameters(), *model.buffers()]
    with LiveBytes(weights) as plain:
        model.generate(prompt, **settings)
    with compressed_kv(model, bits=4) as make, LiveBytes(weights) as packed:
        cache = make()
        model.generate(prompt, past_key_values=cache, **settings)
    whole = 2 * 8 * 2 * 64 * 4 * 4096
    saved = plain.peak - packed.peak
    one_layer = whole // 8
    assert saved > whole - cache.nbytes - 3 * one_layer, (plain.peak, packed.peak, cache.nbytes)
