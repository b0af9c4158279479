"""`quantkit.export`: every form is read by somebody else's reader, and holds what the packed model holds."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CompressedTensorsConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations import compressed_tensors
from typer.testing import CliRunner

import quantkit
from quantkit import RTN
from quantkit.cli.main import app
from quantkit.core.errors import QuantkitError
from quantkit.exchange.export import TARGETS, export_folder
from quantkit.exchange.survey import survey
from quantkit.io.checkpoint import contents, read_config
from quantkit.io.gguf_header import read_header
from quantkit.io.shards import Shards

from ..conftest import CONFIGS
from ..helpers.experts import EXPERTS
from ..helpers.vision import SEEING

TOKENS = torch.arange(10, 40).view(2, 15)
TEXT = "class Node:\n    def __init__(self, value=12.5):\n        self.value = value  # naïve\n"


TRELLIS = {"method": "hadamard(trellis(2, state_bits=8))", "group_size": None, "fisher": False}
TRELLIS |= {"calibration": "stdlib", "num_samples": 4, "seqlen": 64}


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model.eval()(tokens).logits.float()


def close(found, packed, most=1e-5):
    expected = logits(quantkit.load(packed, dtype=torch.float32))
    torch.testing.assert_close(found, expected, rtol=0, atol=most * float(expected.abs().max()))


@pytest.fixture(scope="session")
def packed(short_reference, tmp_path_factory):
    """A function: settings of `quantkit.quantize` -> a packed folder, made once a session."""
    root = tmp_path_factory.mktemp("packed")

    def make(bits, source=short_reference, **settings):
        folder = root / "-".join(map(str, (source.name, bits, *settings.items())))
        if not folder.exists():
            quantkit.quantize(source, output=folder, bits=bits, **{"method": "rtn", "group_size": 64} | settings)
        return folder

    return make


@pytest.fixture(scope="session")
def of_sentences(texts):
    """A tokenizer as Llama 2, Mistral and Phi 3 have it: no words, spaces that are letters, bytes for the rest."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = Metaspace()
    trained.train_from_iterator([*texts[:20], TEXT], BpeTrainer(vocab_size=900, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: number for number, token in enumerate([*first, *learned["vocab"]])}
    vocabulary |= {"<|endoftext|>": len(vocabulary)}
    merges = [tuple(pair) for pair in learned["merges"]]
    made = Tokenizer(BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    made.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    more = ["<|endoftext|>"]
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, add_bos_token=True, additional_special_tokens=more)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory, tokenizer, of_sentences):
    """A function: (name, config) -> folder with an untrained model whose norms and biases are not all alike."""
    root = tmp_path_factory.mktemp("sources")

    def make(name, config, dtype=torch.bfloat16):
        folder = root / name
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        (of_sentences if config.model_type in ("mistral", "phi3") else tokenizer).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("name", ["llama_tied_small", "gpt2_small", "qwen3_moe", "gpt_oss", "mixtral"])
def test_dense_is_the_plain_model(name, model_of, packed, tmp_path):
    """Experts are stacked again, transposed layers turned, and all tensors called as transformers calls them."""
    source = model_of(name, CONFIGS[name], torch.float32)
    folder = packed(4, source, group_size=16, **({} if name in ("gpt_oss", "mixtral") else {"head_bits": 6}))
    made = quantkit.export(folder, tmp_path / "dense", to="dense")
    assert made.layers == 0 and made.dense
    plain, told = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert {*Shards(tmp_path / "dense").specs} == {*Shards(source).specs}
    assert not hasattr(plain.config, "quantization_config")
    expected = logits(quantkit.load(folder, dtype=torch.float32))
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)


def test_dense_of_codes_that_nobody_else_has(packed, tmp_path):
    folder = packed(None, **TRELLIS)
    quantkit.export(folder, tmp_path / "dense", to="dense", dtype="float32")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), folder)


def rtn(bits, grid):
    return {"method": f"rtn({bits}, group_size=64, grid={grid!r})", "group_size": None}


