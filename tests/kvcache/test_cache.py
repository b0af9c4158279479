"""GearCache as generation uses it: exact where nothing is lost, append-only, croppable, and each row for itself."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, T5Config

import quantkit
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.evals.kv_prefix import PerToken, compressed_prefix
from quantkit.evals.kv_quality import inject_outliers
from quantkit.kvcache import attention
from quantkit.kvcache.attention import compressed_kv
from quantkit.kvcache.cache import GearCache, GearLayer, cache_argument
from quantkit.kvcache.config import KVCacheConfig

SMALL = KVCacheConfig(2, 2, group_size=8, buffer=8, rank=2, targets=("k",), weighted=True)
EXACT = {
    "16 bits": KVCacheConfig(16, 16),
    "full rank": KVCacheConfig(8, 8, group_size=8, buffer=8, rank=64, factor_bits=16),
    "all outliers": KVCacheConfig(4, 4, group_size=8, buffer=8, outliers=1.0),
}
TOKENS = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model(reference):
    return quantkit.load(reference, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(reference, texts, tokenizer):
    ids = tokenizer(" ".join(texts[:3]), add_special_tokens=False)["input_ids"]
    return torch.tensor([ids[:50], ids[100:150], ids[200:250]])


@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("how", ["greedy", "beam", "prompt lookup", "padded"])
def test_nothing_changes_where_nothing_is_lost(model, prompts, config, how):
    settings = dict(TOKENS)
    mask = torch.ones_like(prompts)
    if how == "beam":
        settings |= {"num_beams": 3}
    elif how == "prompt lookup":
        prompts, mask = prompts[:1], mask[:1]
        settings |= {"prompt_lookup_num_tokens": 4}
    elif how == "padded":
        mask[1, :17] = 0
    wanted = model.generate(prompts, attention_mask=mask, **settings)
    with compressed_kv(model, config=config):
        assert torch.equal(model.generate(prompts, attention_mask=mask, **settings), wanted)
    cache = GearCache(model, config)  # beside transformers' own attention
    assert torch.equal(model.generate(prompts, attention_mask=mask, past_key_values=cache, **settings), wanted)


@pytest.mark.parametrize(
    "config", [SMALL, KVCacheConfig.gear(2, paper=True), KVCacheConfig(4, 4, "kcvt", buffer=20)], ids=str
)
def test_a_row_of_a_batch_is_the_row_alone(model, prompts, config):
    with compressed_prefix(model, config, 40) as reader:
        together = reader(input_ids=prompts).logits
        for row, one in enumerate(prompts):
            torch.testing.assert_close(reader(input_ids=one[None]).logits[0], together[row], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("hadamard", [False, True])
def test_the_baseline_that_it_is_compared_with(model, prompts, hadamard):
    """Scales per token, in place: closer with more bits, exact where no buffer is full."""
    wanted = model(input_ids=prompts).logits[:, 41:].detach()
    errors = []
    for bits in (2, 4, 8):
        with compressed_prefix(model, PerToken(bits, 8, hadamard, buffer=8), 41) as reader:
            errors.append(float((reader(input_ids=prompts).logits[:, 41:] - wanted).norm() / wanted.norm()))
        assert reader.bits == pytest.approx((40 * (bits + 4) + 16) / 41)
    assert errors == sorted(errors, reverse=True) and 0 < errors[-1] < 0.05 * errors[0]
    with compressed_prefix(model, PerToken(2, 8, hadamard, buffer=42), 41) as reader:
        torch.testing.assert_close(reader(input_ids=prompts).logits[:, 41:], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 31])
def test_ragged_lengths(model, prompts, tokens):
    cache = GearCache(model, SMALL)
    model(input_ids=prompts[:, :tokens], past_key_values=cache, use_cache=True)
    cache.compress()
    assert cache.get_seq_length() == tokens
    assert all(layer.k.packed == layer.v.packed == tokens // 8 * 8 for _, layer in cache.packed_layers())
    logits = model(input_ids=prompts[:, tokens : tokens + 1], past_key_values=cache, use_cache=True).logits
    assert torch.isfinite(logits).all() and cache.get_seq_length() == tokens + 1


@torch.no_grad()
def test_more_bits_are_nearer(model, prompts):
    exact = model(input_ids=prompts).logits.log_softmax(-1)
    found = []
    for bits in (2, 3, 4, 8):
        with compressed_prefix(model, KVCacheConfig(bits, bits, group_size=8, buffer=8), 40) as reader:
            logits = reader(input_ids=prompts).logits.log_softmax(-1)
        found.append(float((exact.exp() * (exact - logits)).sum(-1)[:, 41:].mean()))
    assert found[0] > 2 * found[1] > 4 * found[2] > 8 * found[3] > 0


@torch.no_grad()
def test_weighted_corrections_do_not_see_injected_outliers(reference, prompts):
    config = KVCacheConfig(2, 2, group_size=8, buffer=8, rank=4, targets=("k",), weighted=True, factor_bits=16)
    plain, injected = (quantkit.load(reference, dtype=torch.float32).eval() for _ in range(2))
    inject_outliers(injected, 8)
    torch.testing.assert_close(
        injected(input_ids=prompts).logits, plain(input_ids=prompts).logits, atol=1e-3, rtol=1e-3
    )
    logits = []
    for model in (plain, injected):
        with compressed_prefix(model, config, 40) as reader:
            logits.append(reader(input_ids=prompts).logits)
    assert (
        float((logits[0] - logits[1]).abs().mean())
        < 0.02 * float((logits[0] - plain(input_ids=prompts).logits).abs().mean()) + 2e-3
    )


def test_codes_never_change_and_a_step_copies_little(model, prompts):
    cache = GearCache(model, SMALL)
    model(input_ids=prompts, past_key_values=cache, use_cache=True)
    cache.compress()
    _, layer = next(cache.packed_layers())
    before = {name: one.data.clone() for name, one in layer.k.grown.items()}
    moved = 0
    for step in range(40):
        places = {name: one.data.data_ptr() for name, one in layer.k.grown.items()}
        model(input_ids=prompts[:, step : step + 1], past_key_values=cache, use_cache=True)
        moved += places["codes"] != layer.k.grown["codes"].data.data_ptr()
    assert layer.k.packed > 48
    assert moved <= 5, "only where a buffer is packed and the room is used up"
    for name, former in before.items():
        assert torch.equal(layer.k.grown[name].data[:, :, : former.shape[2]], former)


def test_crop_takes_back_what_is_not_packed(model, prompts):
    cache = GearCache(model, SMALL)
    with torch.no_grad():
        model(input_ids=prompts, past_key_values=cache, use_cache=True)
        cache.compress()
        model(input_ids=prompts[:, :5], past_key_values=cache, use_cache=True)
        wanted = model(input_ids=prompts[:, 5:6], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        again = model(input_ids=prompts[:, 5:6], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(again, wanted)
    with pytest.raises(QuantkitError, match="older ones are packed"):
        cache.crop(-20)
    with pytest.raises(ValueError, match="minus"):
        cache.crop(3)
    cache.crop(0)
    mixed = GearLayer(KVCacheConfig(16, 2, group_size=8, buffer=8))
    mixed.update(torch.randn(1, 2, 30, 64), torch.randn(1, 2, 30, 64))
    mixed.compress(0)
    with pytest.raises(QuantkitError, match="newest 6 tokens"):
        mixed.crop(-10)
    assert mixed.k.length == mixed.v.length == 30, "all or nothing"
    assert cache.get_seq_length() == 56


def test_rows_are_reordered_repeated_and_selected_as_they_are_stored(model, prompts):
    cache = GearCache(model, SMALL)
    model(input_ids=prompts, past_key_values=cache, use_cache=True)
    cache.compress()
    dense = [layer.k.dense(torch.float32) for _, layer in cache.packed_layers()]
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    for before, (_, layer) in zip(dense, cache.packed_layers(), strict=True):
        assert torch.equal(layer.k.dense(torch.float32), before[order])
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    for before, (_, layer) in zip(dense, cache.packed_layers(), strict=True):
        assert torch.equal(layer.k.dense(torch.float32), before[[2, 2]])
        layer.offload()
        layer.prefetch()
    cache.reset()
    assert cache.get_seq_length() == 0


def test_a_second_turn_goes_on_where_the_first_ended(model, prompts):
    """Two turns through one cache, against one pass over both with an exact cache."""
    with compressed_kv(model, config=EXACT["full rank"]) as make:
        cache = make()
        first = model.generate(prompts, past_key_values=cache, **TOKENS)
        longer = torch.cat([first, prompts[:, :20]], 1)
        again = model.generate(longer, past_key_values=cache, **TOKENS)
    assert torch.equal(again, model.generate(longer, **TOKENS))


def test_a_prompt_cache_is_saved_and_loaded(model, prompts, reference, tmp_path):
    cache = GearCache(model, SMALL)
    model(input_ids=prompts, past_key_values=cache, use_cache=True)
    cache.compress()
    cache.save(tmp_path / "prompt.safetensors")
    loaded = GearCache.load(tmp_path / "prompt.safetensors", model)
    assert loaded.config == SMALL and loaded.get_seq_length() == 50
    with torch.no_grad():
        wanted, found = (
            model(input_ids=prompts[:, :9], past_key_values=c, use_cache=True).logits for c in (cache, loaded)
        )
    assert torch.equal(wanted, found)
    other = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    ))  # fmt: skip
    with pytest.raises(QuantkitError, match="another model"):
        GearCache.load(tmp_path / "prompt.safetensors", other)
    (tmp_path / "prompt.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no prompt cache"):
        GearCache.load(tmp_path / "prompt.safetensors", model)
    with pytest.raises(CheckpointError, match="no prompt cache"):
        GearCache.load(tmp_path / "missing.safetensors", model)


def test_layers_of_other_kinds_keep_their_own():
    config = Gemma3TextConfig(
        vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=12,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = GearCache(model, KVCacheConfig(16, 16))
    assert sum(isinstance(layer, GearLayer) for layer in cache.layers) == 1
    ids, mask = torch.randint(1, 99, (2, 30)), torch.ones(2, 30, dtype=torch.int64)
    mask[0, :7] = 0
    wanted = model.generate(ids, attention_mask=mask, **TOKENS)
    with compressed_kv(model, config=KVCacheConfig(16, 16)):
        assert torch.equal(model.generate(ids, attention_mask=mask, **TOKENS), wanted)
    with pytest.raises(QuantkitError, match="layers all compress"):
        cache.save("never")


def test_a_callers_own_cache_is_kept_under_either_name(reference, prompts, recwarn):
    model = quantkit.load(reference).eval()
    with compressed_kv(model, bits=4) as make:
        model.generate(prompts, **TOKENS)
        assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]
        for name in {cache_argument(model), "past_key_values"}:
            cache = make()
            model.generate(prompts, **{name: cache}, **TOKENS)
            assert cache.get_seq_length() > prompts.shape[1]


def test_half_precision_counts_less_than_sixteen_bits(reference, prompts):
    model = quantkit.load(reference, dtype=torch.bfloat16).eval()
    with compressed_kv(model, bits=4) as make:
        cache = make()
        model.generate(prompts.repeat(1, 6), past_key_values=cache, **TOKENS)
    assert 4.5 < cache.bits_per_element < 9
    layers = [layer for _, layer in cache.packed_layers()]
    sides = [side for layer in layers for side in (layer.k, layer.v)]
    assert len(sides) == 12 and all(side.packed == 256 + 64 * (side.length >= 320) for side in sides)
    assert cache.nbytes == sum(side.nbytes for side in sides) + sum(layer.weights.nbytes for layer in layers)
    assert model.config._attn_implementation != "quantkit"


@pytest.mark.slow
def test_generation_by_the_kernel_is_generation_by_decoding(reference, prompts, monkeypatch):
    """Through the interpreter, with a left-padded row and a beam; the model's first two blocks."""
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32, num_hidden_layers=2).eval()
    prompts = prompts[:2]
    mask = torch.ones_like(prompts)
    mask[0, :11] = 0
    settings = TOKENS | {"max_new_tokens": 3, "min_new_tokens": 3, "attention_mask": mask, "num_beams": 2}
    config = KVCacheConfig(4, 4, group_size=16, buffer=16, rank=8, targets=("k",), weighted=True)
    used, plain = [], attention.on_packed
    monkeypatch.setattr(attention, "on_packed", lambda *given: (used.append(1), plain(*given))[1])
    with compressed_kv(model, config=config):
        wanted = model.generate(prompts, **settings)
        assert not used
        monkeypatch.setattr(attention, "kernel_pays", lambda query, layer: True)
        assert torch.equal(model.generate(prompts, **settings), wanted)
        assert len(used) == 2 * 2
        monkeypatch.setattr(attention.self_check, "trusted", lambda family, device: family != "kv_attention")
        assert torch.equal(model.generate(prompts, **settings), wanted)
    assert len(used) == 2 * 2, "a kernel that errs is not used"


def test_bad_input(model, prompts):
    with pytest.raises(QuantkitError, match="encoder"):
        GearCache(T5Config())
    with pytest.raises(QuantkitError, match="not both"), compressed_kv(model, bits=2, config=SMALL):
        pass
    with pytest.raises(QuantkitError, match="2, 3, 4 or 8"), compressed_kv(model, bits=5):
        pass
    with compressed_kv(model, bits=2), pytest.raises(QuantkitError, match="brings its own cache"):
        model.generate(prompts, cache_implementation="static", **TOKENS)
    odd = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=99, hidden_size=60, intermediate_size=64, num_hidden_layers=1, num_attention_heads=5, head_dim=12
    ))  # fmt: skip
    with pytest.raises(QuantkitError, match="heads of 12 channels"):
        GearCache(odd, KVCacheConfig(4, 4))
    layer = GearLayer(SMALL)
    layer.update(torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3, 64))
    with pytest.raises(QuantkitError, match=r"holds torch\.float32"):
        layer.update(torch.zeros(1, 2, 1, 64).half(), torch.zeros(1, 2, 1, 64).half())
