"""Packed embeddings and heads: rows are those of the weight, and a model that has them is one like any other."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import quantkit
from quantkit import GPTQ, RTN, Calibration, Hadamard, LowRank, Recipe, TuningSettings
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.core.stats import LayerStats
from quantkit.evals.decode import bytes_per_token, measure
from quantkit.formats.dense import DenseWeight
from quantkit.formats.tied import TiedWeight
from quantkit.io.shards import INDEX
from quantkit.models.embedding import QuantizedEmbedding
from quantkit.models.linear import QuantizedLinear
from quantkit.models.plan import tied
from quantkit.models.structure import ends, tensor_bytes
from quantkit.run.estimate import estimate
from quantkit.run.pipeline import quantize_checkpoint

from ..conftest import VOCABULARY
from ..helpers.checkpoints import digest, interrupted, unseal
from ..helpers.methods import METHODS, layer, spy

ARCHITECTURES = ["llama_small", "llama_tied_small", "gpt2_small"]
TOKENS = torch.arange(80).view(2, 40) * 37 % VOCABULARY


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def recipe(text_file):
    return Recipe(GPTQ(4, 32), calibration=Calibration(str(text_file), 3, 128), head_bits=6)


@pytest.fixture(scope="module")
def packed_folder(model_folder, recipe, tmp_path_factory):
    """A function: architecture -> (checkpoint with head and embedding at 6 bits, its report), made once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("packed") / name
            made[name] = folder, quantize_checkpoint(model_folder(name), recipe, folder)
        return made[name]

    return make


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_rows_are_those_of_the_weight(method):
    weight, stats = layer(100, 70)
    packed = method.quantize(weight, stats)
    index = torch.tensor([[0, 99, 3], [7, 7, 50]])
    expected = packed.dequantize()[index]
    if isinstance(method, Hadamard | LowRank):  # torch adds up in another order for few rows than for all
        torch.testing.assert_close(packed.rows(index), expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(packed.rows(index), expected)
    assert packed.rows(index.int(), torch.bfloat16).dtype == torch.bfloat16
    assert packed.rows(index[:, :0]).shape == (2, 0, 70)
    for wrong in (-1, 100):
        with pytest.raises(IndexError):
            packed.rows(torch.tensor([wrong]))


@pytest.mark.parametrize("method", [RTN(3, 64, symmetric=False), LowRank(Hadamard(RTN(6, 64), outputs=False), 4)])
def test_a_lookup_does_not_dequantize_everything(method, monkeypatch):
    packed = method.quantize(torch.randn(50, 160), LayerStats(torch.eye(160)))
    expected = packed.dequantize()[4:9]

    def refuse(*_args):
        raise AssertionError("all rows are dequantized")

    assert packed.by_rows
    for part in (packed, *packed.nested().values()):
        monkeypatch.setattr(type(part), "dequantize", refuse)
    torch.testing.assert_close(packed.rows(torch.arange(4, 9)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.Embedding(30, 16),
        lambda: torch.nn.Embedding(30, 16, padding_idx=3),
        lambda: Gemma3TextScaledWordEmbedding(30, 16, 0, 16**0.5 * 1.01),
        lambda: BartScaledWordEmbedding(30, 16, 0, 16**0.5 * 1.01),
    ],
    ids=["plain", "padding", "gemma", "bart"],
)
def test_what_the_embedding_gave_is_given(make, dtype):
    """With a weight that loses nothing, to the bit, in the dtype that the model has now; and without a gradient."""
    replaced = make()
    packed = QuantizedEmbedding(DenseWeight(replaced.weight.detach().clone()), replaced)
    replaced.to(dtype)
    tokens = torch.tensor([[0, 3, 29]])
    packed.to(dtype)
    found = packed(tokens)
    assert found.dtype == packed.weight.dtype == dtype
    assert torch.equal(found, replaced(tokens))
    assert not found.requires_grad and not list(packed.parameters())
    assert packed.padding_idx == replaced.padding_idx
    assert packed.weight.shape == (packed.num_embeddings, packed.embedding_dim) == (30, 16)
    assert packed._buffers["weight"].dtype == torch.float32, "casts leave what is stored alone"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_disk_memory_resume_and_generation(architecture, model_folder, packed_folder, recipe, tmp_path):
    """Disk path = memory path, an interrupted run = a whole one, a loaded model = the one that was saved."""
    source, (folder, report) = model_folder(architecture), packed_folder(architecture)

    interrupted(source, recipe, tmp_path / "resumed", after=1, by=KeyboardInterrupt)
    quantize_checkpoint(source, recipe, tmp_path / "resumed", resume=True)
    assert digest(tmp_path / "resumed") == digest(folder)
    model = quantkit.quantize(
        load(source), AutoTokenizer.from_pretrained(source), method=recipe.quantizer, calibration=recipe.calibration,
        head_bits=6,
    )  # fmt: skip
    loaded = quantkit.load(folder, dtype=torch.float32).eval()
    embedding, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
    wanted = logits(loaded)
    assert torch.equal(logits(model), wanted)
    assert not torch.equal(wanted, logits(load(source)))
    for made in (model, loaded):
        made.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
        assert torch.equal(logits(again), wanted)
        stored = sum(path.stat().st_size for path in (tmp_path / "saved").glob("*.safetensors"))
        assert stored < 1.1 * report.bytes_after + 40_000
    generated = loaded.generate(TOKENS[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 12)
    in_its_own = quantkit.load(folder)
    assert in_its_own.get_input_embeddings()(TOKENS).dtype == in_its_own(TOKENS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "neox"])
def test_every_weight_counts_once(architecture, model_folder, packed_folder, recipe):
    source, (folder, report) = model_folder(architecture), packed_folder(architecture)
    loaded = quantkit.load(folder, dtype=torch.float32)
    embedding, head = ends(loaded)
    rows = {row.name: row for row in report.layers}
    together = architecture in ("llama_tied_small", "gpt2_small")
    assert rows[embedding].format == ("tied to lm_head" if together else "int_group")
    assert rows[head].quantizer.startswith("target_shift(gptq(6")
    assert any("stay one weight" in note for note in report.notes) == together
    modules = dict(loaded.named_modules())
    weights = [modules[name].packed for name in rows if not (together and name == embedding)]
    assert report.packed_weights == sum(weight.shape[0] * weight.shape[1] for weight in weights)
    assert report.bits_per_weight == pytest.approx(8 * sum(weight.nbytes for weight in weights) / report.packed_weights)
    assert report.all_weights == sum(p.numel() for p in load(source).parameters())
    expected = estimate(source, recipe)
    assert (expected.bytes_before, expected.bytes_after) == (report.bytes_before, report.bytes_after)
    assert (expected.packed_weights, expected.all_weights) == (report.packed_weights, report.all_weights)
    assert expected.bits_per_weight == pytest.approx(report.bits_per_weight)
    assert expected.layers == len(report.layers)
    in_bf16 = quantkit.load(folder, dtype=torch.bfloat16)
    assert report.bytes_after == pytest.approx(tensor_bytes(in_bf16), rel=0.01)
    read = tensor_bytes(in_bf16) - (0 if together else in_bf16.get_input_embeddings().packed.nbytes)
    assert bytes_per_token(in_bf16) == read


@pytest.mark.parametrize("architecture", ["llama_tied_small", "gpt2_small"])
def test_a_tie_holds(architecture, packed_folder, tmp_path):
    """Whatever transformers, a copy or a move does: one weight, looked up and multiplied by."""
    folder, _ = packed_folder(architecture)
    model = quantkit.load(folder, dtype=torch.float32).eval()
    before = logits(model)
    config = json.loads((folder / "config.json").read_text())
    name = ends(model)[0]
    described = config["quantization_config"]["layers"][name]
    assert (described["format"], described["layer"]) == ("tied", "lm_head")
    assert not config["tie_word_embeddings"], "what transformers would tie is no parameter any more"
    assert not any(key.startswith(f"{name}.") for key in model.state_dict())
    model.tie_weights()
    model.init_weights()
    model.resize_token_embeddings(VOCABULARY)
    assert torch.equal(logits(model), before)
    with pytest.raises(TypeError, match="QuantizedEmbedding"):
        model.resize_token_embeddings(VOCABULARY + 8)
    assert torch.equal(logits(model), before)
    placed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
    assert torch.equal(logits(placed), before)
    other = copy.deepcopy(model)
    assert other.get_input_embeddings().head is other.lm_head is not model.lm_head
    other.lm_head.scales.mul_(2)
    assert torch.equal(model.get_input_embeddings()(TOKENS) * 2, other.get_input_embeddings()(TOKENS))
    other.to("meta")
    assert other.get_input_embeddings().packed.codes.is_meta
    torch.nn.Module.half(model)  # transformers' own refuses where a model is quantized
    assert model.get_input_embeddings()(TOKENS).dtype == torch.float16
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert again.get_input_embeddings().head is again.lm_head
    assert torch.equal(logits(again), logits(model))


def test_blocks_see_the_packed_embedding_and_the_head_what_it_multiplies(model_folder, tokenizer, texts):
    """Statistics are those of a run of the model as it will be: with a head tied to the embedding, its inputs'."""
    for architecture in ("llama_small", "llama_tied_small"):
        seen, model = {}, load(model_folder(architecture))
        method = spy(GPTQ().needs, seen)(6, 64)
        rules = {"lm_head": method, "model.embed_tokens": RTN(2, 64)}
        if architecture == "llama_tied_small":
            rules["model.embed_tokens"] = method
        calibration = Calibration(texts, 3, 128)
        windows = calibration.sequences(tokenizer, model)
        dense = copy.deepcopy(model.model.embed_tokens)
        quantkit.quantize(
            model, tokenizer, method=spy(GPTQ().needs, seen)(3, 64), rules=rules, calibration=calibration,
            target_shift=0,
        )  # fmt: skip
        assert (model.model.embed_tokens.head is model.lm_head) == (architecture == "llama_tied_small")
        x = model.model.layers[0].input_layernorm(
            (dense if architecture == "llama_tied_small" else model.model.embed_tokens)(windows)
        )
        x = x.detach().flatten(0, 1)
        first = seen["model.layers.0.self_attn.q_proj"].hessian
        torch.testing.assert_close(first, x.T @ x / len(x), rtol=1e-3, atol=1e-5)
        if architecture == "llama_tied_small":
            model.model.embed_tokens = dense  # with which the blocks were run, since the head comes last
        inputs = []
        model.lm_head.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            model(windows)
        x = inputs[0].flatten(0, 1)
        torch.testing.assert_close(seen["lm_head"].hessian, x.T @ x / len(x), rtol=1e-3, atol=1e-5)


def test_models_stored_in_another_form(packed_folder, model_folder):
    """NeoX's shards and ends have names of their own, and it is loaded whole."""
    model = quantkit.load(packed_folder("neox")[0], dtype=torch.float32).eval()
    assert isinstance(model.gpt_neox.embed_in, QuantizedEmbedding) and isinstance(model.lm_head, QuantizedLinear)
    before = logits(load(model_folder("neox")))
    assert (logits(model) - before).norm() / before.norm() < 0.5


def test_rules_go_before_head_bits(model_folder):
    def plan(architecture, rules, **settings):
        found = Recipe(RTN(3, 32), rules, **{"head_bits": 6} | settings).plan(load(model_folder(architecture)))
        return {name: found[name] for name in ("model.embed_tokens", "lm_head") if name in found}, tied(found)

    both = {"model.embed_tokens": RTN(6, 64), "lm_head": RTN(6, 64)}
    assert plan("llama_small", {}) == (both, {}), "without text, both are rounded to nearest"
    assert plan("llama_small", {"lm_head": None})[0] == {"model.embed_tokens": RTN(6, 64)}
    assert plan("llama_small", {"*embed*": None})[0] == {"lm_head": RTN(6, 64)}
    assert plan("llama_small", {"lm_head": RTN(8, 32)})[0] == both | {"lm_head": RTN(8, 32)}
    assert plan("llama_small", {"*": RTN(8, 32)})[0] == both | {"lm_head": RTN(8, 32)}
    assert plan("llama_tied_small", {})[1] == {"model.embed_tokens": "lm_head"}
    assert plan("llama_tied_small", {"lm_head": None}) == ({}, {}), "one weight: what keeps the head dense keeps both"
    assert plan("llama_tied_small", {"*embed*": None}) == ({"lm_head": RTN(6, 64)}, {})
    assert plan("llama_tied_small", {"lm_head": RTN(8, 32)})[1] == {"model.embed_tokens": "lm_head"}
    assert plan("llama_tied_small", {"model.embed_tokens": RTN(8, 32)})[1] == {}, "asked for by itself"
    same = {"model.embed_tokens": RTN(5, 64), "lm_head": RTN(5, 64)}
    assert plan("llama_tied_small", same, head_bits=None)[1] == {"model.embed_tokens": "lm_head"}
    assert plan("llama_tied_small", {"model.embed_tokens": RTN(5, 64)}, head_bits=None)[0] == {
        "model.embed_tokens": RTN(5, 64)
    }


@pytest.mark.parametrize("architecture", ["llama_tied_small", "gpt2_small"])
def test_an_embedding_alone_leaves_the_head_as_it_is(architecture, model_folder, tmp_path):
    source = model_folder(architecture)
    before = load(source)
    name = ends(before)[0]
    recipe = Recipe(RTN(4, 32), {name: RTN(3, 64)})
    report = quantize_checkpoint(source, recipe, tmp_path / "packed")
    loaded = quantkit.load(tmp_path / "packed", dtype=torch.float32).eval()
    assert torch.equal(loaded.lm_head.weight, before.lm_head.weight)
    assert loaded.get_input_embeddings().packed.bits == 3
    assert any("each is stored by itself" in note for note in report.notes)
    assert estimate(source, recipe).bytes_after == report.bytes_after
    assert report.bytes_after == pytest.approx(tensor_bytes(quantkit.load(tmp_path / "packed")), rel=0.01)
    model = quantkit.quantize(load(source), method=recipe.quantizer, rules=recipe.rules)
    assert torch.equal(logits(model), logits(loaded))


def test_a_rotated_model_ends_the_tie(model_folder, tmp_path):
    recipe = Recipe(RTN(4, 64), rotation=quantkit.Rotation(), head_bits=8)
    report = quantize_checkpoint(model_folder("llama_tied_small"), recipe, tmp_path / "packed")
    loaded = quantkit.load(tmp_path / "packed", dtype=torch.float32).eval()
    assert loaded.get_input_embeddings().head is None
    assert {row.name: row.format for row in report.layers}["model.embed_tokens"] == "int_group"
    model = quantkit.quantize(
        load(model_folder("llama_tied_small")), method=recipe.quantizer, rotate_model=True, head_bits=8
    )
    before = logits(load(model_folder("llama_tied_small")))
    for found in (loaded, model):
        assert (logits(found) - before).norm() / before.norm() < 0.3


def test_ranks_by_budget_leave_the_ends_alone(model_folder, text_file, tmp_path):
    """The first pass packs all layers; the second begins from dense ones again, the embedding too."""
    source, text = model_folder("llama_tied_small"), Calibration(str(text_file), 3, 128)
    recipe = Recipe(LowRank(GPTQ(2, 64), 1), calibration=text, low_rank_bits=0.3, head_bits=6)
    quantize_checkpoint(source, recipe, tmp_path / "packed")
    model = quantkit.quantize(
        load(source), AutoTokenizer.from_pretrained(source), 2, group_size=64, low_rank_bits=0.3, head_bits=6,
        calibration=text,
    )  # fmt: skip
    assert model.get_input_embeddings().head is model.lm_head
    assert torch.equal(logits(model), logits(quantkit.load(tmp_path / "packed", dtype=torch.float32).eval()))


@pytest.mark.parametrize("architecture", ["llama_small", "llama_tied_small"])
def test_fusing_and_speed(architecture, packed_folder):
    model = quantkit.load(packed_folder(architecture)[0], dtype=torch.float32, unpack=False).eval()
    before = logits(model)
    assert quantkit.fuse(model) == 4
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    found = measure(model, prompt_tokens=8, new_tokens=3)
    assert 0 < found.ideal_token_seconds < found.token_seconds


@pytest.mark.parametrize("architecture", ["llama_small", "llama_tied_small"])
def test_tuning_leaves_the_embedding_as_it_is(architecture, model_folder, packed_folder, text_file, tmp_path):
    """And the head too where they are one weight, which both would pull at."""
    model = quantkit.load(packed_folder(architecture)[0], dtype=torch.float32)
    teacher, tokenizer = load(model_folder(architecture)), AutoTokenizer.from_pretrained(model_folder(architecture))
    rows, head = model.get_input_embeddings()(TOKENS), model.lm_head.weight
    settings = TuningSettings(2, 2, 2, evaluate_every=2, held_out=2, embeddings=True, mixed=False)
    text = Calibration(str(text_file), 8, 64)
    quantkit.tune(model, teacher, tokenizer, calibration=text, settings=settings)
    assert torch.equal(model.get_input_embeddings()(TOKENS), rows)
    assert isinstance(model.lm_head, QuantizedLinear)
    if architecture == "llama_tied_small":
        assert model.get_input_embeddings().head is model.lm_head and torch.equal(model.lm_head.weight, head)
    model.save_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(
        logits(quantkit.load(tmp_path / "tuned", dtype=torch.float32).eval()), logits(model.eval())
    )
    quantkit.finetune(model, rank=2)
    model.save_pretrained(tmp_path / "learning")
    again = quantkit.load(tmp_path / "learning", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), logits(model.eval()), atol=5e-3, rtol=0)
    assert torch.equal(quantkit.finished(model).get_input_embeddings()(TOKENS), rows)