@pytest.mark.parametrize("bits, carrier, width", [(2, None, 4), (3, None, 4), (4, 5, 5), (4, None, 8), (6, None, 8)])
def test_compressed_tensors(bits, carrier, width, packed, tmp_path):
    pytest.importorskip("compressed_tensors")
    folder = packed(None, **rtn(bits, "half"))
    made = quantkit.export(folder, tmp_path / "out", to="compressed-tensors", carrier=carrier)
    assert made.error == 0 and made.layers == 14
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == width
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)), folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_grid_around_a_whole_number_goes_at_its_own_width(bits, packed, tmp_path):
    folder = packed(bits, group_size=32)
    for to, config in (("compressed-tensors", "config_groups"), ("gptq", "bits")):
        made = quantkit.export(folder, tmp_path / to, to=to)
        said = json.loads((tmp_path / to / "config.json").read_text())["quantization_config"][config]
        assert made.error == 0 and (said if to == "gptq" else said["group_0"]["weights"]["num_bits"]) == bits
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "compressed-tensors", dtype=torch.float32)), folder)
    assert quantkit.export(folder, tmp_path / "mlx", to="mlx", dtype="float32").error < 1e-6
    assert quantkit.export(folder, tmp_path / "model.gguf", to="gguf").error == 0
    kinds = {matrix.format for matrix in survey(tmp_path / "model.gguf").layers.values()}
    assert kinds == {f"Q{bits}_0"}
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)), folder)


@pytest.mark.parametrize("program, bits", [("gguf", 3), ("gguf", 4), ("vllm", 8), ("mlx", 3)])
def test_packed_for_a_program(program, bits, short_reference, tmp_path):
    arguments = ["quantize", short_reference, "--bits", bits, "--method", "rtn", "--for", program, "--no-check"]
    said = CliRunner().invoke(app, [*map(str, arguments), "--output", str(tmp_path / "packed")])
    assert said.exit_code == 0, said.output
    to = {"vllm": "compressed-tensors"}.get(program, program)
    made = quantkit.export(tmp_path / "packed", tmp_path / "out", to=to, dtype="float32" if to == "mlx" else None)
    assert made.error < 1e-6 and made.layers == 14
    if to != "mlx":
        form = {3: "Q4_0", 4: "Q4_0", 8: "compressed-tensors 8 bits g128"}[bits]
        assert {matrix.format for matrix in survey(tmp_path / "out").layers.values()} == {form}


def test_packed_for_nobody(short_reference, tmp_path):
    for more, message in (
        (["--method", "trellis"], "gguf has integer grids"),
        (["--preset", "fast"], "--for gguf decides what --preset does"),
        (["--bits", "2.5"], "has codes of 1, 2, 3"),
    ):
        asked = ["quantize", str(short_reference), "--for", "gguf", *more, "--output", str(tmp_path / "out")]
        result = CliRunner().invoke(app, asked)
        assert isinstance(result.exception, QuantkitError) and message in str(result.exception)


def test_layers_of_different_bits(packed, tmp_path):
    pytest.importorskip("compressed_tensors")
    folder = packed(3, rules={"*down_proj": RTN(5, group_size=64)})
    quantkit.export(folder, tmp_path / "out", to="compressed-tensors")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)), folder)


@pytest.mark.parametrize("bits, symmetric", [(2, True), (3, False), (4, True), (6, False), (8, True)])
def test_mlx(bits, symmetric, packed, tmp_path):
    mlx = pytest.importorskip("mlx.core")
    import numpy as np

    folder = packed(bits, symmetric=symmetric)
    made = quantkit.export(folder, tmp_path / "out", to="mlx", dtype="float32")
    assert made.error < 1e-6
    stored, model = {}, quantkit.load(folder, dtype=torch.float32, unpack=False)
    for file in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(file)
    for name, layer in model.named_modules():
        if hasattr(layer, "packed"):
            codes = mlx.array(stored[f"{name}.weight"].view(torch.int32).numpy().view(np.uint32))
            scales, offsets = (mlx.array(stored[f"{name}.{part}"].numpy()) for part in ("scales", "biases"))
            read = torch.from_numpy(np.array(mlx.dequantize(codes, scales, offsets, group_size=64, bits=bits)))
            torch.testing.assert_close(read, layer.packed.dequantize(), rtol=1e-6, atol=1e-6)


