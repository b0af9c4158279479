"""Damage is what it says, and whatever comes of it is counted as what it is."""

import json
import os
import random
import time

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from quantkit.core.errors import CheckpointError
from quantkit.evals import fuzz, fuzz_doors
from quantkit.evals.fuzz_damage import changed_tree, damage, header_of
from quantkit.evals.fuzz_doors import OTHER, SAME, Door

TREE = {"a": {"b": [1, 2.5, "x", None]}, "c": True, "d": [[{"e": "gptq(3)"}]]}
TENSORS = {"codes": torch.arange(24).int().view(4, 6), "scales": torch.ones(4, 6).half(), "more": torch.zeros(4).int()}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(TREE))
    save_file(TENSORS, tmp_path / "x.safetensors")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    return tmp_path


def test_damage_is_repeated_by_its_number_and_leaves_the_tree_that_it_was_given():
    before = json.dumps(TREE)
    for number in range(200):
        (first, said), (second, _) = (changed_tree(TREE, random.Random(number)) for _ in range(2))
        assert json.dumps(first) == json.dumps(second)
        assert said != "nothing to change"
        assert json.dumps(TREE) == before


def test_damage_says_whether_payload_changed(files):
    whole = (files / "x.safetensors").read_bytes()
    start = header_of(whole)[1]
    flipped = 0
    for number in range(300):
        (files / "x.safetensors").write_bytes(whole)
        found = damage(files, ["x.safetensors"], random.Random(number))
        path = files / "x.safetensors"
        now = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        flipped += found.payload
        if len(now) == len(whole) and now[:start] == whole[:start]:
            assert found.payload == (now != whole), found.words
        if path.is_symlink():
            path.unlink()
        if path.is_dir():
            path.rmdir()
    assert 50 < flipped < 200


def test_exchanged_entries_are_a_file_that_loads_otherwise(files):
    whole, other = (files / "x.safetensors").read_bytes(), 0
    for number in range(400):
        (files / "x.safetensors").write_bytes(whole)
        found = damage(files, ["x.safetensors"], random.Random(number))
        if "exchange" in found.words:
            try:
                tensors = load_file(files / "x.safetensors")
            except SafetensorError:
                continue
            other += any(not torch.equal(tensors[name], TENSORS[name]) for name in tensors.keys() & TENSORS)
        for path in files.glob("x.safetensors"):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    assert other > 5


def _spin(_folder, _root):
    begun = time.process_time()
    while time.process_time() - begun < 60:
        pass


def _raises(error):
    def enter(_folder, _root):
        raise error

    return enter


def _large(_folder, _root):
    block = torch.ones(fuzz.LARGE // 4 + 2**24)
    raise CheckpointError(f"a file that took {block.nbytes} bytes; fetch it anew")


_KINDS = {
    "refused": _raises(CheckpointError("a file is damaged; fetch it anew")),
    "equal": lambda _folder, _root: SAME,
    "traceback": _raises(KeyError("layers")),
    "wrong": lambda _folder, _root: OTHER,
    "garbled": _raises(CheckpointError("x")),
    "hang": _spin,
    "crash": lambda _folder, _root: os._exit(3),
    "memory": _large,
}


@pytest.fixture
def doors(tmp_path, monkeypatch):
    """A function: puts one door in the place of all, whose base is a file."""
    root = tmp_path / "bases"
    (root / "base").mkdir(parents=True)
    (root / "base" / "x.json").write_text(json.dumps(TREE))
    first = {"alive": True}

    def put(enter, **more):
        def entered(folder, at):  # undamaged files come first, and have to be let in
            if first.pop("alive", False):
                return SAME
            return enter(folder, at)

        monkeypatch.setattr(fuzz, "DOORS", {"door": Door("base", ("*",), entered, 1, **more)})
        return root

    return put


@pytest.mark.parametrize("kind", _KINDS)
def test_what_comes_of_a_variant_is_counted(kind, doors, monkeypatch):
    if kind == "hang":  # memory takes a slow machine its time, too
        monkeypatch.setattr(fuzz, "LIMIT", 0.5)
    found = list(fuzz.outcomes([5, 6, 7] if kind != "hang" else [5], doors(_KINDS[kind]), 1))
    assert [one.kind for one in found] == [kind] * len(found)
    assert len(found) == (1 if kind == "hang" else 3)
    record = fuzz.summary(found, 1.0)
    assert record["kinds"][kind] == record["doors"][-1]["variants"] == len(found)
    assert len(record["faults"]) == (len(found) if kind in fuzz.FAULTS else 0)
    assert "door" in fuzz.table(record)


@pytest.mark.parametrize(
    ("payload", "sealed", "verified", "kind"),
    [(True, True, False, "different"), (False, True, False, "wrong"), (False, False, False, "unrecorded"),
     (True, True, True, "wrong")],
)  # fmt: skip
def test_another_result_is_a_fault_unless_nothing_could_tell(payload, sealed, verified, kind, tmp_path):
    door = Door("base", (), lambda _folder, _root: OTHER, 1, sealed, verified)
    assert fuzz._entered(door, tmp_path, tmp_path, payload)[0] == kind


def test_a_door_that_refuses_undamaged_files_ends_the_command(tmp_path, monkeypatch):
    root = tmp_path / "bases"
    (root / "base").mkdir(parents=True)
    monkeypatch.setattr(fuzz, "DOORS", {"door": Door("base", ("*",), _raises(ValueError("no")), 1)})
    with pytest.raises(SystemExit, match="door, of undamaged files: traceback ValueError"):
        list(fuzz.outcomes([1], root, 1))


def test_every_base_is_damaged_through_some_door():
    assert {door.base for door in fuzz_doors.DOORS.values()} == {
        "mixed", "tied", "saved", "dense", "begun", "whole", "plans", "timings", "search", "tune", "texts", "prefix",
    }  # fmt: skip
