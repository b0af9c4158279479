"""Statistics of experts: of the tokens that they get, drawn towards what all of their layer get."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteMoeHybridConfig

import quantkit
from quantkit import GPTQ, Calibration, Recipe, TargetShift
from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Needs
from quantkit.core.stats import LayerStats
from quantkit.io.source import open_folder
from quantkit.models.experts import Apart, place
from quantkit.run import experts
from quantkit.run.experts import in_turns, pooled
from quantkit.run.pipeline import quantize_checkpoint

from ..conftest import VOCABULARY
from ..helpers.checkpoints import digest, interrupted
from ..helpers.methods import first_of_each, spy


def moments(tokens, seed, name="layer"):
    x = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = x + 0.1 * torch.randn_like(x)
    return x, LayerStats(x.T @ x / tokens, y.T @ x / tokens, tokens, name)


def test_an_expert_s_moments_are_drawn_towards_all_tokens_of_its_layer():
    (x, few), (y, many), (_, other) = moments(3, 0), moments(50, 1), moments(7, 2)
    names = [f"mlp.experts.{number}.down_proj" for number in range(3)]
    stats = {names[0]: few, names[1]: many, "mlp.gate": other, "mlp.experts.0.gate_up_proj": other}
    found = pooled(stats.copy(), [*stats, names[2]], strength=2.0)
    mean = (x.T @ x + y.T @ y) / 53
    for name, own in ((names[0], few), (names[1], many)):
        share = 12 / (own.num_tokens + 12)
        torch.testing.assert_close(found[name].hessian, (1 - share) * own.hessian + share * mean)
        cross = (3 * few.cross + 50 * many.cross) / 53
        torch.testing.assert_close(found[name].cross, (1 - share) * own.cross + share * cross)
        assert found[name].num_tokens == own.num_tokens
    torch.testing.assert_close(found[names[2]].hessian, mean)
    assert found[names[2]].num_tokens == 0
    assert found["mlp.gate"] is other and found["mlp.experts.0.gate_up_proj"] is other, "nobody beside them"
    exact = pooled(stats.copy(), stats, strength=0.0)
    torch.testing.assert_close(exact[names[0]].hessian, few.hessian)


def test_what_does_not_fit_is_gathered_in_turns(monkeypatch):
    monkeypatch.setattr(experts, "MOMENTS", 100)
    stage = [["a"], ["b", "c"], ["d"], ["e"]]
    assert in_turns(stage, lambda name: 40) == [[["a"], ["b", "c"]], [["d"], ["e"]]]
    assert in_turns(stage, lambda name: 400) == [[group] for group in stage]
    assert in_turns([], lambda name: 1) == []


@pytest.fixture
def text(text_file):
    return Calibration(str(text_file), 4, 64)


def test_means_are_of_all_turns_so_far():
    """An expert that no token chose may have a turn without any other."""
    (_, first), (_, second) = moments(5, 0), moments(9, 1)
    names = [f"mlp.experts.{number}.down_proj" for number in range(3)]
    whole = pooled({names[0]: first, names[1]: second}, names)
    means = {}
    pooled({names[0]: first}, names[:1], means)
    pooled({names[1]: second}, names[1:2], means)
    torch.testing.assert_close(pooled({}, names[2:], means)[names[2]].hessian, whole[names[2]].hessian)
    assert pooled({}, names, {}) == {} and pooled({names[0]: first}, names[:1], {})[names[0]] is first


def test_turns_of_single_experts_are_as_good_as_one(model_folder, text_file, monkeypatch, tmp_path):
    """Few tokens, so that some experts have none."""
    monkeypatch.setattr(experts, "MOMENTS", 1)
    recipe = Recipe(GPTQ(4, 32), calibration=Calibration(str(text_file), 1, 8))
    report = quantize_checkpoint(model_folder("qwen3_moe"), recipe, tmp_path / "packed")
    assert min(layer.tokens for layer in report.layers if layer.tokens is not None) == 0


def seen(folder, text, reads=Needs.CROSS, **settings):
    """(statistics of all layers by name, the packed model)."""
    found = {}
    quantizer = spy(Needs.HESSIAN, found)(8, 32)
    shifted = TargetShift(quantizer, 0.5) if reads == Needs.CROSS else quantizer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    quantkit.quantize(model, tokenizer, method=shifted, calibration=text, target_shift=0, **settings)
    return found, model


@torch.no_grad()
def test_moments_are_those_of_the_tokens_that_chose_an_expert(model_folder, text, monkeypatch):
    monkeypatch.setattr(experts, "STRENGTH", 0.0)
    folder = model_folder("qwen3_moe")
    found, quantized = seen(folder, text)
    source = open_folder(folder, torch.float32)
    tokens = text.sequences(source.tokenizer(), source.model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kept = {}
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: kept.update(x=args[0], index=args[1]))
    quantized.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, a: kept.update(q=a[0], index=a[1]))
    model(tokens), quantized(tokens)  # the second leaves its choice
    counts = 0
    for expert in range(8):
        chosen = (kept["index"] == expert).any(1)
        name = f"model.layers.0.mlp.experts.{expert}.gate_up_proj"
        if name not in found:
            continue
        x_q, x = kept["q"][chosen], kept["x"][chosen]
        counts += len(x_q)
        assert found[name].num_tokens == len(x_q)
        torch.testing.assert_close(found[name].hessian, x_q.T @ x_q / len(x_q), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[name].cross, x.T @ x_q / len(x_q), rtol=1e-3, atol=1e-4)
    assert counts == 2 * tokens.numel()


def test_the_full_model_chooses_its_experts_itself(tokenizer, text_file, tmp_path):
    """Granite has an MLP behind its experts, and a pass to that once sent the full model through the packed one's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "shared_intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 16}
    routes = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
    config = GraniteMoeHybridConfig(vocab_size=VOCABULARY, **sizes, **heads, **routes)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = Recipe(GPTQ(2, 32), calibration=Calibration(str(text_file), 4, 64))
    quantize_checkpoint(tmp_path / "model", recipe, tmp_path / "whole")
    interrupted(tmp_path / "model", recipe, tmp_path / "resumed", after=1)  # which passes by the first block's experts
    quantize_checkpoint(tmp_path / "model", recipe, tmp_path / "resumed", resume=True)
    assert digest(tmp_path / "resumed") == digest(tmp_path / "whole")


