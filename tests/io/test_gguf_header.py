"""Headers of GGUF files: what they say is read, and what cannot be is one error, soon."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.core.errors import CheckpointError
from quantkit.io.gguf_header import check_extents, is_gguf, read_header

from ..helpers.garbage import few, refused


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key, kind, packed):
    return text(key) + struct.pack("<I", kind) + packed


def tensor(name, sizes, kind, offset):
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


ENTRIES = [
    entry("general.architecture", 8, text("llama")),
    entry("general.alignment", 4, struct.pack("<I", 64)),
    entry("x.eps", 6, struct.pack("<f", 0.5)),
    entry("x.yes", 7, b"\1"),
    entry("x.words", 9, struct.pack("<IQ", 8, 2) + text("ä") + text("b")),
    entry("x.numbers", 9, struct.pack("<IQ3H", 2, 3, 1, 2, 3)),
]
TENSORS = [tensor("a.weight", (32, 3), 8, 0), tensor("a.norm", (5,), 0, 128)]
BLOCKS = {0: (1, 4), 8: (32, 34)}


def whole(entries=ENTRIES, tensors=TENSORS, counts=None, version=3, data=148):
    counts = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*entries, *tensors])
    return head + bytes(-len(head) % 64 + data)


def test_what_a_header_says(tmp_path):
    (tmp_path / "x").write_bytes(whole())
    found = read_header(tmp_path / "x")
    assert found.metadata == {
        "general.architecture": "llama", "general.alignment": 64, "x.eps": 0.5, "x.yes": True, "x.words": 2,
        "x.numbers": 3,
    }  # fmt: skip
    first, second = found.tensors["a.weight"], found.tensors["a.norm"]
    assert (first.shape, first.kind, first.elements) == ((3, 32), 8, 96)
    assert second.shape == (5,) and second.offset == first.offset + 128
    assert first.offset % 64 == 0 and first.offset + 148 == found.nbytes
    check_extents(tmp_path / "x", found, BLOCKS.get)
    assert is_gguf(tmp_path / "x") and not is_gguf(tmp_path / "y")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "no GGUF file"),
        (b"PK\3\4 and more", "no GGUF file"),
        (b"GGUF", "ends within its header"),
        (whole(version=1), "version is 1"),
        (whole(version=3 << 24), "version is 50331648"),
        (whole(counts=(2**61, 1)), "ends within its header"),
        (whole([entry("x", 9, struct.pack("<IQ", 8, 2**60))]), "ends within its header"),
        (whole([entry("x", 9, struct.pack("<IQ", 4, 2**62))]), "ends within its header"),
        (whole([entry("x", 9, struct.pack("<IQ", 9, 1))]), "array of type 9"),
        (whole([entry("x", 77, b"")]), "value of type 77"),
        (whole([entry("general.alignment", 4, bytes(4))]), "alignment is 0"),
        (whole(tensors=[tensor("a", (1,) * 9, 0, 0)]), "9 dimensions"),
        (whole(tensors=TENSORS[:1] * 2), "one name"),
    ],
)
def test_what_cannot_be_read(tmp_path, content, said):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        read_header(tmp_path / "x.gguf")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "tensors, data, said",
    [
        (TENSORS, 147, "a.norm would end"),
        (TENSORS, 0, "a.weight would end"),
        ([tensor("a", (2**62, 2**62), 0, 0)], 148, "a would end"),
        ([tensor("a", (31,), 8, 0)], 148, "no whole blocks of 32"),
        ([tensor("a", (32,), 99, 0)], 148, "ggml type 99"),
    ],
)
def test_tensors_that_are_not_in_the_file(tmp_path, tensors, data, said):
    (tmp_path / "x.gguf").write_bytes(whole(tensors=tensors, data=data))
    with pytest.raises(CheckpointError, match=said):
        check_extents(tmp_path / "x.gguf", read_header(tmp_path / "x.gguf"), BLOCKS.get)


@few
@given(st.data())
def test_damage_is_one_error_or_none(tmp_path_factory, data):
    content = bytearray(whole())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("x") / "x.gguf"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    failed, header = refused(read_header, path)
    if not failed:
        refused(check_extents, path, header, BLOCKS.get)
