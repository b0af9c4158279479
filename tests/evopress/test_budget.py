"""Budgets: what they leave for the layers, what generation needs beside the weights, what is refused."""

import json

import pytest
import torch
from hypothesis import given
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

from quantkit import GPTQ
from quantkit.core.errors import QuantkitError
from quantkit.core.units import parse_size
from quantkit.evopress import memory
from quantkit.evopress.budget import Budget, read_timings
from quantkit.evopress.memory import activation_bytes, beside_weights, kv_cache_bytes, prompt_bytes
from quantkit.kvcache.config import KVCacheConfig
from quantkit.quantizers.hadamard import Hadamard
from quantkit.quantizers.sparse import Sparse

from ..helpers.forks import server
from ..helpers.garbage import changed, few, refused


def empty(reference, **changes):
    config = AutoConfig.from_pretrained(reference)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_sizes():
    assert [parse_size(text) for text in ("4GB", "3.5GiB", "800 mb", "12")] == [4 * 10**9, 7 * 2**29, 8 * 10**8, 12]
    for text in ("", "four", "-1GB", "0", "4PB"):
        with pytest.raises(QuantkitError, match="no size"):
            parse_size(text)


def test_what_a_prompt_leaves_is_its_cache(reference):
    model = empty(reference)
    _, left = prompt_bytes(empty(reference), 400, 2)
    logits = 2 * 2 * model.config.vocab_size
    assert left == pytest.approx(kv_cache_bytes(model.config, 400, 2, 16) + logits, rel=0.001)


def test_a_sliding_window():
    """Once all is generated it keeps its window; after the prompt transformers still holds all, as views."""
    sizes = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=33)
    whole = kv_cache_bytes(config, 300, 1)
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    assert kv_cache_bytes(config, 300, 1) == kv_cache_bytes(config, 33, 1) < whole
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    _, left = prompt_bytes(model, 300, 1)
    assert left == pytest.approx(whole, rel=0.01)


def test_a_pass_peaks_near_what_its_shapes_say(reference):
    """The widest moment of Llama's block: the MLP's, with the residual stream beside it."""
    few, many = (prompt_bytes(empty(reference), 300, batch) for batch in (1, 2))
    assert many[0] == pytest.approx(2 * few[0], rel=0.02)
    config = AutoConfig.from_pretrained(reference)
    peak, left = many
    assert 0.5 < (peak - left) / activation_bytes(config, 300, 2) < 2


def test_code_that_looks_at_data_falls_back_to_the_formula(reference, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(memory, "prompt_bytes", fail)
    need = beside_weights(empty(reference), [], 100, 1, None, torch.device("cpu"))
    assert need.cache == kv_cache_bytes(AutoConfig.from_pretrained(reference), 100, 1, 16)
    assert "data-dependent" in caplog.text


def test_fewer_bits_of_cache_leave_more_for_weights(reference):
    packed = KVCacheConfig(4, 4)
    full, less = (beside_weights(empty(reference), [], 400, 4, kv, torch.device("cpu")) for kv in (None, packed))
    assert less.cache == int(full.cache * packed.bits_per_element(64, 2, 400) / 16)
    assert less.activations == full.activations + full.cache // 6
    assert less.reserve < full.reserve


def test_a_packed_head_is_dequantized_on_a_cpu_and_for_many_sequences(reference):
    """In parts on a CPU; a GPU's kernels take the last token of up to 192 sequences as it is."""
    weights = empty(reference).lm_head.weight.numel()

    def beside(batch, device, head):
        return beside_weights(empty(reference), [], 20, batch, None, torch.device(device), head).activations

    for device, batch, bytes_each in (("cpu", 1, 24), ("cuda", 192, 0), ("cuda", 193, 2)):
        assert beside(batch, device, "lm_head") - beside(batch, device, None) == bytes_each * weights


def test_generation_stays_below_what_was_reserved(reference):
    """In its own process: the peak beyond the libraries, with the weights in full precision."""
    context, batch = 500, 4
    need = beside_weights(empty(reference), [], context, batch, None, torch.device("cpu"))
    asked = need.total + sum(path.stat().st_size for path in reference.glob("*.safetensors"))
    arguments = [reference, "--context", context, "--batch", batch, "--fit", asked, "--device", "cpu"]
    done = server().run("quantkit.evals.generation_memory", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert need.cache < json.loads(done.stdout)["peak_bytes"] <= asked


def test_costs_see_through_wrappers():
    weight = Sparse(0.25).layout(8, 16)
    assert Budget(0.5, "weights").cost(weight, Hadamard(Sparse(0.25))) == 96


def test_a_budget_is_held_against_layouts(database, session):
    source, names = database.source, session.space.names
    few = (GPTQ(2), GPTQ(4))
    with pytest.raises(
        QuantkitError, match=r"2 bits per weight is impossible .*: from 2\.1\d* bits per weight to 4\.1"
    ):
        Budget(2, "bits").check(source, names, few)
    with pytest.raises(QuantkitError, match=r"1 MB is impossible .*: from .* MB to"):
        Budget(1_000_000, "bytes").check(source, names, few)
    assert Budget(3, "bits").check(source, names, few) == ""
    assert "nothing to search" in Budget(6, "bits").check(source, names, few)
    weights = sum(source.model.get_submodule(name).weight.numel() for name in names)
    assert 8 * Budget(3, "bits").units(source, names) == 3 * weights


def test_timings(tmp_path):
    path = tmp_path / "t.json"
    entry = {"format": "int_group 2", "rows": 256, "columns": 256, "us": 3.5}
    path.write_text(json.dumps([entry]))
    timings = read_timings(path)
    assert Budget(1, "latency", timings).cost(GPTQ(2).layout(256, 256), GPTQ(2)) == 3500
    with pytest.raises(QuantkitError, match="lack 'int_group 3'"):
        Budget(1, "latency", timings).cost(GPTQ(3).layout(256, 256), GPTQ(3))
    for wrong in ([entry | {"us": float("nan")}], [entry | {"us": 0}], [{}], {}, None):
        path.write_text(json.dumps(wrong))
        if wrong != {}:
            with pytest.raises(QuantkitError, match="no table of timings"):
                read_timings(path)


@few
@given(content=changed([{"format": "int_group 4", "rows": 64, "columns": 64, "us": 11.5}] * 2))
def test_any_table_of_timings(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "timings.json"
    path.write_bytes(content)
    wrong, found = refused(read_timings, path)
    assert wrong or all(time > 0 for time in found.values())


@pytest.mark.parametrize("field", ["rows", "columns", "us"])
def test_times_and_sizes_are_finite(field, tmp_path):
    path = tmp_path / "timings.json"
    path.write_text(json.dumps([{"format": "x", "rows": 1, "columns": 1, "us": 1.0, field: float("inf")}]))
    with pytest.raises(QuantkitError, match="no table of timings"):
        read_timings(path)
