"""Checkpoints: byte for byte the same however often a run was killed, and refused when damaged."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quantkit
from quantkit import GPTQ, RTN, Calibration, Recipe
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.io.checkpoint import verify
from quantkit.io.shards import INDEX, Shards
from quantkit.run.pipeline import quantize_checkpoint

from ..helpers.checkpoints import Stop, digest, interrupted, unseal
from ..helpers.forks import server


@pytest.fixture(scope="module")
def recipe(text_file):
    return Recipe(GPTQ(3, 64), calibration=Calibration(str(text_file), 6, 128))


_WORKER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from quantkit import GPTQ, Calibration, Recipe
from quantkit.run.pipeline import quantize_checkpoint

folder, text, root, seed = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
recipe = Recipe(GPTQ(3, 64), calibration=Calibration(text, 4, 128))

def start(output, resume):
    child = os.fork()
    if child == 0:
        try:
            quantize_checkpoint(folder, recipe, output, resume=resume, device="cpu")
            os._exit(0)
        except BaseException as error:
            print(error, flush=True)
            os._exit(1)
    return child

began = time.monotonic()
os.waitpid(start(root / "whole", False), 0)
length = time.monotonic() - began
draw = random.Random(seed)
for trial in range(6):
    output = root / f"killed-{trial}"
    child = start(output, False)
    time.sleep(draw.uniform(0.05, 1.0) * length)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done = len(list((root / f"killed-{trial}.partial").rglob("*.safetensors"))) if not output.exists() else -1
    if not output.exists():
        assert os.waitpid(start(output, True), 0)[1] == 0, trial
    print("trial", trial, "shards before the kill", done, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_and_resumed(model_folder, text_file, tmp_path):
    """In forks that have imported everything, so that kills meet the run."""
    (tmp_path / "worker.py").write_text(_WORKER)
    result = server().run("worker", model_folder("llama_small"), text_file, tmp_path, 0, path=[tmp_path])
    assert result.returncode == 0, result.stdout + result.stderr
    whole = digest(tmp_path / "whole")
    assert len(whole) > 5
    for trial in range(6):
        assert digest(tmp_path / f"killed-{trial}") == whole, f"trial {trial}: {result.stdout}"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("architecture", ["llama_small", "gpt2_small"])
def test_resuming_repeats_no_finished_block(architecture, model_folder, recipe, tmp_path):
    folder = model_folder(architecture)
    quantize_checkpoint(folder, recipe, tmp_path / "whole")
    interrupted(folder, recipe, tmp_path / "resumed", after=1)
    partial = tmp_path / "resumed.partial" / "checkpoint"
    first = partial / "model-00001-of-00003.safetensors"
    before = first.stat().st_mtime_ns
    assert not (partial / "model-00002-of-00003.safetensors").exists()
    assert not (tmp_path / "resumed").exists()
    quantize_checkpoint(folder, recipe, tmp_path / "resumed", resume=True)
    assert (tmp_path / "resumed" / first.name).stat().st_mtime_ns == before
    assert digest(tmp_path / "resumed") == digest(tmp_path / "whole")


def test_what_is_in_the_way_is_not_lost(model_folder, recipe, tmp_path):
    folder, output = model_folder("llama_small"), tmp_path / "out"
    interrupted(folder, recipe, output, after=1)
    with pytest.raises(QuantkitError, match="`resume` continues it"):
        quantize_checkpoint(folder, recipe, output)
    with pytest.raises(QuantkitError, match=r"other settings.*quantizers"):
        quantize_checkpoint(folder, Recipe(GPTQ(4, 64), calibration=recipe.calibration), output, resume=True)
    other = Calibration(recipe.calibration.source, 6, 128, seed=1)
    with pytest.raises(QuantkitError, match=r"other settings.*calibration"):
        quantize_checkpoint(folder, Recipe(GPTQ(3, 64), calibration=other), output, resume=True)
    quantize_checkpoint(folder, Recipe(RTN(4, 64)), output, overwrite=True)
    assert not output.with_name("out.partial").exists()
    kept = digest(output)
    with pytest.raises(QuantkitError, match="already exists"):
        quantize_checkpoint(folder, recipe, output)
    interrupted_overwrite = Recipe(RTN(2, 64))

    def stop(done, _total, _name):
        if done == 1:
            raise Stop

    with pytest.raises(Stop):
        quantize_checkpoint(folder, interrupted_overwrite, output, overwrite=True, progress=stop)
    assert digest(output) == kept, "an output is replaced only by a whole one"
    quantize_checkpoint(folder, interrupted_overwrite, output, overwrite=True)
    assert digest(output) != kept
    assert not list(tmp_path.glob("out.*"))


def test_overwrite_replaces_nothing_but_checkpoints(model_folder, tmp_path):
    import shutil

    source = tmp_path / "parent" / "model"
    shutil.copytree(model_folder("llama"), source)
    precious = tmp_path / "parent" / "precious.txt"
    precious.write_text("mine")
    before = digest(source)
    recipe = Recipe(RTN(3, 64))
    for output, message in [
        (source, "which this run needs"),
        (source.parent, "which this run needs"),
        (precious, "has no quantkit_files.json"),
        (tmp_path, "which this run needs"),
    ]:
        with pytest.raises(QuantkitError, match=message):
            quantize_checkpoint(source, recipe, output, overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("mine")
    with pytest.raises(QuantkitError, match="replaces nothing else"):
        quantize_checkpoint(source, recipe, other, overwrite=True)
    assert precious.read_text() == "mine"
    assert digest(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "parent"]


def test_resuming_with_another_model_is_refused(model_folder, recipe, tmp_path):
    import shutil

    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(model_folder("llama"), first)
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    shutil.copytree(first, second)
    model.save_pretrained(second)
    interrupted(first, recipe, tmp_path / "out", after=1)
    with pytest.raises(QuantkitError, match=r"other settings.*model"):
        quantize_checkpoint(second, recipe, tmp_path / "out", resume=True)


def test_missing_tensors_are_never_drawn_at_random(model_folder, tmp_path):
    source = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.bfloat16).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*up_proj"):
        quantize_checkpoint(source, Recipe(RTN(3, 64)), tmp_path / "out")


def test_no_block_stays_in_memory(model_folder, recipe, tmp_path, monkeypatch):
    """Packed or not, a finished block's tensors are on the meta device, and so is what they were derived from."""
    import quantkit.run.pipeline as pipeline
    from quantkit.models.linear import QuantizedLinear

    opened = []

    def watched(*args, really=pipeline.open_folder):
        opened.append(really(*args))
        return opened[-1]

    monkeypatch.setattr(pipeline, "open_folder", watched)
    quantize_checkpoint(model_folder("llama"), recipe, tmp_path / "out")
    (folder,) = opened
    assert all(tensor.is_meta for tensor in folder.model.model.layers.state_dict().values())
    layers = [module for module in folder.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 14
    assert all(layer.packed.codes.is_meta for layer in layers)
    assert all(layer._cached is None or layer._cached.codes.is_meta for layer in layers)


def test_a_full_disk_is_one_clear_error_and_loses_nothing(model_folder, recipe, tmp_path, monkeypatch):
    folder, output = model_folder("llama_small"), tmp_path / "out"
    import quantkit.io.checkpoint as checkpoint

    calls = []

    def save_until_full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", save_until_full)
    with pytest.raises(QuantkitError, match=r"disk is full.*`resume`"):
        quantize_checkpoint(folder, recipe, output)
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    monkeypatch.undo()
    quantize_checkpoint(folder, recipe, output, resume=True)
    quantize_checkpoint(folder, recipe, tmp_path / "whole")
    assert digest(output) == digest(tmp_path / "whole")


def test_damaged_sources(model_folder, tmp_path):
    source = model_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)

    def expect(message, prepare):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        model.save_pretrained(folder, max_shard_size="2MB")
        prepare(folder)
        with pytest.raises(QuantkitError, match=message):
            quantize_checkpoint(folder, Recipe(RTN(3, 64)), tmp_path / "out")
        assert not list(tmp_path.glob("out*"))

    def truncate(folder):
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:1000])

    expect("is truncated or not a safetensors file", truncate)
    expect("names shards that are not there", lambda folder: sorted(folder.glob("*.safetensors"))[0].unlink())
    expect("is not a safetensors index", lambda folder: (folder / INDEX).write_text("{"))
    expect("no config.json", lambda folder: (folder / "config.json").unlink())
    expect("is not JSON", lambda folder: (folder / "config.json").write_text("{"))
    expect("not a causal language model", lambda folder: (folder / "config.json").write_text('{"model_type": "nope"}'))

    def remove_all(folder):
        for path in folder.glob("*.safetensors*"):
            path.unlink()

    expect("found no weights at all", remove_all)


