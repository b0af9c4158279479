"""Whatever the files of a checkpoint or a run hold: they are what was written, or one line says that they are not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import quantkit
from quantkit import RTN, Recipe
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.evals.fuzz_damage import header_of, with_header
from quantkit.io.checkpoint import contents, packed_layers, read_config, sealed, verify
from quantkit.io.run_folder import MANIFEST, Output, RunFolder
from quantkit.io.shards import INDEX, Shards, header_checksum
from quantkit.run.pipeline import quantize_checkpoint

from ..helpers.garbage import changed, few, refused

RECIPE = Recipe(RTN(3, 16))
SHARD = "model-00001-of-00003.safetensors"
ENTRIES = {
    name: {"dtype": "I32", "shape": [2, 2], "data_offsets": [16 * i, 16 * i + 16]} for i, name in enumerate("abc")
}


@pytest.fixture(scope="module")
def packed(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage") / "packed"
    quantize_checkpoint(model_folder("llama_small"), RECIPE, folder)
    return folder


@pytest.fixture
def copy(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    return tmp_path / "copy"


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path, change):
    header, start = header_of(path.read_bytes())
    change(header)
    path.write_bytes(with_header(json.dumps(header).encode(), path.read_bytes()[start:]))


def test_what_was_written_is_what_is_loaded(copy):
    assert contents(copy, True).verified == len(Shards(copy).specs)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(dict(reversed(config.items()))))  # order and spaces mean nothing
    assert contents(copy).layers.keys() == config["quantization_config"]["layers"].keys()


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["rope_parameters"].update(rope_theta=9.0),
        lambda config: config.update(rms_norm_eps=1e-3),
        lambda config: config.pop("hidden_act"),
        lambda config: config["quantization_config"].update(more=1),
        lambda config: config["quantization_config"]["checksums"].update(config=None),
        lambda config: config["quantization_config"]["checksums"]["headers"].popitem(),
    ],
)
def test_another_config_is_another_model_and_refused(change, copy):
    edit(copy / "config.json", change)
    with pytest.raises(CheckpointError, match=r"config\.json is not as it was written.*take `checksums` out"):
        quantkit.load(copy)


@pytest.mark.parametrize("sums", [1, [], {}, "x", {"headers": 3}])
def test_checksums_that_are_none(sums, copy):
    edit(copy / "config.json", lambda config: config["quantization_config"].update(checksums=sums))
    with pytest.raises(CheckpointError, match=r"for checksums; fetch it anew"):
        packed_layers(copy)


def test_a_change_that_was_wanted_is_let_in(copy):
    def change(config):
        config["rms_norm_eps"] = 1e-3
        del config["quantization_config"]["checksums"]

    edit(copy / "config.json", change)
    assert quantkit.load(copy).config.rms_norm_eps == 1e-3
    with pytest.raises(CheckpointError, match=r"config\.json is not as it was written"):
        verify(copy)


def test_tensors_that_changed_places_are_seen_without_reading_them(copy):
    names = [f"model.layers.0.self_attn.{name}_proj.codes" for name in ("k", "v")]

    def exchange(header):
        header[names[0]], header[names[1]] = header[names[1]], header[names[0]]

    edit_header(copy / SHARD, exchange)
    with pytest.raises(CheckpointError, match=rf"{SHARD} is not as it was written: its header"):
        quantkit.load(copy)


def test_norms_of_another_type_are_seen(copy):
    def other(header):
        header["model.layers.0.input_layernorm.weight"]["dtype"] = "F16"

    edit_header(copy / SHARD, other)
    with pytest.raises(CheckpointError, match="its header has another checksum"):
        quantkit.load(copy)


def test_folders_of_transformers_have_no_checksums_and_load(packed, tmp_path):
    quantkit.load(packed).save_pretrained(tmp_path / "again")
    assert "checksums" not in read_config(tmp_path / "again")["quantization_config"]
    assert quantkit.load(tmp_path / "again")
    with pytest.raises(CheckpointError, match="save_pretrained writes none"):
        verify(tmp_path / "again")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "quantkit_report.json", INDEX])
def test_verify_looks_at_all_files_of_a_run(name, copy):
    assert verify(copy)
    (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=rf"{name} is not as it was written, or is gone"):
        verify(copy)
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is not as it was written, or is gone"):
        verify(copy)


def test_no_layers_are_no_checkpoint(copy):
    edit(copy / "config.json", lambda config: config["quantization_config"].update(layers={}))
    with pytest.raises(CheckpointError, match="lists no layers"):
        contents(copy)


def test_a_file_that_cannot_be_read_is_named(model_folder, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(model_folder("llama_small"), source)
    (source / "chat_template.jinja").symlink_to("/proc/self/mem")
    with pytest.raises(QuantkitError, match=r"chat_template\.jinja cannot be read .*mend or remove it"):
        quantize_checkpoint(source, RECIPE, tmp_path / "out")


def test_integers_in_the_place_of_weights_are_refused(model_folder, tmp_path):
    shutil.copytree(model_folder("llama_small"), tmp_path / "model")

    def other(header):
        header["model.norm.weight"]["dtype"] = "I16"

    edit_header(tmp_path / "model" / "model.safetensors", other)
    with pytest.raises(QuantkitError, match=r"model\.norm\.weight is I16 in its file, and LlamaForCausalLM has"):
        quantize_checkpoint(tmp_path / "model", RECIPE, tmp_path / "out")


def test_a_record_in_the_place_of_another_is_refused(tmp_path):
    run = RunFolder(tmp_path / "run", "a run")
    with run.begin({}):
        run.write_record("a.json", {"layers": {}})
        shutil.copy(run.path("a.json"), run.path("b.json"))
        shutil.copy(run.path("run.json"), run.path("c.json"))
        assert run.read_record("a.json", "a record; remove it") == {"layers": {}}
        for name in ("b.json", "c.json"):
            with pytest.raises(CheckpointError, match="not as it was written"):
                run.read_record(name, "a record; remove it")


CONFIG = {
    "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "quantization_config": {
        "quant_method": "quantkit", "version": 2, "layers": {
            "lm_head": {
                "format": "int_group", "bits": 4, "group_size": 8, "in_features": 8,
                "tensors": {"codes": ["int32", [8, 4]], "scales": ["float16", [1, 8]]},
            }
        },
    },
}  # fmt: skip
HEAD = {"lm_head.codes": torch.zeros(8, 4).int(), "lm_head.scales": torch.ones(1, 8).half()}


@few
@given(content=changed(CONFIG), seal=st.booleans())
def test_any_config(tmp_path_factory, content, seal):
    folder = tmp_path_factory.getbasetemp() / "config"
    folder.mkdir(exist_ok=True)
    save_file(HEAD, folder / "model.safetensors")
    whole = sealed(CONFIG, [folder / "model.safetensors"])
    (folder / "config.json").write_text(json.dumps(whole))
    assert [*packed_layers(folder)] == ["lm_head"]
    if seal:
        sums = whole["quantization_config"]["checksums"]
        content = json.dumps(_with_checksums(content, sums)).encode()
    (folder / "config.json").write_bytes(content)
    wrong, found = refused(packed_layers, folder)
    assert wrong or not seal or found == CONFIG["quantization_config"]["layers"]


def _with_checksums(content, sums):
    """The config with the checksums of the undamaged one, where it has room for them."""
    try:
        config = json.loads(content)
        config["quantization_config"]["checksums"] = sums
        return config
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


@few
@given(content=changed({"metadata": {"total_size": 48}, "weight_map": dict.fromkeys("abc", "one.safetensors")}))
def test_any_index(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "index"
    folder.mkdir(exist_ok=True)
    (folder / "one.safetensors").write_bytes(with_header(json.dumps(ENTRIES).encode(), bytes(48)))
    (folder / INDEX).write_bytes(content)
    wrong, found = refused(Shards, folder)
    assert wrong or found.specs.keys() <= set("abc")


@pytest.mark.parametrize("file", [3, None, ["x"], "", "../one.safetensors", "/etc/passwd", "a\0b", "x" * 5000])
def test_an_index_leads_to_files_of_its_folder_alone(file, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match=r"'a' in .* which is no file of the folder"):
        Shards(tmp_path)


@few
@given(content=changed(ENTRIES), payload=st.integers(0, 60))
def test_any_header(tmp_path_factory, content, payload):
    path = tmp_path_factory.getbasetemp() / "model.safetensors"
    path.write_bytes(with_header(content, bytes(payload)))
    wrong, shards = refused(Shards, path.parent)
    if not wrong:
        refused(lambda: dict(shards.read(shards.specs)))
        assert len(header_checksum(path)) == 16


@pytest.mark.parametrize("content", [b"", b"123", bytes(8), b"\xff" * 40, b"\x10" + bytes(9)])
def test_no_header(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        header_checksum(tmp_path / "x")


@few
@given(content=changed({"files": {"a": 1, "b.safetensors": 80}, "others": {"a": "x"}, "tensors": {"t": "y"}}))
def test_any_list_of_files(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "listed"
    folder.mkdir(exist_ok=True)
    (folder / "a").write_bytes(b"1")
    (folder / MANIFEST).write_bytes(content)
    assert refused(verify, folder)[0]
    wrong, output = refused(lambda: Output(folder, overwrite=True))
    assert wrong or isinstance(output, Output)


@few
@given(content=changed({"run": "a run", "settings": {"bits": 3}}), journal=st.booleans())
def test_any_record_of_a_run(tmp_path_factory, content, journal):
    folder = Path(tmp_path_factory.getbasetemp()) / "run"
    shutil.rmtree(folder, ignore_errors=True)
    run = RunFolder(folder, "a run")
    with run.begin({"settings": {"bits": 3}}):
        run.write_bytes("made", b"1")
    (folder / ("run.files" if journal else "run.json")).write_bytes(content)

    def goes_on():
        with RunFolder(folder, "a run").begin({"settings": {"bits": 3}}) as again:
            return again.identity

    wrong, identity = refused(goes_on)
    assert wrong or identity == {"run": "a run", "settings": {"bits": 3}}
    assert (folder / "made").read_bytes() == b"1"
