"""Documents from names, files of all kinds, and rows in Python; what is no document is refused by its row."""

import gzip
import json
import socket
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.core.errors import CalibrationError, QuantkitError, UnknownName
from quantkit.run.documents import documents
from quantkit.run.text import calibration_sequences

from ..helpers.garbage import changed, few, raw, refused

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


class Chatty:
    """A tokenizer with a chat template."""

    chat_template = "{{ messages }}"

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        if messages[0]["role"] == "system":
            raise RuntimeError("System role not supported")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def test_files_and_names(tmp_path):
    text, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("one text")
    rows.write_text("\n".join(json.dumps({"text": t}) for t in ("first", "second")))
    assert documents(str(text), "calibration") == ["one text"]
    assert documents(str(rows), "evaluation") == ["first", "second"]
    assert len(documents("stdlib", "calibration")) > 100


def lines(rows):
    return "\n".join(map(json.dumps, rows))


ROWS = [{"text": "first"}, {"text": "second"}]
TABLE = 'id,text,body\n1,first,eins\n2,second,"zwei, mit\nUmbruch"\n'
FILES = {
    "plain.txt": ("first", ["first"]),
    "noted.md": ("first", ["first"]),
    "rows.jsonl": (lines(ROWS), ["first", "second"]),
    "ROWS.JSONL": (lines(ROWS), ["first", "second"]),
    "rows.ndjson": (lines(ROWS) + "\n\n", ["first", "second"]),
    "windows.jsonl": (lines(ROWS).replace("\n", "\r\n"), ["first", "second"]),
    "array.json": (json.dumps(ROWS), ["first", "second"]),
    "strings.json": (json.dumps(["first", "second"]), ["first", "second"]),
    "lines.json": (lines(ROWS), ["first", "second"]),
    "bom.jsonl": ("\ufeff" + lines(ROWS), ["first", "second"]),
    "separators.jsonl": ('{"text": "a\u2028b\u0085c"}', ["a\u2028b\u0085c"]),
    "chat.jsonl": (lines([{"messages": CHAT}]), ["<user>Hi<assistant>Hello"]),
    "ids.jsonl": (lines([{"input_ids": [1, 2, 3]}, {"text": "and text"}]), [[1, 2, 3], "and text"]),
    "table.csv": (TABLE, ["first", "second"]),
    "table.csv#body": (TABLE, ["eins", "zwei, mit\nUmbruch"]),
    "rows.jsonl#prompt": (lines([{"prompt": "p", "text": "t"}]), ["p"]),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", FILES)
def test_files(name, packed, tmp_path):
    content, wanted = FILES[name]
    file, mark, column = name.partition("#")
    path = tmp_path / (file + ".gz" * packed)
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    assert documents(f"{path}{mark}{column}", "calibration", Chatty()) == wanted


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["first", "second"], "body": ["eins", "zwei"]}), tmp_path / "t.parquet")
    assert documents(tmp_path / "t.parquet", "calibration") == ["first", "second"]
    assert documents(f"{tmp_path / 't.parquet'}#body", "calibration") == ["eins", "zwei"]
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(QuantkitError, match="no Parquet file"):
        documents(tmp_path / "t.parquet", "calibration")


def test_rows_in_python():
    datasets = pytest.importorskip("datasets")
    rows = ["a text", {"text": "another"}, {"messages": CHAT}, CHAT, [1, 2], {"input_ids": torch.tensor([3, 4])}]
    chat = "<user>Hi<assistant>Hello"
    assert documents(rows, "calibration", Chatty()) == ["a text", "another", chat, chat, [1, 2], [3, 4]]
    assert documents(datasets.Dataset.from_dict({"text": ["one", "two"]}), "calibration") == ["one", "two"]
    assert documents(iter(["one"]), "calibration") == ["one"]


