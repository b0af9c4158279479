"""The walker on small models of several architectures, in memory and from shards."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit import GPTQ, RTN, Calibration, Recipe, TargetShift
from quantkit.core.errors import CalibrationError, QuantkitError
from quantkit.io.weights import LoadedWeights
from quantkit.models.linear import QuantizedLinear
from quantkit.models.structure import block_linears, find_blocks, linear_weight
from quantkit.run.pipeline import quantize_checkpoint
from quantkit.run.sequential import Walker

from ..conftest import CONFIGS, VOCABULARY
from ..helpers.checkpoints import digest, interrupted
from ..helpers.experts import EXPERTS
from ..helpers.methods import first_of_each, spy


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


class Collector:
    def __init__(self):
        self.blocks = []

    def finished(self, index):
        return None

    def write(self, index, name, layers):
        self.blocks.append((index, name, layers))


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "qwen2", "gpt2"])
def test_disk_and_memory_paths_agree_to_the_bit(architecture, model_folder, text_file, tmp_path):
    """The shards path and the in-memory path quantize alike, and what is loaded gives the same logits."""
    folder = model_folder(architecture)
    calibration = Calibration(str(text_file), num_samples=3, seqlen=128)
    report = quantize_checkpoint(folder, Recipe(GPTQ(3, 64), calibration=calibration), tmp_path / "packed")
    model = quantkit.quantize(
        load(folder), AutoTokenizer.from_pretrained(folder), 3, group_size=64, calibration=calibration
    )
    loaded = quantkit.load(tmp_path / "packed", dtype=torch.float32).eval()
    tokens = torch.randint(0, VOCABULARY, (2, 200))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)
        assert not torch.equal(model(tokens).logits, load(folder)(tokens).logits)
    expected = block_linears(load(folder))
    assert {layer.name for layer in report.layers} == set(expected)
    assert report.packed_weights == sum(linear_weight(module).numel() for module in expected.values())
    assert 3 < report.bits_per_weight < 3.6
    generated = loaded.generate(tokens[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 12)


def test_inputs_are_those_of_the_quantized_prefix(model_folder, tokenizer, texts):
    """The last layer's Hessian must come from a run of the model whose earlier layers are all quantized."""
    seen = {}
    model = load(model_folder("llama"))
    windows = Calibration(texts, 4, 128).sequences(tokenizer, model)
    plan = dict.fromkeys(block_linears(model), spy(GPTQ().needs, seen)(2, 64))
    Walker(model, plan, windows, LoadedWeights(model), torch.device("cpu")).run(Collector())
    inputs = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(windows)
    handle.remove()
    x = inputs[0].flatten(0, 1)
    torch.testing.assert_close(seen["model.layers.1.mlp.down_proj"].hessian, x.T @ x / len(x), rtol=1e-3, atol=1e-5)
    expected = {f"model.layers.{i}.{first}" for i in (0, 1) for first in FIRST_OF_GROUP}
    assert len(seen) == len(plan) and first_of_each(seen) == expected, "one Hessian an input"


FIRST_OF_GROUP = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def test_streams_agree_where_nothing_was_lost(model_folder, tokenizer, texts):
    """With weights that survive 8 bits almost exactly, H and C are almost equal everywhere, and equal in block 0."""
    gathered = {}
    model = load(model_folder("gpt2"))
    windows = Calibration(texts, 4, 128).sequences(tokenizer, model)
    plan = dict.fromkeys(block_linears(model), spy(TargetShift(GPTQ(), 1.0).needs, gathered)(8, 32))
    Walker(model, plan, windows, LoadedWeights(model), torch.device("cpu")).run(Collector())
    first = gathered["transformer.h.0.attn.c_attn"]
    assert torch.equal(first.hessian, first.cross)
    for stats in gathered.values():
        difference = (stats.hessian - stats.cross).norm() / stats.hessian.norm()
        assert difference < 0.02


def test_true_sequential_changes_what_later_layers_see(model_folder, tokenizer, texts):
    reports = []
    for true_sequential in (True, False):
        model = load(model_folder("llama"))
        plan = dict.fromkeys(block_linears(model), TargetShift(GPTQ(2, 64), 0.7))
        windows = Calibration(texts, 4, 128).sequences(tokenizer, model)
        sink = Collector()
        source = LoadedWeights(model)
        Walker(model, plan, windows, source, torch.device("cpu"), true_sequential=true_sequential).run(sink)
        reports.append(sink.blocks[0][2])
    q, o = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
    assert torch.equal(reports[0][q].weight.state()["codes"], reports[1][q].weight.state()["codes"])
    assert not torch.equal(reports[0][o].weight.state()["codes"], reports[1][o].weight.state()["codes"])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox"])
