"""Files are whole or not there, and what cannot be read is one error."""

import json
from contextlib import suppress

import pytest
from hypothesis import given

from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.io import files
from quantkit.io.files import leads_below, parse_json, read_json, read_record, record, remove_below, write_durably

from ..helpers.garbage import changed, few, refused


def test_a_full_disk_leaves_no_half_a_file(tmp_path):
    def half(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(QuantkitError, match=r"the disk is full.*`resume`"):
        write_durably(tmp_path / "f", half, 1)
    with pytest.raises(QuantkitError, match="the disk is full"):
        write_durably(tmp_path / "f", lambda path: path.write_bytes(b""), 2**62)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_damaged_json_is_one_error(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a list"):
        read_json(tmp_path / "x.json", "a list")


def test_names_that_lead_elsewhere(tmp_path):
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path)
    for name in ("a", "inner/a", "new/deeper/a", "writing-1/"):
        assert leads_below(root, name), name
    for name in ("", "..", "../a", "inner/../../a", str(tmp_path / "a"), "link/a", 7, None):
        assert not leads_below(root, name), name


def test_files_go_and_the_folders_that_this_empties(tmp_path):
    for name in ("a/b/c", "a/kept", "d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    remove_below(tmp_path, ["a/b/c", "d", "never/was"])
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a", "kept"]


def test_json_that_no_reader_could_bear(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    cases = {
        b"[" * 64 + b"]" * 64: None,
        b"[" * 65 + b"]" * 65: "nested more than 64 deep",
        b"[" * 100_000: "nested too deep",
        b'{"n": ' + b"9" * 10_000 + b"}": "digits",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        if message is None:
            assert parse_json(path)
        else:
            with pytest.raises(ValueError, match=message):
                parse_json(path)
    monkeypatch.setattr(files, "LARGEST_JSON", 100)
    path.write_text(f'["{"x" * 100}"]')
    with pytest.raises(ValueError, match="it has more than 100"):
        parse_json(path)
    monkeypatch.undo()
    for other in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="directory"):
            parse_json(other)


@few
@given(content=changed({"layers": {"a": [1, 2.5, None]}, "state": "x"}))
def test_a_record_is_as_it_was_written_or_refused(tmp_path_factory, content):
    path, value = tmp_path_factory.getbasetemp() / "record.json", {"layers": {"a": [1, 2.5, None]}, "state": "x"}
    path.write_bytes(record("a/record.json", value))
    assert read_record(path, "a/record.json", "a record; remove it") == value
    assert refused(read_record, path, "b/record.json", "a record; remove it")[0], "in the place of another"
    written = json.loads(path.read_bytes())
    with suppress(ValueError, TypeError, RecursionError):
        content = json.dumps({**json.loads(content), "checksum": written["checksum"]}).encode()
    path.write_bytes(content)
    wrong, found = refused(read_record, path, "a/record.json", "a record; remove it")
    assert wrong or found == value


def test_names_that_no_file_has(tmp_path):
    for name in ("a\0b", "\ud800", "x" * 5000, "a/" * 3000 + "b"):
        assert not leads_below(tmp_path, name), name[:20]