def test_token_ids_and_short_texts_fill_sequences(tokenizer):
    ids = tokenizer("def main():\n    return 1\n" * 40)["input_ids"]
    sequences = calibration_sequences([ids, "short", "texts", ids], tokenizer, 3, 32, seed=0)
    assert sequences.shape == (3, 32)
    assert calibration_sequences([ids[:64]], tokenizer, 8, 32, seed=0).flatten().tolist() == ids[:64]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([3], "row 1.*found int"),
        (["a", {"txt": "b"}], "row 2: a row has a 'text' field.*it has txt"),
        ([{"text": 3}], "row 1.*found int"),
        ([{"text": "half \ud800"}], "row 1.*surrogate"),
        ([[1, -2]], "row 1"),
        ([[1.5]], "row 1"),
        ([{"messages": []}], "row 1"),
        ([{"messages": [{"role": "system", "content": "x"}]}], "row 1: the chat template does not take.*System role"),
        ({"train": ["a"]}, "a Dataset's split"),
        (7, "given as int"),
    ],
)
def test_what_is_no_document_is_refused_by_its_row(rows, message):
    with pytest.raises(QuantkitError, match=message):
        documents(rows, "calibration", Chatty())


def test_conversations_need_a_template(tokenizer):
    with pytest.raises(QuantkitError, match="chat template, and it has none"):
        documents([{"messages": CHAT}], "calibration", tokenizer)


def test_nothing_to_read():
    for rows in ([], [" "], [{"text": "\n"}]):
        with pytest.raises(CalibrationError, match="holds no text"):
            documents(rows, "calibration")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("wikitext", UnknownName, "did you mean 'wikitext2'"),
        ("nothing.txt", QuantkitError, "no file"),
        ("./no/such/file", QuantkitError, "no file"),
    ],
)
def test_unknown_sources(source, error, message):
    with pytest.raises(error, match=message):
        documents(source, "calibration")


def test_unreadable_files(tmp_path):
    cases = {"empty.txt": (b" \n", "holds no text"), "rows.jsonl": (b'{"txt": 1}', "'text' field")}
    cases |= {"broken.json": (b"[", "'text' field"), "latin.txt": (b"\xff\xfe\xfa", "UTF-8")}
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(QuantkitError, match=message):
            documents(str(path), "calibration")


def test_deep_and_broken_files(tmp_path):
    cases = {
        "deep.json": (b"[" * 100_000, "no JSON"),
        "deep.jsonl": (b'{"text":' * 100_000, "line 1 is no JSON"),
        "second.jsonl": (b'{"text": "a"}\n{"text": ', "line 2 is no JSON"),
        "cut.txt.gz": (gzip.compress(b"text" * 100)[:-9], "cannot be read"),
        "columns.csv": (b"id,body\n1,x\n", "row 1.*it has id, body"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(QuantkitError, match=message):
            documents(tmp_path / name, "calibration")
    with pytest.raises(QuantkitError, match="no column 'none'; it has id, body"):
        documents(f"{tmp_path / 'columns.csv'}#none", "calibration")


@few
@given(data=st.data(), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz", ".csv.gz"]))
def test_any_file(tmp_path_factory, data, suffix):
    rows = st.lists(changed({"text": "a", "input_ids": [1, 2]}), max_size=3).map(b"\n".join)
    content = data.draw(rows | raw)
    path = tmp_path_factory.getbasetemp() / f"calibration{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") and data.draw(st.booleans()) else content)
    wrong, found = refused(documents, path, "calibration", Chatty())
    assert wrong or all(isinstance(document, str | list) for document in found)


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(lines(ROWS * 50).encode())
    for at in range(10, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with pytest.raises(QuantkitError, match=r"rows\.jsonl\.gz"):
            documents(path, "calibration")


def test_no_tokenizer_has_such_tokens():
    with pytest.raises(QuantkitError, match="row 1"):
        documents([[1, 2**31]], "calibration")


def test_without_a_network_the_hub_is_not_asked_again_and_again(monkeypatch):
    def unknown(*_, **__):
        raise OSError("Name or service not known")

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    with pytest.raises(QuantkitError, match=r"no network here knows the hub's name.*or 'stdlib'"):
        documents("wikitext2", "calibration")