def test_a_lookup_that_unpacks_everything_is_said(model_folder, caplog):
    rules = {"model.embed_tokens": Hadamard(RTN(6, 64))}
    model = quantkit.quantize(load(model_folder("llama_small")), method="rtn", bits=4, group_size=32, rules=rules)
    assert "model.embed_tokens: rotated(int_group) is unpacked as a whole at every lookup" in caplog.text
    weight = model.model.embed_tokens.packed
    assert torch.equal(model.model.embed_tokens(TOKENS), weight.dequantize()[TOKENS])
    caplog.clear()
    quantkit.quantize(load(model_folder("llama_small")), method="rtn", bits=4, group_size=32, head_bits=6)
    assert not caplog.text


def test_senseless_requests_are_refused(model_folder):
    for bits in (0, 9, 2.5):
        with pytest.raises(QuantkitError, match=f"{bits} bits for head and embedding: give 1 to 8"):
            quantkit.quantize(load(model_folder("llama_small")), method="rtn", head_bits=bits)
    with pytest.raises(QuantkitError, match=r"model\.embed_tokens: GPTQ\(.*has none; give it one that reads none"):
        Recipe(RTN(3, 32), {"model.embed_tokens": GPTQ(4, 32)}).plan(load(model_folder("llama_small")))

    class Normed(torch.nn.Embedding):
        def forward(self, index):
            return torch.nn.functional.normalize(super().forward(index))

    for change in ({"__class__": Normed}, {"max_norm": 1.0}):
        model = load(model_folder("llama_small"))
        for name, value in change.items():
            setattr(model.model.embed_tokens, name, value)
        with pytest.raises(QuantkitError, match=r"model\.embed_tokens is a .*more than rows.*`ignore` model"):
            quantkit.quantize(model, method="rtn", bits=3, group_size=32, head_bits=6)
        quantkit.quantize(model, method="rtn", bits=3, group_size=32, head_bits=6, rules={"*embed*": None})
        assert isinstance(model.lm_head, QuantizedLinear)
    headless = load(model_folder("llama_small"))
    headless.lm_head = torch.nn.Identity()
    with pytest.raises(QuantkitError, match="no linear head that could be packed"):
        Recipe(RTN(3, 32), head_bits=6).plan(headless)