def test_replaying_changes_no_bit_and_runs_attention_once(architecture, model_folder, tokenizer, texts, monkeypatch):
    import quantkit.run.sequential as calibrate

    attended, runs = [], []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: attended.append(1) or original(*args, **kwargs),
    )
    for share in (0, 1 / 8):
        monkeypatch.setattr(calibrate, "REPLAY_FRACTION", share)
        model = load(model_folder(architecture))
        attended.clear()
        quantkit.quantize(model, tokenizer, calibration=texts, num_samples=4, seqlen=128, bits=2, group_size=32)
        runs.append((model.state_dict(), len(attended)))
    blocks, streams, probes = len(find_blocks(load(model_folder(architecture)))[1]), 2, 2
    assert runs[1][1] == blocks * streams + probes  # one batch; the output's form and the order of layers are probed
    assert runs[0][1] > 2 * blocks * streams
    assert all(torch.equal(runs[0][0][name], runs[1][0][name]) for name in runs[0][0])


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2"])
def test_the_head_can_be_packed_too(architecture, model_folder, text_file, tmp_path):
    folder = model_folder(architecture)
    recipe = Recipe(RTN(3, 64), {"lm_head": GPTQ(8, 64)}, calibration=Calibration(str(text_file), 4, 128))
    report = quantize_checkpoint(folder, recipe, tmp_path / "packed")
    loaded = quantkit.load(tmp_path / "packed", dtype=torch.float32).eval()
    assert isinstance(loaded.lm_head, QuantizedLinear)
    assert isinstance(loaded.get_input_embeddings(), torch.nn.Embedding)
    assert report.layers[-1].name == "lm_head"
    assert report.layers[-1].relative_error < 1e-3
    model = load(folder)
    embedding = model.get_input_embeddings().weight.detach().clone()
    quantkit.quantize(
        model,
        AutoTokenizer.from_pretrained(folder),
        method=recipe.quantizer,
        rules=recipe.rules,
        calibration=recipe.calibration,
    )
    tokens = torch.randint(0, VOCABULARY, (1, 50))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, loaded(tokens).logits)