def test_damaged_checkpoints_are_refused_before_use(model_folder, tmp_path):
    quantize_checkpoint(model_folder("llama"), Recipe(RTN(3, 64)), tmp_path / "good")

    def expect(message, file, change):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for path in (tmp_path / "good").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        unseal(folder)  # what checksums would find first is found without them too
        change(folder / file)
        for load in (quantkit.load, AutoModelForCausalLM.from_pretrained):
            with pytest.raises((CheckpointError, QuantkitError), match=message):
                load(folder)

    shard = "model-00001-of-00003.safetensors"
    name = "model.layers.0.mlp.up_proj"

    def edit(change):
        def apply(path):
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path, metadata={"format": "pt"})

        return apply

    def edit_config(change):
        def apply(path):
            config = json.loads(path.read_text())
            change(config["quantization_config"])
            path.write_text(json.dumps(config))

        return apply

    expect("declares int32", shard, edit(lambda t: t.update({f"{name}.codes": t[f"{name}.codes"][:, :-1].clone()})))
    expect("holds NaN", shard, edit(lambda t: t[f"{name}.scales"].fill_(float("nan"))))
    expect("of a pre-release", "config.json", edit_config(lambda c: c.update(version=1)))
    expect("version 99", "config.json", edit_config(lambda c: c.update(version=99)))
    expect("take", "config.json", edit_config(lambda c: c["layers"][name].update(group_size=3)))
    expect("lists no layers", "config.json", edit_config(lambda c: c.pop("layers")))
    expect("lack its format or its tensors", "config.json", edit_config(lambda c: c["layers"][name].pop("tensors")))
    expect("missing from", "config.json", edit_config(lambda c: c["layers"].update(nothing=c["layers"].pop(name))))
    expect("unknown format 'magic'", "config.json", edit_config(lambda c: c["layers"][name].update(format="magic")))