def test_damaged_checkpoints_are_refused(packed_folder, tmp_path):
    folder, _ = packed_folder("llama_tied_small")

    def expect(message, change, without="nothing"):
        damaged = tmp_path / str(len(list(tmp_path.iterdir())))
        damaged.mkdir()
        for path in folder.iterdir():
            (damaged / path.name).write_bytes(path.read_bytes())
        unseal(damaged)
        for path in damaged.glob("*.safetensors"):
            tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(without)}
            save_file(tensors, path, metadata={"format": "pt"})
        index = json.loads((damaged / INDEX).read_text())
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if not name.startswith(without)}
        (damaged / INDEX).write_text(json.dumps(index))
        config = json.loads((damaged / "config.json").read_text())
        change(config)
        (damaged / "config.json").write_text(json.dumps(config))
        for way in (quantkit.load, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(CheckpointError, match=message):
                way(damaged)

    def layers(config):
        return config["quantization_config"]["layers"]

    name = "model.embed_tokens"
    expect("tied to nothing, .* which is not there", lambda c: layers(c)[name].update(layer="nothing"))
    expect("which is tied to model.embed_tokens", lambda c: layers(c)[name].update(layer=name))
    expect("which is int_group", lambda c: layers(c)[name].update(out_features=7))
    query = "model.layers.0.self_attn.q_proj"
    expect(f"{query}.codes is in the files, and config.json", lambda c: layers(c).update({query: layers(c)[name]}))
    expect(
        "no embedding or layer that lm_head could serve",
        lambda c: layers(c).update({query: layers(c)[name]}),
        without=query,
    )
    expect("does not fit its metadata", lambda c: layers(c)[name].pop("layer"))
    expect("in LlamaForCausalLM, and the checkpoint's", lambda c: c.update(vocab_size=VOCABULARY + 1))
    with pytest.raises(ValueError, match="that of lm_head"):
        TiedWeight("lm_head", 3, 4).dequantize()
