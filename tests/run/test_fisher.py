"""The reverse pass: against gradients of the whole model, and what its predictions are worth."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit import GPTQ, RTN, Calibration, Hadamard, Recipe, Trellis
from quantkit.core.errors import QuantkitError
from quantkit.core.metrics import predicted_kl, token_kl
from quantkit.io.hf import resolve_folder
from quantkit.io.source import load_tokenizer, open_folder
from quantkit.models.structure import block_linears
from quantkit.run import fisher
from quantkit.run.pipeline import quantize_checkpoint

from ..conftest import VOCABULARY


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def measured(folder, tokens, into, **settings):
    source = open_folder(folder, torch.float32)
    layers = block_linears(source.model)
    weights = source.weights({}, head=True)
    return fisher.measure(source.model, list(layers), tokens, weights, torch.device("cpu"), into, **settings)


def sequences(count=6, length=24):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def gradients(model, tokens):
    """d of every layer for each sequence, from one backward pass through the whole model."""
    seen = {name: [] for name in block_linears(model)}

    def watch(name):
        def hook(_module, _args, output):
            output.register_hook(lambda d: seen[name].append(d.detach()))

        return hook

    for name in seen:
        model.get_submodule(name).register_forward_hook(watch(name))
    for number, sequence in enumerate(tokens):
        logits = model(sequence.unsqueeze(0)).logits
        logits.backward(fisher._sample(logits.detach(), torch.Generator().manual_seed(number)))
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "qwen2", "gpt2"])
def test_it_finds_what_one_backward_pass_finds(architecture, model_folder, tmp_path):
    folder, tokens = model_folder(architecture), sequences()
    found = measured(folder, tokens, tmp_path / "found")
    for name, d in gradients(load(folder), tokens).items():
        flat = d.flatten(0, 1)
        outputs = flat.T @ flat / len(flat)
        assert torch.allclose(found.outputs(name), outputs, rtol=2e-3, atol=1e-3 * float(outputs.abs().max()))
        weights = d.square().sum(-1)
        expected = (weights / weights.mean()).clamp(max=fisher.LARGEST_WEIGHT)
        assert torch.allclose(found.token_weights([name]), expected, rtol=1e-3, atol=1e-4)


def test_layers_that_share_inputs_share_the_sum(model_folder, tmp_path):
    folder, tokens = model_folder("llama"), sequences()
    found = measured(folder, tokens, tmp_path / "found")
    d = gradients(load(folder), tokens)
    names = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"]
    weights = sum(d[name].square().sum(-1) for name in names)
    expected = (weights / weights.mean()).clamp(max=fisher.LARGEST_WEIGHT)
    assert torch.allclose(found.token_weights(names), expected, rtol=1e-3, atol=1e-4)


def test_samples_have_the_curvature_of_kl():
    logits = 2 * torch.randn(1, 1, 6)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([fisher._sample(logits, generator)[0] for _ in range(20000)])
    p = logits[0, 0].softmax(-1)
    assert torch.allclose(drawn.T @ drawn / len(drawn), p.diag() - torch.outer(p, p), atol=0.01)


def test_memory_for_a_few_sequences_gives_the_same(model_folder, tmp_path, monkeypatch):
    folder, tokens = model_folder("llama"), sequences(5)
    monkeypatch.setattr(fisher, "BATCH_TOKENS", tokens.shape[1])
    whole = measured(folder, tokens, tmp_path / "whole")
    monkeypatch.setattr(fisher, "_at_once", lambda _model, _tokens: 2)
    parts = measured(folder, tokens, tmp_path / "parts")
    for name in block_linears(load(folder)):
        assert torch.equal(whole.outputs(name), parts.outputs(name))
        assert torch.equal(whole.token_weights([name]), parts.token_weights([name]))


def test_files_that_were_damaged_are_made_anew(model_folder, tmp_path):
    folder, tokens = model_folder("llama"), sequences(3)
    layer = "model.layers.1.mlp.up_proj"
    before = measured(folder, tokens, tmp_path / "found").outputs(layer)
    path = tmp_path / "found" / "block-1.safetensors"
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    assert torch.equal(measured(folder, tokens, tmp_path / "found").outputs(layer), before)


def test_layers_that_read_nothing_may_share_inputs_with_those_that_do(model_folder, text_file):
    folder = model_folder("llama_small")
    model = quantkit.quantize(
        load(folder), load_tokenizer(folder), method=GPTQ(3, 32), rules={"*.q_proj": RTN(4, 32)}, fisher=True,
        calibration=Calibration(str(text_file), 3, 64),
    )  # fmt: skip
    assert {layer.quantizer.split("(")[0] for layer in model.quantkit_report.layers} == {"rtn", "target_shift"}


def test_a_caller_in_inference_mode(model_folder, text_file):
    folder, text = model_folder("llama_small"), Calibration(str(text_file), 3, 64)
    model = load(folder)
    with torch.inference_mode():
        quantkit.quantize(model, load_tokenizer(folder), method=GPTQ(3, 32), fisher=True, calibration=text)
        inside = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        with pytest.raises(QuantkitError, match="inference_mode"):
            quantkit.quantize(inside, load_tokenizer(folder), method=GPTQ(3, 32), fisher=True, calibration=text)


def test_what_is_done_is_taken_as_it_is_and_what_was_interrupted_begins_anew(model_folder, tmp_path):
    folder, tokens = model_folder("llama"), sequences(4)
    told = []

    def stop_in_reverse(done, _total, name):
        told.append(name)
        if name == "model.layers.0, in reverse":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(folder, tokens, tmp_path / "found", progress=stop_in_reverse)
    last = "model.layers.1.mlp.down_proj"
    found = measured(folder, tokens, tmp_path / "found")
    again = measured(folder, tokens, tmp_path / "again")
    assert torch.equal(found.outputs(last), again.outputs(last))
    told.clear()
    measured(folder, tokens, tmp_path / "found", progress=lambda done, total, name: told.append(name))
    assert not told


def test_predicted_kl_is_what_a_small_error_costs(tmp_path):
    """Each layer of a block alone is rounded to 3 bits; the factors are an approximation, and errors at several tokens
    of a sequence are not taken together, so that sums are compared."""
    folder = resolve_folder("reference")
    model = load(folder)
    tokens = Calibration("stdlib", 8, 256, seed=3).sequences(load_tokenizer(folder), model)
    found = measured(folder, tokens, tmp_path / "found")
    with torch.no_grad():
        before = model(tokens).logits
    sums = {"predicted": 0.0, "measured": 0.0}
    layers = {name: layer for name, layer in block_linears(model).items() if name.startswith("model.layers.3.")}
    for name, layer in layers.items():
        inputs = []
        handle = layer.register_forward_pre_hook(lambda _module, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            model(tokens)
        handle.remove()
        x, weights = inputs[0].flatten(0, 1), found.token_weights([name]).flatten()
        hessian = (x * weights[:, None]).T @ x / weights.sum()
        error = layer.weight.detach() - RTN(3, 64).quantize(layer.weight.detach(), None).dequantize()
        sums["predicted"] += predicted_kl(error, hessian, found.outputs(name))
        with torch.no_grad():
            layer.weight.sub_(error)
            sums["measured"] += float(token_kl(before, model(tokens).logits).mean())
            layer.weight.add_(error)
    assert sums["predicted"] == pytest.approx(sums["measured"], rel=0.3)


def test_recipes_run_back_where_a_method_wants_it(model_folder, text_file, tmp_path):
    folder, text = model_folder("llama"), Calibration(str(text_file), 4, 64)
    model = open_folder(folder).model
    for recipe, expected in [
        (Recipe(Hadamard(Trellis(2, 8)), calibration=text), True),
        (Recipe(Hadamard(Trellis(2, 8)), calibration=text, fisher=False), False),
        (Recipe(GPTQ(3, 32), calibration=text), False),
        (Recipe(GPTQ(3, 32), calibration=text, fisher=True), True),
        (Recipe(RTN(3, 32), calibration=text, fisher=True), False),
    ]:
        assert recipe.runs_back(recipe.plan(model)) is expected
    report = quantize_checkpoint(folder, Recipe(GPTQ(3, 32), calibration=text, fisher=True), tmp_path / "packed")
    assert all(layer.predicted_kl > 0 for layer in report.layers)
    assert not list((tmp_path / "packed").rglob("block-*"))
    quantizer = GPTQ(3, 32)
    loaded = quantkit.quantize(
        load(folder), AutoTokenizer.from_pretrained(folder), method=quantizer, calibration=text, fisher=True
    )
    read = quantkit.load(tmp_path / "packed", dtype=torch.float32)
    tokens = sequences()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, read(tokens).logits)
