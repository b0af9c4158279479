"""GGUF files as models: the folder that comes of one computes what the file holds, and is made once."""

import contextlib
import importlib.util
import io
import json

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import quantkit
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.io import gguf as conversion
from quantkit.io.gguf import ORIGIN, choose_dtype, gguf_folder
from quantkit.io.hf import resolve_folder
from quantkit.io.shards import Shards
from quantkit.run.recipe import Calibration
from quantkit.tuning.settings import TuningSettings

from ..conftest import VOCABULARY
from ..helpers.ggufs import write_gguf

TEXT = "def f(x):\n    return x  + 12  345 ½ <|endoftext|> naïve"
TOKENS = torch.arange(3, 63).reshape(2, 30) * 31 % VOCABULARY


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "quantkit" / "gguf"


@pytest.fixture
def written(tmp_path, tokenizer):
    """A function: what `write_gguf` takes -> the file, and the model that it holds."""

    def make(kind="F16", tied=True, **more):
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, rope_theta=5e5,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8) if parameter.ndim > 1 else parameter.add_(torch.randint(32, parameter.shape) / 64)
        write_gguf(tmp_path / "tiny.gguf", model, tokenizer, kind, **more)
        return tmp_path / "tiny.gguf", model

    return make


@pytest.mark.parametrize(
    "kind, tied, dtype, within",
    [
        ("F16", True, "float16", 0),
        ("BF16", False, "bfloat16", 0),
        ("Q8_0", False, "float16", 2e-3),
        ("Q4_1", True, "float16", 2e-3),
    ],
)
def test_the_folder_computes_what_the_file_holds(written, cache, kind, tied, dtype, within):
    file, expected = written(kind, tied)
    folder = gguf_folder(file)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == [folder]
    model = quantkit.load(folder, dtype=torch.float32)
    with torch.no_grad():
        found, wanted = model(TOKENS).logits, expected(TOKENS).logits
    assert float((found - wanted).norm() / wanted.norm()) <= within
    stored = Shards(folder).specs
    assert ("lm_head.weight" in stored) == (not tied) and model.config.tie_word_embeddings == tied
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == dtype
    assert config["rope_parameters"]["rope_theta"] == 5e5 and config["eos_token_id"] == 0
    assert "_model_name_or_path" not in config and "quantization_config" not in config
    origin = json.loads((folder / ORIGIN).read_text())
    assert origin["file"] == "tiny.gguf" and origin["dtype"] == dtype
    assert (folder / "model.safetensors").stat().st_mode & 0o044 == (folder / "config.json").stat().st_mode & 0o044


def test_a_second_call_reads_nothing_but_the_file(written, monkeypatch, cache):
    file, _ = written()
    first = gguf_folder(file)
    monkeypatch.setattr(conversion, "read_header", None)
    moved = file.rename(file.parent / "elsewhere" / file.name if (file.parent / "elsewhere").mkdir() else file)
    assert gguf_folder(moved) == first


def test_what_a_killed_process_left_is_discarded(written, cache):
    file, _ = written()
    folder = gguf_folder(file)
    left = folder.rename(folder.with_name(f"{folder.name}.partial"))
    (left / "stray").touch()
    assert gguf_folder(file) == folder and not (folder / "stray").exists() and not left.exists()


@pytest.mark.parametrize("bos", [False, True])
def test_the_tokenizer_is_the_model_s_own(written, tokenizer, bos):
    chat = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    metadata = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.chat_template": chat}
    file, _ = written(metadata=metadata)
    found = AutoTokenizer.from_pretrained(gguf_folder(file))
    assert found(TEXT)["input_ids"] == [0] * bos + tokenizer(TEXT)["input_ids"]
    assert found.decode(found(TEXT, add_special_tokens=False)["input_ids"]) == TEXT
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<|endoftext|>",) * 3
    assert found.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_another_tokenizer_is_as_transformers_reads_it(written):
    file, _ = written(metadata={"tokenizer.ggml.pre": "llama-bpe"})
    with contextlib.redirect_stderr(io.StringIO()):
        direct = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    found = AutoTokenizer.from_pretrained(gguf_folder(file))
    assert found(TEXT)["input_ids"] == direct(TEXT)["input_ids"]
    assert found.special_tokens_map.items() >= direct.special_tokens_map.items() and len(found) == len(direct)


def test_files_beside_it_are_no_part_of_it(written, tokenizer, tmp_path):
    file, _ = written()
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    folder = gguf_folder(file)
    assert quantkit.load(folder).config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


def test_tokens_that_end_a_turn_end_generation(written):
    file, _ = written(metadata={"tokenizer.ggml.eot_token_id": 7})
    assert quantkit.load(gguf_folder(file)).generation_config.eos_token_id == [0, 7]


def test_nothing_is_printed(written, capfd):
    gguf_folder(written("Q8_0")[0])
    assert capfd.readouterr() == ("", "")


def test_types_are_chosen_by_what_they_lose():
    exact = torch.tensor([1.0, -(2.0**100), 2**-100])
    grid = torch.randn(4, 32).half().float() * 11 + 0.123
    assert choose_dtype([exact], True) == (torch.bfloat16, {"bfloat16": 0, "float16": float("inf")})
    dtype, error = choose_dtype([grid, torch.ones(3)], True)
    assert dtype == torch.float16 and 1e-5 < error["float16"] < 2**-11 < error["bfloat16"] < 2**-8
    assert choose_dtype([grid], False)[0] == torch.float32
    assert choose_dtype([grid.half().float()], False)[0] == torch.float16
    assert choose_dtype([grid, torch.tensor([70000.0, 0.1])], True)[0] == torch.float32
    assert choose_dtype([grid * 1e-6], True)[0] == torch.float32, "below fp16's normal numbers"
    assert choose_dtype([torch.zeros(3)], True)[0] == torch.bfloat16