def test_mlx_runs_the_model(packed, tmp_path):
    mlx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    import numpy as np

    folder = packed(3, head_bits=6)
    made = quantkit.export(folder, tmp_path / "out", to="mlx", dtype="float32")
    assert made.dense == () and made.layers >= 15
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    found = torch.from_numpy(np.array(model(mlx.array(TOKENS.numpy())).astype(mlx.float32)))
    close(found, folder)
    assert tokenizer.encode(TEXT) == AutoTokenizer.from_pretrained(folder).encode(TEXT)


OTHERS = ["glm4_moe", "mixtral", "qwen2_moe", "qwen3_moe", "gemma3_text", "llama, scaled", "qwen3"]


@pytest.mark.parametrize("kind", OTHERS)
def test_mlx_runs_others(kind, model_of, packed, tmp_path):
    """Experts stacked under mlx-lm's own names; rotary positions as config.json said them before transformers 5."""
    mlx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    import numpy as np

    config = AutoConfig.for_model(kind.split(",")[0], **SIZES | LLAMAS[kind]) if kind in LLAMAS else EXPERTS[kind]
    folder = packed(4, model_of(kind, config), group_size=32)
    assert quantkit.export(folder, tmp_path / "out", to="mlx", dtype="float32").dense == ()
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    close(torch.from_numpy(np.array(model(mlx.array(TOKENS.numpy())).astype(mlx.float32))), folder, 1e-4)


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq(bits, packed, tmp_path):
    folder = packed(None, **rtn(bits, "half"))
    made = quantkit.export(folder, tmp_path / "out", to="gptq")
    assert made.error == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bits"] == {3: 4, 4: 8}[bits] and config["sym"]
    expected = logits(quantkit.load(folder, dtype=torch.float32))
    found = logits(quantkit.load(tmp_path / "out", dtype=torch.float32))  # whose weights are in fp16
    assert (found - expected).norm() <= 1e-3 * expected.norm()


SIZES = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
LLAMAS = {
    "llama": {},
    "llama, scaled": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 128},
    "gemma3_text": {
        "num_hidden_layers": 6, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 256,
        "query_pre_attn_scalar": 256, "sliding_window": 64, "tie_word_embeddings": True,
    },
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 160,
    },
    "qwen3_moe": {
        "num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 96, "norm_topk_prob": True, "head_dim": 64
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LLAMAS)
def test_gguf(name, model_of, packed, tmp_path):
    pytest.importorskip("gguf")
    config = AutoConfig.for_model(name.split(",")[0], **SIZES | LLAMAS[name])
    folder = packed(3, model_of(name, config), group_size=32)
    made = quantkit.export(folder, tmp_path / "model.gguf", to="gguf")
    assert made.error == 0 and made.layers and made.nbytes == (tmp_path / "model.gguf").stat().st_size
    if name == "mixtral":  # whose experts transformers' reader does not know; llama.cpp does
        return
    widths = {key: LLAMAS[name][key] for key in LLAMAS[name] if key.endswith("intermediate_size")}  # of experts
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32, **widths)
    if name != "llama, scaled":  # which transformers' reader leaves out; llama.cpp does not
        close(logits(found), folder)
    if name == "llama":  # of others transformers' reader splits text as their makers' tokenizers do
        tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        assert tokenizer(TEXT).input_ids == AutoTokenizer.from_pretrained(folder)(TEXT).input_ids


