"""`quantkit.export`: every form is read by somebody else's reader, and holds what the packed model holds."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from typer.testing import CliRunner

import quantkit
from quantkit import RTN
from quantkit.cli.main import app
from quantkit.core.errors import QuantkitError
from quantkit.exchange.export import TARGETS, export_folder
from quantkit.exchange.survey import survey
from quantkit.io.checkpoint import contents
from quantkit.io.gguf_header import read_header
from quantkit.io.shards import Shards

from ..conftest import CONFIGS
from ..helpers.experts import EXPERTS
from ..helpers.exports import LLAMAS, SIZES, TEXT, close, logits, rtn
from ..helpers.vision import SEEING

TRELLIS = {"method": "hadamard(trellis(2, state_bits=8))", "group_size": None, "fisher": False}
TRELLIS |= {"calibration": "stdlib", "num_samples": 4, "seqlen": 64}


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
