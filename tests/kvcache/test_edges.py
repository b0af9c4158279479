"""Compressed caches where users meet their edges: contexts in contexts, loading, cropping, other models."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
)

from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.kvcache.attention import compressed_kv
from quantkit.kvcache.cache import GearCache, GearLayer
from quantkit.kvcache.config import KVCacheConfig

SMALL = KVCacheConfig(4, 4, group_size=8, buffer=8)
IDS = torch.arange(1, 31)[None]


def llama(**changed):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=99, **sizes | changed)).eval()


@pytest.fixture
def model():
    return llama()


def generated(model, **given):
    out = model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **given)
    return out.past_key_values


def test_a_context_in_a_context(model):
    with compressed_kv(model, config=SMALL):
        with compressed_kv(model, config=KVCacheConfig(2, 2, group_size=8, buffer=8)):
            assert generated(model).config.k_bits == 2
        assert generated(model).config.k_bits == 4
        with pytest.raises(QuantkitError, match="paged"):
            model.generate_batch([IDS[0].tolist()])
    assert type(generated(model)) is DynamicCache and not {"generate", "generate_batch"} & set(vars(model))


def test_a_habit_of_the_model_gives_way(model):
    model.generation_config.cache_implementation = "static"
    with compressed_kv(model, config=SMALL):
        assert isinstance(generated(model), GearCache)
    assert model.generation_config.cache_implementation == "static"


def test_attention_of_all_parts_is_restored():
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14),
        text_config=LlamaConfig(vocab_size=99, **sizes), image_token_id=98,
    )  # fmt: skip
    pictures = LlavaForConditionalGeneration(config).eval()
    pictures.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    with compressed_kv(pictures, config=SMALL):
        assert isinstance(generated(pictures), GearCache)
    found = [part._attn_implementation for part in (pictures.config.vision_config, pictures.config.text_config)]
    assert found == ["eager", "sdpa"]


def test_what_attention_gets_can_be_viewed():
    """Also where the buffer has room beyond its tokens."""
    layer = GearLayer(KVCacheConfig(16, 16))
    for tokens in (40, 1, 1, 1):
        keys, values = layer.update(*(torch.randn(2, 2, tokens, 16) for _ in range(2)))
    assert keys.view(-1).shape == values.view(2, -1).view(-1).shape


def test_crop_reaches_into_a_sink_before_which_nothing_is_packed():
    layer = GearLayer(KVCacheConfig(4, 4, group_size=8, buffer=8, sink=16))
    tokens = torch.randn(1, 2, 19, 16)
    layer.update(tokens, tokens)
    layer.crop(-5)
    assert layer.get_seq_length() == 14
    keys, _ = layer.update(tokens[:, :, 14:], tokens[:, :, 14:])
    assert torch.equal(keys.dense(), tokens)


@pytest.mark.parametrize("config", [KVCacheConfig(16, 16, "kcvt", buffer=1), KVCacheConfig(16, 16, sink=64)], ids=str)
def test_drafts_longer_than_the_buffer_are_taken_back(model, config):
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "prompt_lookup_num_tokens": 10}
    prompt = torch.arange(1, 9)[None].repeat(1, 30)
    wanted = model.generate(prompt, **settings)
    with compressed_kv(model, config=config):
        assert torch.equal(model.generate(prompt, **settings), wanted)
    packing = KVCacheConfig(8, 8, "kcvt", buffer=1)
    with compressed_kv(model, config=packing):
        assert model.generate(prompt, **settings).shape == wanted.shape


def test_a_cache_outlives_inference_mode(model):
    cache = GearCache(model, SMALL)
    with torch.inference_mode():
        for part in (IDS, IDS[:, :1], IDS[:, :1]):
            model(input_ids=part, past_key_values=cache)
    with torch.no_grad():
        for _ in range(12):
            model(input_ids=IDS[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 44


@pytest.mark.parametrize("size", [48, 80])
def test_heads_that_groups_do_not_divide(size):
    odd = llama(head_dim=size)
    with compressed_kv(odd, bits=8) as make:
        cache = make()
        wanted = odd.generate(IDS.repeat(1, 5), max_new_tokens=4, do_sample=False, pad_token_id=0)
        found = odd.generate(IDS.repeat(1, 5), max_new_tokens=4, do_sample=False, pad_token_id=0, past_key_values=cache)
    assert torch.equal(found, wanted)
    whole = cache.config.bits_per_element(size, 2, cache.get_seq_length())
    assert cache.config.channels(size) == {48: 48, 80: 40}[size] and 8 < whole < 20


def test_a_cache_of_half_precision_goes_on_in_full(model, tmp_path):
    half = copy.deepcopy(model).bfloat16()
    cache = GearCache(half, SMALL)
    half(input_ids=IDS, past_key_values=cache)
    cache.save(tmp_path / "cache")
    loaded = GearCache.load(tmp_path / "cache", model)
    assert model(input_ids=IDS[:, :3], past_key_values=loaded).logits.dtype == torch.float32


def test_damaged_prompt_caches(model, tmp_path):
    path = tmp_path / "cache"
    with pytest.raises(QuantkitError, match="empty"):
        GearCache(model).save(path)
    cache = GearCache(model, SMALL)
    model(input_ids=IDS, past_key_values=cache)
    cache.compress()
    cache.save(path)
    GearCache.load(path, model)
    with pytest.raises(QuantkitError, match="another model"):
        GearCache.load(path, llama(head_dim=16))
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    for missing in tensors:
        save_file({name: tensor for name, tensor in tensors.items() if name != missing}, path, metadata)
        with pytest.raises(CheckpointError):
            GearCache.load(path, model)
    for about in ("[]", "{}", json.dumps(json.loads(metadata["cache"]) | {"sides": []})):
        save_file(tensors, path, metadata | {"cache": about})
        with pytest.raises(CheckpointError):
            GearCache.load(path, model)


def test_bits_after_rows_are_repeated(model):
    cache = GearCache(model, SMALL)
    model(input_ids=IDS, past_key_values=cache)
    before = cache.bits_per_element
    cache.batch_repeat_interleave(4)
    assert cache.bits_per_element == pytest.approx(before, rel=0.1)


def test_settings_of_wrong_types(model):
    for wrong in ({"k_bits": 4.0}, {"rank": 1.5}, {"buffer": "64"}, {"sink": True}):
        with pytest.raises(QuantkitError, match="whole number"):
            KVCacheConfig(**wrong)
    with pytest.raises(QuantkitError, match="KVCacheConfig"):
        GearCache(model, {"k_bits": 4})
    with pytest.raises(QuantkitError, match="full attention"):
        GearCache(MambaConfig(num_hidden_layers=2))
