"""The database: what a plain run would pack, in every way asked for; it survives kills and refuses strangers."""

import dataclasses
import json
import shutil

import pytest
import torch

from quantkit import GPTQ, RTN, Calibration, Recipe
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.evopress.build import build
from quantkit.evopress.store import candidate_key
from quantkit.io.shards import Shards
from quantkit.run.pipeline import quantize_checkpoint

from .conftest import CANDIDATES, LAYERS

LAYER = "model.layers.2.self_attn.k_proj"
files = "*.safetensors"


def test_the_base_is_what_a_plain_run_packs(half, recipe, database, tmp_path):
    report = quantize_checkpoint(half, recipe, tmp_path / "plain")
    stored = dict(Shards(tmp_path / "plain").read(Shards(tmp_path / "plain").specs))
    key = candidate_key(GPTQ(3))
    for layer in report.layers:
        index = database.blocks[layer.name]
        candidate = database.store.candidates(index, key)[layer.name]
        assert candidate.relative_error == pytest.approx(layer.relative_error, rel=1e-6)
        (weight,) = database.store.load(index, key, [layer.name]).values()
        assert candidate.nbytes == weight.nbytes == sum(t.nbytes for t in weight.state().values())
        for name, tensor in weight.state().items():
            assert torch.equal(tensor, stored[f"{layer.name}.{name}"])


def test_a_method_without_statistics_keeps_its_own_target(half, recipe, database, tmp_path):
    """In a search as in a plain run: RTN rounds the weight itself, whatever target its neighbours aim at."""
    quantize_checkpoint(half, dataclasses.replace(recipe, quantizer=RTN(3)), tmp_path / "plain")
    stored = dict(Shards(tmp_path / "plain").read(Shards(tmp_path / "plain").specs))
    for name, tensor in database.store.load_one(2, candidate_key(RTN(3)), LAYER).state().items():
        assert torch.equal(tensor, stored[f"{LAYER}.{name}"])


def test_every_layer_has_every_candidate(database):
    assert list(database.quantizers.values()) == [*CANDIDATES]
    assert len(database.blocks) == LAYERS and set(database.blocks.values()) == set(range(3))
    for name, index in database.blocks.items():
        two, three, four, plain = (
            database.store.candidates(index, candidate_key(quantizer))[name] for quantizer in CANDIDATES
        )
        assert two.nbytes < three.nbytes == plain.nbytes < four.nbytes
        assert two.relative_error > three.relative_error > four.relative_error
        assert three.relative_error < plain.relative_error


def test_keys_are_readable_and_tell_settings_apart():
    keys = {candidate_key(q) for q in (GPTQ(3), GPTQ(3, 64), GPTQ(3, order="act"), GPTQ(4))}
    assert len(keys) == 4
    assert candidate_key(GPTQ(3)) == candidate_key(GPTQ(3))
    assert candidate_key(GPTQ(3)).startswith("gptq-3-")


def test_a_second_build_reads_what_is_there_and_a_killed_one_goes_on(half, recipe, database, place, tmp_path):
    begun = []
    again = build(half, recipe, CANDIDATES, place, device="cpu", progress=lambda *now: begun.append(now))
    assert begun == [] and again.blocks == database.blocks
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    content = {path.relative_to(copy): path.read_bytes() for path in copy.rglob(files)}
    for path in [*(copy / "block-00002").glob(files), next((copy / "block-00003").glob("gptq-2*.safetensors"))]:
        path.unlink()
    build(half, recipe, CANDIDATES, copy, device="cpu")
    assert {path.relative_to(copy): path.read_bytes() for path in copy.rglob(files)} == content


def test_another_set_adds_what_is_missing(half, recipe, place, database, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    packed, plain = [], GPTQ.quantize
    monkeypatch.setattr(GPTQ, "quantize", lambda self, *arguments: (packed.append(self), plain(self, *arguments))[1])
    before = {path: path.stat().st_mtime_ns for path in copy.rglob(files)}
    more = build(half, recipe, (GPTQ(3), GPTQ(2, 64)), copy, device="cpu")
    assert len(more.quantizers) == 2
    assert set(packed) == {GPTQ(2, 64)} and len(packed) == LAYERS, "what is there is not made again"
    assert len(list(copy.rglob(files))) == len(before) + 3
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_other_calibration_base_or_model_is_refused(half, recipe, place, database, model_folder):
    others = {
        "calibration": dataclasses.replace(recipe, calibration=Calibration("stdlib", 4, 128)),
        "base": dataclasses.replace(recipe, quantizer=GPTQ(2)),
        "layers": dataclasses.replace(recipe, rules={"*.k_proj": None}),
    }
    for what, other in others.items():
        with pytest.raises(QuantkitError, match=what):
            build(half, other, CANDIDATES, place, device="cpu")
    with pytest.raises(QuantkitError, match="model"):
        build(model_folder("llama"), recipe, CANDIDATES, place, device="cpu")


def test_a_folder_of_something_else_is_refused(half, recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(QuantkitError, match="is not a database of candidates"):
        build(half, recipe, CANDIDATES, tmp_path / "mine", device="cpu")


def test_a_damaged_candidate_is_named(database, place, half, recipe, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    mine = build(half, recipe, CANDIDATES, copy, device="cpu")
    key = candidate_key(GPTQ(4))
    path = copy / "block-00003" / f"{key}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        mine.store.load(2, key, mine.store.candidates(2, key))
    path.write_bytes(content[:500])
    with pytest.raises(CheckpointError, match="block-00003"):
        mine.store.load(2, key, [LAYER])
    record = json.loads(path.with_suffix(".json").read_text())
    record["layers"][LAYER]["relative_error"] = 0.5
    for text in ("{", json.dumps(record)):
        path.with_suffix(".json").write_text(text)
        with pytest.raises(CheckpointError, match="cannot be read as a record of candidates; remove it and the file"):
            build(half, recipe, CANDIDATES, copy, device="cpu").store.candidates(2, key)


def test_a_candidate_that_does_not_fit_is_refused_before_the_walk(half, recipe, tmp_path):
    with pytest.raises(QuantkitError, match="group size"):
        build(half, recipe, (GPTQ(3, 4096),), tmp_path / "new", device="cpu")
    assert not (tmp_path / "new").exists()


def test_the_head_is_packed_where_asked(model_folder, tmp_path):
    recipe = Recipe(GPTQ(3, 64), {"lm_head": GPTQ(3, 64)}, calibration=Calibration("stdlib", 4, 64))
    made = build(model_folder("llama_tied"), recipe, (GPTQ(4, 64),), tmp_path / "new", device="cpu")
    assert made.blocks["lm_head"] == -1 and made.source.untied
    assert made.store.candidates(-1, candidate_key(GPTQ(4, 64)))["lm_head"].nbytes > 0