def test_all_tokens_through_all_experts(model_folder, text):
    folder = model_folder("mixtral")
    found, _ = seen(folder, text, all_experts=True)
    own = {name: stats for name, stats in found.items() if place(name)}
    assert {stats.num_tokens for stats in own.values()} == {256}
    shared = [f"model.layers.{block}.mlp.experts.0.gate_up_proj" for block in (0, 1)]
    each = [f"model.layers.{block}.mlp.experts.{expert}.down_proj" for block in (0, 1) for expert in range(4)]
    assert first_of_each(own) == {*shared, *each}, "one tensor feeds all experts' first layers"
    assert not torch.equal(own[each[0]].hessian, own[each[1]].hessian)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4"])
def test_experts_that_nobody_chose_are_packed_and_named(family, model_folder, text_file, tmp_path):
    folder, text = model_folder(family), Calibration(str(text_file), 1, 8)
    report = quantize_checkpoint(folder, Recipe(GPTQ(4, 32), calibration=text), tmp_path / "packed")
    tokens = {layer.name: layer.tokens for layer in report.layers}
    assert all((count is None) == (place(name) is None) for name, count in tokens.items())
    assert any("experts were chosen by fewer tokens" in note and "`all_experts`" in note for note in report.notes)
    assert any(count == 0 for count in tokens.values()) == any("by none" in note for note in report.notes)
    assert quantkit.load(tmp_path / "packed")


def test_an_option_that_does_nothing_harms_nobody(model_folder, text_file, tmp_path):
    """Llama 4's experts get their tokens sorted; some here get none."""
    recipe = Recipe(GPTQ(4, 32), calibration=Calibration(str(text_file), 1, 8), all_experts=True)
    assert quantize_checkpoint(model_folder("llama4"), recipe, tmp_path / "packed").layers


@pytest.mark.parametrize("left_out", ["*.experts.0.*", "*.experts.1.*"])
def test_what_is_felt_of_experts_of_which_one_is_left_out(left_out, model_folder, text_file, tmp_path):
    text = Calibration(str(text_file), 1, 16)
    recipe = Recipe(GPTQ(4, 32), {left_out: None}, calibration=text, fisher=True)
    report = quantize_checkpoint(model_folder("mixtral"), recipe, tmp_path / "packed")
    assert all(layer.predicted_kl is not None for layer in report.layers if place(layer.name))


def test_bits_of_experts(model_folder, text):
    folder = model_folder("mixtral")
    model = quantkit.quantize(
        AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), 4, group_size=32,
        experts_bits=2, calibration=text,
    )  # fmt: skip
    bits = {layer.name: layer.quantizer for layer in model.quantkit_report.layers}
    assert all(("gptq(2" in text) == (place(name) is not None) for name, text in bits.items())
    assert not any(module.taken for module in model.modules() if isinstance(module, Apart))
    with pytest.raises(QuantkitError, match="has no experts"):
        Recipe(GPTQ(4, 32), experts_bits=3).plan(open_folder(model_folder("llama_small")).model)
    with pytest.raises(QuantkitError, match="`experts_bits`"):
        Recipe(GPTQ(4, 32), experts_bits=33).plan(open_folder(folder).model)


def test_trellis_codes_of_experts_are_told_what_predictions_feel(model_folder, text_file, tmp_path):
    text = Calibration(str(text_file), 4, 64)
    recipe = Recipe(GPTQ(4, 32), calibration=text, fisher=True)
    report = quantize_checkpoint(model_folder("mixtral"), recipe, tmp_path / "packed")
    felt = [layer.predicted_kl for layer in report.layers if place(layer.name)]
    assert all(kl is not None and kl >= 0 for kl in felt)