@pytest.mark.parametrize("bits, symmetric, error", [(2, True, 0), (4, True, 0), (6, True, 0), (4, False, 1e-3)])
def test_blocks_of_gguf(bits, symmetric, error, packed, tmp_path):
    pytest.importorskip("gguf")
    folder = packed(bits, symmetric=symmetric, head_bits=6)
    made = quantkit.export(folder, tmp_path / "model.gguf", to="gguf")
    assert made.error <= error
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    expected = logits(quantkit.load(folder, dtype=torch.float32))
    # the embedding has zeros, which its blocks hold rounded to fp16
    assert (logits(found) - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("name", [*LLAMAS, "reference"])
def test_llama_cpp_runs_it(name, short_reference, model_of, packed, tmp_path):
    """Its products round activations to 8 bits, so that its numbers are near those of fp32, and not the same."""
    xllamacpp = pytest.importorskip("xllamacpp")
    source = short_reference
    if name != "reference":
        source = model_of(name, AutoConfig.for_model(name.split(",")[0], **SIZES | LLAMAS[name]))
    folder = packed(4, source, group_size=32)
    quantkit.export(folder, tmp_path / "model.gguf", to="gguf")
    model = quantkit.load(folder, dtype=torch.float32)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(tmp_path / "model.gguf"), 128, 1
    settings.cpuparams.n_threads = 1
    server = xllamacpp.Server(settings)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    own = name in ("reference", "mistral", "phi3")  # whose tokenizer is as llama.cpp has that architecture's
    seen = 0
    for prompt in [TEXT if own else ids, *(ids[:count] for count in (3, 7, 20))]:
        expected = logits(model, torch.tensor([ids if prompt is TEXT else prompt]))[0, -1].log_softmax(-1)
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": 3, "temperature": 0, "ignore_eos": True}
        said = server.handle_completions(asked)["choices"][0]["logprobs"]
        for token in said["content"][0]["top_logprobs"] if said else ():  # none of a letter's first byte
            assert abs(token["logprob"] - float(expected[token["id"]])) < 0.05 * float(expected.std()) + 0.02
            seen += 1
    assert seen >= 6


def test_refused_by_name_with_what_would_do(packed, model_of, tmp_path):
    trellis = packed(None, **TRELLIS)
    for to in sorted(TARGETS.keys() - {"dense"}):
        with pytest.raises(QuantkitError, match=r"layers\.0\..*\(and 13 more layers\).*rotated.*--to dense"):
            quantkit.export(trellis, tmp_path / "none", to=to)
    with pytest.raises(QuantkitError, match="8-bit codes half a step off zero, which take 9 bits"):
        quantkit.export(packed(None, **rtn(8, "half")), tmp_path / "none", to="gptq")
    with pytest.raises(QuantkitError, match="zeros lie between whole numbers"):
        quantkit.export(packed(4, symmetric=False), tmp_path / "none", to="gptq")
    with pytest.raises(QuantkitError, match="codes of 7 bits; it has 2, 3, 4, 5, 6, 8"):
        quantkit.export(packed(7), tmp_path / "none", to="mlx")
    experts = packed(4, model_of("glm4_moe", EXPERTS["glm4_moe"]), group_size=16)
    with pytest.raises(QuantkitError, match="experts"):
        quantkit.export(experts, tmp_path / "none", to="gptq")
    with pytest.raises(QuantkitError, match=r"are written of llama.*not of 'glm4_moe'.*convert_hf_to_gguf"):
        quantkit.export(experts, tmp_path / "none", to="gguf")
    with pytest.raises(QuantkitError, match=r"unknown form 'ggml'.*gguf, gptq, mlx"):
        quantkit.export(experts, tmp_path / "none", to="ggml")
    with pytest.raises(QuantkitError, match="not a quantkit checkpoint"):
        quantkit.export(model_of("glm4_moe", EXPERTS["glm4_moe"]), tmp_path / "none", to="dense")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kind, more, message",
    [
        ("llama", {"hidden_act": "gelu"}, "llama.cpp has silu in llama, and this model has gelu"),
        ("gemma3_text", {"rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        }}, "rotary base of 10000"),
        ("llama", {"vocab_size": 2000}, "the tokenizer has 2048 tokens, and the model's embedding 2000 rows"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_do_otherwise_is_refused(kind, more, message, model_of, packed, tmp_path):
    name = f"{kind}-{next(iter(more))}"
    config = AutoConfig.for_model(kind, **SIZES | LLAMAS[kind] | more)
    with pytest.raises(QuantkitError, match=message):
        quantkit.export(packed(4, model_of(name, config), group_size=32), tmp_path / "out.gguf", to="gguf")
    assert not any(tmp_path.iterdir())


def test_windows_that_llama_cpp_has_not_bound_the_context(model_of, packed, tmp_path):
    config = AutoConfig.for_model("mistral", **SIZES | {"sliding_window": 48})
    quantkit.export(packed(4, model_of("windowed", config), group_size=32), tmp_path / "out.gguf", to="gguf")
    assert read_header(tmp_path / "out.gguf").metadata["llama.context_length"] == 48


@pytest.mark.parametrize(
    ("to", "part"), [("mlx", "weight"), ("compressed-tensors", "weight_packed"), ("gptq", "qweight")]
)
@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl"])
def test_models_that_see_keep_their_names(kind, to, part, packed, tokenizer, tmp_path):
    """Which are those of the files, as other programs look them up, and not those of transformers' modules."""
    folder = tmp_path / "source"
    AutoModelForImageTextToText.from_config(SEEING[kind].config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    quantkit.quantize(folder, output=tmp_path / "packed", bits=4, method="rtn", group_size=32)
    quantkit.export(tmp_path / "packed", tmp_path / "out", to=to, dtype="float32")
    dense, stored = Shards(folder).specs, Shards(tmp_path / "out").specs
    found = {name for name in stored if name.endswith(f".{part}")}
    assert found and {name.replace(f".{part}", ".weight") for name in found} <= set(dense)
    assert {name for name in stored if name in dense} | {name.replace(f".{part}", ".weight") for name in found} == set(
        dense
    )
    if to == "compressed-tensors":
        theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
        close(logits(theirs), tmp_path / "packed")
    if to != "mlx":
        quantkit.import_model(tmp_path / "out", tmp_path / "again")
        weights = (contents(tmp_path / name).layers for name in ("packed", "again"))
        assert len({frozenset(found) for found in weights}) == 1


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "glm4_moe"])
def test_experts_go_to_compressed_tensors_and_back(kind, model_of, packed, tmp_path):
    """One by one under the names of the model's files, gate and up apart, as transformers and vLLM look them up."""
    source = model_of(f"{kind}, experts", EXPERTS[kind])
    folder = packed(4, source, group_size=32)
    quantkit.export(folder, tmp_path / "out", to="compressed-tensors", dtype="float32")
    dense, stored = Shards(source).specs, Shards(tmp_path / "out").specs
    assert {name.replace("_packed", "") for name in stored if not name.endswith(("_scale", "_shape"))} == set(dense)
    quantization = read_config(tmp_path / "out")["quantization_config"]
    assert any(name.endswith(".mlp.gate") for name in quantization["ignore"])  # routers
    quantkit.import_model(tmp_path / "out", tmp_path / "again")
    close(logits(quantkit.load(tmp_path / "again", dtype=torch.float32)), folder)
    if hasattr(compressed_tensors, "CompressedTensorsDequantize"):  # newer than 5.17
        unpacked = CompressedTensorsConfig(dequantize=True)
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, quantization_config=unpacked
        )
        close(logits(theirs), folder)
    quantkit.export(tmp_path / "again", tmp_path / "twice", to="compressed-tensors", dtype="float32")
    first, twice = (dict(shards.read(shards.specs)) for shards in map(Shards, (tmp_path / "out", tmp_path / "twice")))
    assert first.keys() == twice.keys() and all(torch.equal(first[name], twice[name]) for name in first)


@pytest.mark.parametrize("bits, of_experts", [(8, 4), (4, 8)])
def test_experts_have_a_width_of_their_own(bits, of_experts, model_of, packed, tmp_path):
    """transformers finds the experts' scheme by a pattern, and else takes the first one."""
    source = model_of("qwen3_moe, experts", EXPERTS["qwen3_moe"])
    folder = packed(bits, source, group_size=32, experts_bits=of_experts)
    quantkit.export(folder, tmp_path / "out", to="compressed-tensors", dtype="float32")
    groups = read_config(tmp_path / "out")["quantization_config"]["config_groups"].values()
    (own,) = (group for group in groups if any("experts" in target for target in group["targets"]))
    assert own["weights"]["num_bits"] == of_experts and own["targets"] == [r"re:.*\.experts\.\d+\..*"]
    if hasattr(compressed_tensors, "CompressedTensorsDequantize"):  # newer than 5.17
        unpacked = CompressedTensorsConfig(dequantize=True)
        load = AutoModelForCausalLM.from_pretrained
        close(logits(load(tmp_path / "out", dtype=torch.float32, quantization_config=unpacked)), folder)


def test_experts_that_readers_would_not_have_are_refused(model_of, packed, tmp_path):
    folder = packed(4, model_of("gpt_oss, experts", EXPERTS["gpt_oss"]), group_size=32)
    for to in ("compressed-tensors", "gptq", "mlx"):
        with pytest.raises(QuantkitError, match="experts that the model's files have all in one tensor; `--to dense`"):
            quantkit.export(folder, tmp_path / "out", to=to)
    source = model_of("qwen3_moe, experts", EXPERTS["qwen3_moe"])
    with pytest.raises(QuantkitError, match="experts one by one; `--to compressed-tensors` has them"):
        quantkit.export(packed(4, source, group_size=32), tmp_path / "out", to="gptq")
    with pytest.raises(QuantkitError, match="experts with zeros"):
        quantkit.export(packed(4, source, group_size=32, symmetric=False), tmp_path / "out", to="compressed-tensors")
    wider = {"*experts.1.down_proj": RTN(8, group_size=32)}
    quantkit.quantize(source, output=tmp_path / "wider", bits=4, method="rtn", group_size=32, rules=wider)
    for to in ("compressed-tensors", "mlx", "gguf"):
        with pytest.raises(QuantkitError, match=r"experts\.0\.down_proj and .*experts\.1\.down_proj are .* two ways"):
            quantkit.export(tmp_path / "wider", tmp_path / "out.gguf", to=to)


def test_mlx_refuses_what_mlx_lm_has_otherwise(model_of, packed, tmp_path):
    """Convolutions, which it turns; and where nothing stays packed."""
    convolved = AutoConfig.for_model("lfm2", **SIZES, layer_types=["conv", "full_attention"])
    with pytest.raises(QuantkitError, match=r"conv.* is a convolution, which mlx-lm has in another order in lfm2"):
        quantkit.export(packed(4, model_of("lfm2", convolved), group_size=32), tmp_path / "out", to="mlx")
    source = model_of("qwen3", AutoConfig.for_model("qwen3", **SIZES | LLAMAS["qwen3"]))
    quantkit.quantize(
        source, output=tmp_path / "head", bits=4, method="rtn", rules={"model.layers.*": None}, head_bits=7
    )
    for to in ("mlx", "compressed-tensors", "gptq"):
        with pytest.raises(QuantkitError, match=f"no layer that {to} holds is packed"):
            quantkit.export(tmp_path / "head", tmp_path / "out", to=to)


@pytest.mark.parametrize("kept", ["*experts*", "*layers.0.*experts*"])
def test_dense_experts_in_gguf(kept, model_of, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    source = model_of("qwen3_moe", AutoConfig.for_model("qwen3_moe", **SIZES | LLAMAS["qwen3_moe"]))
    folder = tmp_path / "packed"
    quantkit.quantize(source, output=folder, bits=4, method="rtn", group_size=32, rules={kept: None})
    quantkit.export(folder, tmp_path / "model.gguf", to="gguf", dtype="float32")
    quantkit.import_model(tmp_path / "model.gguf", tmp_path / "again")
    close(logits(quantkit.load(tmp_path / "again", dtype=torch.float32)), folder, 1e-3)  # whose ends are in fp16
    quantkit.export(folder, tmp_path / "mlx", to="mlx", dtype="float32")
    quantkit.import_model(tmp_path / "mlx", tmp_path / "mine")
    close(logits(quantkit.load(tmp_path / "mine", dtype=torch.float32)), folder)


def test_groups_as_wide_as_some_layers(packed, model_of, tmp_path):
    config = AutoConfig.for_model("llama", **SIZES | {"hidden_size": 64, "head_dim": 16})
    folder = packed(4, model_of("even", config), group_size=64)
    assert quantkit.export(folder, tmp_path / "out", to="gptq").layers == 14


def test_stopped_and_gone_on_with(packed, tmp_path):
    folder, out = packed(3), tmp_path / "out"

    def stop(done, _total, _what):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_folder(folder, out, "gptq", progress=stop)
    with pytest.raises(QuantkitError, match="resume"):
        export_folder(folder, out, "gptq")
    export_folder(folder, out, "gptq", resume=True)
    export_folder(folder, tmp_path / "whole", "gptq")
    for file in (tmp_path / "whole").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    with pytest.raises(QuantkitError, match="already exists"):
        export_folder(folder, out, "gptq")


def test_a_model_in_memory(packed, tmp_path):
    folder = packed(3)
    quantkit.export(quantkit.load(folder, dtype=torch.float32), tmp_path / "memory", to="gptq")
    assert (tmp_path / "memory" / "tokenizer.json").exists()
    quantkit.export(quantkit.load(folder), tmp_path / "new" / "model.gguf", to="gguf")
    quantkit.export(folder, tmp_path / "folder", to="gptq")
    one, other = (
        {**dict(Shards(tmp_path / name).read(Shards(tmp_path / name).specs))} for name in ("memory", "folder")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].float(), other[name].float()) for name in one)


def test_the_command(packed, tmp_path):
    folder = packed(3)
    said = CliRunner().invoke(app, ["export", str(folder), "--to", "gptq", "--output", str(tmp_path / "out"), "--json"])
    assert said.exit_code == 0, said.output
    record = json.loads(said.stdout)
    assert record["layers"] == 14 and record["error"] == 0 and record["to"] == "gptq"
    again = CliRunner().invoke(app, ["export", str(folder), "--to", "dense", "--output", str(tmp_path / "dense")])
    assert again.exit_code == 0 and "dense" in again.stdout and (tmp_path / "dense" / "config.json").exists()


def test_rounded_anew(packed, text_file, tmp_path):
    """What a form does not hold goes there all the same, if asked for, and the cost is told."""
    folder = packed(None, **TRELLIS)
    text = ["--calibration", str(text_file), "--num-samples", "4", "--seqlen", "64"]
    asked = ["export", str(folder), "--to", "gguf", "--requantize", "4", *text, "--json"]
    said = CliRunner().invoke(app, [*asked, "--output", str(tmp_path / "model.gguf")])
    assert said.exit_code == 0, said.output
    record = json.loads(said.stdout)
    assert record["layers"] == 14 and record["error"] == 0 and 0 < record["check"]["kl"] < 1
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    expected = logits(quantkit.load(folder, dtype=torch.float32))
    assert 0 < (logits(found) - expected).norm() < 0.3 * expected.norm()
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    for more, message in (
        (["--to", "dense"], "dense needs no rounding"), (["--resume"], "begins anew"),
        (["--output", str(tmp_path / "model.gguf")], "already exists"),
    ):  # fmt: skip
        result = CliRunner().invoke(app, [*asked, "--output", str(tmp_path / "other"), *more])
        assert isinstance(result.exception, QuantkitError) and message in str(result.exception)