def test_rules_give_layers_their_own_quantizers(model_folder, tokenizer, texts):
    model = load(model_folder("llama"))
    rules = {"*.down_proj": GPTQ(bits=4), "model.layers.0.*": GPTQ(bits=8), "lm_head": None, "*.k_proj": None}
    quantkit.quantize(model, tokenizer, bits=3, rules=rules, calibration=texts, num_samples=4, seqlen=128)
    bits = {name: module.packed.bits for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert bits["model.layers.0.mlp.down_proj"] == 8
    assert bits["model.layers.1.mlp.down_proj"] == 4
    assert bits["model.layers.1.mlp.up_proj"] == 3
    assert not any(name.endswith("k_proj") for name in bits)
    assert isinstance(model.model.layers[0].self_attn.k_proj, torch.nn.Linear)


def test_models_without_blocks_are_refused():
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

    with pytest.raises(QuantkitError, match="no list of decoder blocks"):
        find_blocks(Flat())
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(QuantkitError, match="encoder-decoder"):
        find_blocks(T5ForConditionalGeneration(config))


def test_bad_numbers_name_the_layer(model_folder, tokenizer, texts):
    model = load(model_folder("llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(QuantkitError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN or Inf in 1 of"):
        quantkit.quantize(model, method="rtn")
    model = load(model_folder("llama"))
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight.fill_(3e38)  # finite itself; what it scales is not
    with pytest.raises(CalibrationError, match=r"model\.layers\.0\.mlp\.gate_proj: its inputs hold NaN.*load it anew"):
        quantkit.quantize(model, tokenizer, calibration=texts, num_samples=2, seqlen=64)


def test_senseless_requests_are_refused(model_folder, tokenizer, texts):
    cases = [
        ({"group_size": 5000}, "exceeds the widest layer"),
        ({"seqlen": 512}, "exceeds the model's context of 256"),
        ({"num_samples": 0}, "at least one sequence"),
        ({"target_shift": 1.5}, "use 0"),
        ({"device": "gpu"}, "unknown device"),
        ({"method": "gptk"}, "did you mean 'gptq'"),
    ]
    model = load(model_folder("llama"))
    for options, message in cases:
        with pytest.raises(QuantkitError, match=message):
            quantkit.quantize(model, tokenizer, **{"calibration": texts, "num_samples": 2, "seqlen": 64} | options)
    with pytest.raises(QuantkitError, match="needs the model's tokenizer"):
        quantkit.quantize(model, calibration=texts)
    quantkit.quantize(model, method="rtn", bits=4)
    with pytest.raises(QuantkitError, match="quantized already"):
        quantkit.quantize(model, method="rtn")


def test_every_config_of_the_zoo_is_used():
    here = {"llama", "llama_tied", "qwen2", "gpt2"}
    elsewhere = {"llama_small", "gpt2_small", "llama_tied_small", "llama_even", "neox", "gemma4", *EXPERTS}
    assert set(CONFIGS) == here | elsewhere, "test_methods, test_embedding, test_search, test_experts have the others"


def odd_blocks(model, kind):
    """A Llama whose blocks do what only replayed outputs would notice."""
    block = model.model.layers[0]
    attention, mlp = type(block.self_attn), type(block.mlp)

    class ScalesInPlace(attention):
        def forward(self, *args, **kwargs):
            output, weights = super().forward(*args, **kwargs)
            output *= 0.5
            return output, weights

    class OddOnesScale(attention):
        def forward(self, *args, **kwargs):
            output, weights = super().forward(*args, **kwargs)
            return (output * 0.3 if self.odd else output), weights

    class RunsTwice(mlp):
        def forward(self, x):
            return super().forward(super().forward(x))

    for index, block in enumerate(model.model.layers):
        if kind == "attention scales its output in place":
            block.self_attn.__class__ = ScalesInPlace
        elif kind == "odd blocks return something else":
            block.self_attn.__class__ = OddOnesScale
            block.self_attn.odd = index % 2
        elif kind == "the mlp runs twice":
            block.mlp.__class__ = RunsTwice
        else:
            block.self_attn.register_forward_hook(lambda _module, _args, output: (output[0] * 0.5, output[1]))


@pytest.mark.parametrize(
    "kind",
    [
        "attention scales its output in place",
        "a hook changes the output",
        "the mlp runs twice",
        "odd blocks return something else",
    ],
)
def test_replay_leaves_unusual_blocks_alone(kind, model_folder, tokenizer, texts, monkeypatch):
    import quantkit.run.sequential as calibrate

    states = []
    for share in (0, 1 / 8):
        monkeypatch.setattr(calibrate, "REPLAY_FRACTION", share)
        model = load(model_folder("llama"))
        odd_blocks(model, kind)
        plan = dict.fromkeys(block_linears(model), TargetShift(GPTQ(2, 32), 0.7))
        windows = Calibration(texts, 4, 128).sequences(tokenizer, model)
        Walker(model, plan, windows, LoadedWeights(model), torch.device("cpu")).run(Collector())
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_replay_keeps_to_its_budget(model_folder, tokenizer, texts, monkeypatch):
    """With room for some batches only, those are replayed and the others run anew; the bytes are the same."""
    import quantkit.run.sequential as calibrate

    states = []
    for memory in (0, 400_000, 2**40):
        monkeypatch.setattr(calibrate, "free_memory", lambda device, memory=memory: memory)
        model = load(model_folder("llama"))
        plan = dict.fromkeys(block_linears(model), TargetShift(GPTQ(2, 32), 0.7))
        windows = Calibration(texts, 6, 128).sequences(tokenizer, model)
        source = LoadedWeights(model)
        Walker(model, plan, windows, source, torch.device("cpu"), batch_tokens=128).run(Collector())
        states.append(model.state_dict())
    for other in states[1:]:
        assert all(torch.equal(states[0][name], other[name]) for name in other)


def test_layers_in_front_of_the_blocks_are_read_from_disk(tokenizer, texts, tmp_path):
    """OPT-350m's project_in runs before the first block and is no head."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, word_embed_proj_dim=32, ffn_dim=128, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=256, do_layer_norm_before=False,
    )  # fmt: skip
    torch.manual_seed(0)
    OPTForCausalLM(config).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    recipe = Recipe(GPTQ(3, 32), calibration=Calibration(texts, 4, 128))
    quantize_checkpoint(tmp_path / "source", recipe, tmp_path / "packed")
    loaded = quantkit.load(tmp_path / "packed", dtype=torch.float32).eval()
    model = quantkit.quantize(
        load(tmp_path / "source"), tokenizer, method=recipe.quantizer, calibration=recipe.calibration
    )
    tokens = torch.randint(0, VOCABULARY, (2, 50))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)


def test_a_layer_that_no_token_reaches_stays_dense(model_folder, tokenizer, text_file):
    """Here: one that nothing calls."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama_small"))
    for block in model.model.layers:
        block.mlp.spare = nn.Linear(64, 96, bias=False)
    quantkit.quantize(model, tokenizer, method="gptq", group_size=32, calibration=Calibration(str(text_file), 2, 64))
    report = model.quantkit_report
    spare = [f"model.layers.{index}.mlp.spare" for index in (0, 1)]
    assert f"{spare[0]}, {spare[1]} stay dense: no token of the text passes through them" in report.notes
    assert len(report.layers) == 14 and type(model.get_submodule(spare[0])) is nn.Linear
    ways = [f"{layer.name}." for layer in report.layers]
    packed = sum(8 * model.get_submodule(layer.name).packed.nbytes for layer in report.layers)
    assert report.bits_per_weight == packed / report.packed_weights
    dense = sum(t.nbytes for name, t in model.state_dict().items() if not name.startswith(tuple(ways)))
    assert report.bytes_after == dense + packed / 8


def test_keys_and_values_that_later_layers_share_resume_alike(model_folder, text_file, tmp_path):
    folder = model_folder("gemma4")
    recipe = Recipe(GPTQ(3, 32), calibration=Calibration(str(text_file), 4, 64))
    quantize_checkpoint(folder, recipe, tmp_path / "whole")
    interrupted(folder, recipe, tmp_path / "resumed", after=3)
    quantize_checkpoint(folder, recipe, tmp_path / "resumed", resume=True)
    assert digest(tmp_path / "resumed") == digest(tmp_path / "whole")