def test_golden_checkpoint(tmp_path):
    """The files of a fixed model: names, tensor names, order, dtypes and bytes."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            steps = torch.arange(parameter.numel()) * (37 + index) % 101
            parameter.copy_((steps.float() / 64 - 0.75).view_as(parameter))
    model.bfloat16().save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", Recipe(RTN(3, 16, symmetric=False, search=False)), tmp_path / "packed")
    shards = Shards(tmp_path / "packed")
    assert {name: spec for name, spec in shards.specs.items() if "q_proj" in name} == {
        "model.layers.0.self_attn.q_proj.codes": ("I32", [32, 8]),
        "model.layers.0.self_attn.q_proj.scales": ("F16", [2, 32]),
        "model.layers.0.self_attn.q_proj.zeros": ("F16", [2, 32]),
    }
    meta = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert meta["quant_method"] == "quantkit"
    assert meta["version"] == 2
    assert meta["layers"]["model.layers.0.self_attn.q_proj"] == {
        "format": "int_group",
        "bits": 3,
        "group_size": 16,
        "in_features": 32,
        "tensors": {"codes": ["int32", [32, 8]], "scales": ["float16", [2, 32]], "zeros": ["float16", [2, 32]]},
    }
    found = {path: value[:16] for path, value in digest(tmp_path / "packed").items() if path.endswith(".safetensors")}
    assert found == GOLDEN


GOLDEN = {
    "model-00001-of-00002.safetensors": "e33aa4f5f84839c9",
    "model-00002-of-00002.safetensors": "109e7cb328aa78dd",
}


def test_what_a_killed_write_leaves_is_removed(reference, tmp_path):
    """safetensors writes under a name of its own first; a kill in that moment must not end up in a checkpoint."""
    quantize_checkpoint(reference, Recipe(RTN(4)), tmp_path / "whole")
    interrupted(reference, Recipe(RTN(4)), tmp_path / "out", after=1)
    partial = tmp_path / "out.partial" / "checkpoint"
    for name in (".tmpAb12Cd", "model-00001-of-00007.safetensors.tmp"):
        (partial / name).write_bytes(b"half")
    quantize_checkpoint(reference, Recipe(RTN(4)), tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def flip(path, name):
    """Flips one bit of a tensor, in place, as a failing disk does."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, _ = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + begin)
        byte = file.read(1)[0]
        file.seek(8 + length + begin)
        file.write(bytes([byte ^ 4]))