def test_models_whose_activations_are_wide_are_not_stored_as_fp16(written, monkeypatch):
    monkeypatch.setattr(conversion, "_WIDE", "llama")
    config = json.loads((gguf_folder(written("Q8_0")[0]) / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_matrices_in_fp32_stay_so(written):
    folder = gguf_folder(written("F32")[0])
    assert {kind for kind, _ in Shards(folder).specs.values()} == {"F32"}


def test_llama_3_s_positions_are_found_by_their_factors(written):
    scaling = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=scaling)
    short = 1 / 5e5 ** (torch.arange(0, 16, 2).float() / 16)
    factors = (short / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]).numpy()
    assert factors.max() == pytest.approx(32) and 1 < sorted(factors)[4] < 32
    file, _ = written(more={"rope_freqs.weight": factors})
    assert quantkit.load(gguf_folder(file)).config.rope_parameters == scaling


@pytest.mark.parametrize(
    "more, said",
    [
        ({"more": {"rope_freqs.weight": np.full(8, 3, np.float32)}}, r"positions \(rope_freqs.weight\)"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, r"positions \(yarn\)"),
        ({"more": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "holds 64 numbers that transformers"),
        ({"without": ["blk.1.ffn_up.weight"]}, "lacks 1 tensors of the model, model.layers.1.mlp.up_proj.weight"),
        ({"metadata": {"split.count": 3}}, "one of 3 parts"),
        ({"architecture": "nonesuch"}, "architecture is 'nonesuch'"),
    ],
)
def test_what_would_become_another_model_is_refused(written, cache, more, said):
    file, _ = written(**more)
    with pytest.raises(QuantkitError, match=said):
        gguf_folder(file)
    assert not cache.exists() or [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_file_that_ends_early_is_refused_wherever_it_ends(written):
    file, _ = written()
    content = file.read_bytes()
    for length in (0, 3, 20, 500, len(content) // 2, len(content) - 40):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"truncated|no GGUF file"):
            gguf_folder(file)


def test_a_vocabulary_alone_is_no_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="holds no tensors"):
        gguf_folder(tmp_path / "x.gguf")


def test_without_the_package_the_message_says_how_to_get_it(written, monkeypatch):
    file, _ = written()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QuantkitError, match=r"pip install 'quantkit-llm\[gguf\]'"):
        gguf_folder(file)


def test_a_cache_that_cannot_be_written(written, cache):
    file, _ = written()
    cache.parent.mkdir(parents=True)
    cache.touch()
    with pytest.raises(QuantkitError, match="HF_HOME says where"):
        gguf_folder(file)


def test_a_full_disk(written, cache, monkeypatch):
    def full(model, folder, **_how):
        raise SafetensorError("No space left on device (os error 28)")

    file, _ = written()
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(QuantkitError, match=r"cannot be converted in .*No space left"):
        gguf_folder(file)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_hub_id_of_gguf_files_asks_which(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_how: str(tmp_path))
    with pytest.raises(QuantkitError, match=r"give one: owner/name/FILE\.gguf"):
        resolve_folder("owner/name")
    (tmp_path / "config.json").touch()
    assert resolve_folder("owner/name") == tmp_path


def test_names_of_files(written, monkeypatch):
    file, _ = written()
    folder, asked = gguf_folder(file), []
    assert resolve_folder(file) == resolve_folder(str(file)) == folder
    blob = file.rename(file.with_name("sha256-0123"))  # as some programs keep them
    assert resolve_folder(blob).name.startswith("sha256-0123-")

    def download(repo, name):
        asked.append((repo, name))
        return str(blob)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    resolve_folder("owner/name/inner/x.GGUF")
    assert asked == [("owner/name", "inner/x.GGUF")]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names: 1 / 0)
    with pytest.raises(QuantkitError, match="neither a file here nor one that the hub delivers"):
        resolve_folder("owner/name/x.gguf")
    for name in ("x.gguf", "owner/x.gguf", "./a/b/x.gguf", "/a/b/x.gguf"):
        with pytest.raises(QuantkitError, match=r"is not there; .* OWNER/NAME/FILE\.gguf"):
            resolve_folder(name)


def test_a_folder_of_them_asks_which(written):
    file, _ = written()
    with pytest.raises(CheckpointError, match=r"give the one that is meant: tiny\.gguf"):
        Shards(file.parent)


def test_reports_name_the_file(written, tmp_path, tokenizer):
    file, _ = written("Q8_0")
    report = quantkit.quantize(file, method="rtn", bits=4, group_size=32, output=tmp_path / "out")
    assert report.model == str(file)
    told = json.loads((tmp_path / "out" / "quantkit_report.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert told["model"] == str(file) and "tiny.gguf" in card and "home" not in card
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert not (tmp_path / "out" / ORIGIN).exists()
    text = tmp_path / "text.txt"
    text.write_text("def g(y): return y\n" * 400)
    found = quantkit.evaluate(tmp_path / "out", str(text), baseline=file, seqlen=32, num_samples=2)
    assert found.settings["baseline"] == str(file) and found.quality.kl > 0
    tune = TuningSettings(steps=1, batch=1, micro_batch=1, held_out=1)
    lines = Calibration(str(text), 4, 32, 1)
    quantkit.tune(tmp_path / "out", file, output=tmp_path / "tuned", calibration=lines, settings=tune)
    assert json.loads((tmp_path / "tuned" / "quantkit_tuning.json").read_text())["teacher"] == str(file)
