"""Files are whole or not there, and what cannot be read is one error."""

import pytest

from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.io.files import leads_below, read_json, remove_below, write_durably


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