def test_a_flipped_bit_is_found_and_named(reference, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(reference, Recipe(RTN(4)), out)
    assert verify(out) == len(Shards(out).specs)
    quantkit.load(out, verify=True)
    for name in ("model.layers.2.mlp.up_proj.codes", "model.norm.weight"):
        path = out / Shards(out).files[name]
        flip(path, name)
        with pytest.raises(CheckpointError, match=rf"{name} of \d+ tensors are not as they were written"):
            quantkit.load(out, verify=True)
        flip(path, name)
    assert verify(out)
    quantkit.load(out).save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="save_pretrained writes none"):
        verify(tmp_path / "saved")


def test_a_finished_block_that_was_damaged_is_made_anew(reference, tmp_path, caplog):
    recipe = Recipe(RTN(4))
    quantize_checkpoint(reference, recipe, tmp_path / "whole")
    interrupted(reference, recipe, tmp_path / "out", after=3)
    made = tmp_path / "out.partial" / "checkpoint"
    flip(made / "model-00001-of-00007.safetensors", "model.layers.0.mlp.up_proj.codes")
    (made / "model-00002-of-00007.safetensors").write_bytes(b"cut")
    quantize_checkpoint(reference, recipe, tmp_path / "out", resume=True)
    assert caplog.text.count("made anew") == 2
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_tensors_that_no_layer_declares_are_damage(reference, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(reference, Recipe(RTN(4, symmetric=False)), out)
    unseal(out)
    config = json.loads((out / "config.json").read_text())
    layer = config["quantization_config"]["layers"]["model.layers.0.mlp.up_proj"]
    del layer["tensors"]["zeros"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"up_proj\.zeros is in the files"):
        quantkit.load(out)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_nan_anywhere_is_named_before_any_work(name, model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[[3, 5]] = torch.tensor([float("nan"), float("inf")])
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(QuantkitError, match=rf"{name} holds NaN or Inf in 2 of [\d,]+ places"):
        quantize_checkpoint(tmp_path / "broken", Recipe(RTN(4, 64)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_an_index_that_an_earlier_save_left_is_not_read(reference, tmp_path):
    """transformers takes model.safetensors first, and so do we."""
    model = AutoModelForCausalLM.from_pretrained(reference)
    model.save_pretrained(tmp_path, max_shard_size="4MB")
    assert (tmp_path / INDEX).is_file()
    model.save_pretrained(tmp_path)
    assert len(Shards(tmp_path).specs) == len(Shards(reference).specs)
    quantkit.load(tmp_path)


class Overflowing(RTN):
    """A method whose scales leave fp16's range."""

    def quantize(self, weight, stats=None):
        packed = super().quantize(weight, stats)
        return dataclasses.replace(packed, scales=packed.scales * float("inf"))


def test_what_could_not_be_loaded_is_not_written(reference, tmp_path):
    recipe = Recipe(RTN(4), {"model.layers.1.mlp.down_proj": Overflowing(4)})
    with pytest.raises(QuantkitError, match=r"layers\.1\.mlp\.down_proj: its packed scales would hold NaN or Inf"):
        quantize_checkpoint(reference, recipe, tmp_path / "out")
