"""Documents to calibrate and to measure on: named datasets, datasets of the hub, files, and rows in Python.

A document is a text, or token ids. It comes from a row, which is

    a string                                    the text
    {"text": ...}                               the text
    {"messages": [{"role", "content"}, ...]}    a conversation, through the tokenizer's chat template
    {"input_ids": [...]}                        token ids
    [{"role", "content"}, ...] or [1, 2, ...]   the same without a name, in Python

or from another column, where a source names one: `reviews.csv#body`. Files are .txt and any other text (one document),
.jsonl and .json (a row each), .csv and .parquet (a row each), each also with .gz behind it.
"""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit.core.errors import CalibrationError, QuantkitError, UnknownName, first_line
from quantkit.io.network import offline_unless_named
from quantkit.run.corpus import standard_library

Document = str | list[int]

HUB_NAMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: (arguments of datasets.load_dataset for calibration, the same for evaluation)
    "wikitext2": (
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
    ),
    "c4": (
        {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"},
        {"path": "allenai/c4", "data_files": {"val": "en/c4-validation.00000-of-00008.json.gz"}, "split": "val"},
    ),
}
_NAMES = ("c4", "stdlib", "wikitext2")
_MOST_HUB_ROWS = 20_000
LARGEST_TOKEN = 2**31
"""Above all token ids of any tokenizer."""
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_ROWS = "a row has a 'text' field, 'messages' or 'input_ids'"


def documents(source: str | Path | Iterable[Any], purpose: str, tokenizer: Any = None) -> list[Document]:
    """Reads the documents of a source.

    Args:
        source: "wikitext2", "c4", "stdlib" (this Python's own library; no network), a file, the id of a hub dataset, or
            rows: a list or a `datasets.Dataset`. See above.
        purpose: "calibration" or "evaluation"; named sources keep the two apart.
        tokenizer: whose chat template conversations go through.

    Raises:
        UnknownName: neither a name, a file nor a hub id.
        CalibrationError: there is no text.
        QuantkitError: the rows cannot be read; the message says which.
    """
    if not isinstance(source, str | Path):
        rows, column, where = _iterated(source), None, "calibration"
    else:
        rows, column, where = _rows_of(str(source), purpose)
    found = [_document(row, column, tokenizer, f"{where}, row {i + 1}") for i, row in enumerate(rows)]
    if not any(document.strip() if isinstance(document, str) else document for document in found):
        raise CalibrationError(f"{where} holds no text")
    return found


def _iterated(source: Iterable[Any]) -> Iterable[Any]:
    if isinstance(source, Mapping):
        raise QuantkitError("documents are given as a mapping; give a list of rows, or a Dataset's split")
    try:
        return list(source)
    except TypeError as error:
        raise QuantkitError(
            f"documents are given as {type(source).__name__}; give a list of texts, conversations or token ids"
        ) from error


def _rows_of(source: str, purpose: str) -> tuple[Iterable[Any], str | None, str]:
    """(rows of a named source, the column that it names, the source without it)."""
    name, mark, column = source.rpartition("#")
    if not mark or Path(source).expanduser().exists():
        name, column = source, ""
    path = Path(name).expanduser()
    if path.is_file():
        return _read_file(path), column or None, name
    if name == "stdlib":
        return standard_library("train" if purpose == "calibration" else "held_out"), None, name
    if name in HUB_NAMES:
        return _read_hub(name, HUB_NAMES[name][purpose == "evaluation"]), None, name
    if path.exists():
        raise QuantkitError(f"{name} is not a file; give a .txt or .jsonl file, or one of {', '.join(_NAMES)}")
    if name.count("/") == 1 and not path.suffix and not name.startswith((".", "~", "/")):
        split = "train" if purpose == "calibration" else "test"
        return _read_hub(name, {"path": name, "split": split}), column or None, name
    if os.sep in name or path.suffix:
        raise QuantkitError(f"no file {name!r}; give a .txt or .jsonl file, or one of {', '.join(_NAMES)}")
    raise UnknownName("dataset", name, _NAMES)


def _document(row: Any, column: str | None, tokenizer: Any, where: str) -> Document:
    """The document of a row.

    Raises:
        QuantkitError: it is none.
    """
    value = row
    if isinstance(row, Mapping):
        names = (column,) if column else ("input_ids", "messages", "text")
        name = next((name for name in names if row.get(name) is not None), None)
        if name is None:
            known = f"it has {', '.join(map(str, list(row)[:8])) or 'nothing'}"
            raise QuantkitError(f"{where}: {f'no column {column!r}' if column else _ROWS}; {known}")
        value = row[name]
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    if isinstance(value, str):
        if not value.isascii() and _HALF_PAIR.search(value):
            raise QuantkitError(f"{where}: the text holds half a surrogate pair, which is no character; mend the file")
        return value
    if isinstance(value, list | tuple) and value:
        if all(type(item) is int and 0 <= item < LARGEST_TOKEN for item in value):
            return list(value)
        if all(isinstance(item, Mapping) for item in value):
            return _conversation(value, tokenizer, where)
    raise QuantkitError(f"{where}: {_ROWS}; found {type(value).__name__}")


def _conversation(messages: Any, tokenizer: Any, where: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise QuantkitError(f"{where}: 'messages' go through the tokenizer's chat template, and it has none")
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    except Exception as error:  # templates are programs, and raise what they like
        raise QuantkitError(f"{where}: the chat template does not take these messages ({first_line(error)})") from error


def _read_file(path: Path) -> Iterable[Any]:
    """The rows of a file, by its suffix."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if packed else suffixes)[-1:]
    try:
        content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise QuantkitError(f"{path} cannot be read ({error})") from error
    if kind == [".parquet"]:
        return _parquet(path, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QuantkitError(f"{path} cannot be read as UTF-8 text ({error})") from error
    if kind == [".csv"]:
        return _csv(path, text)
    if kind == [".json"]:
        return _json(path, text)
    return _json_lines(path, text) if kind in ([".jsonl"], [".ndjson"]) else [text]


def _json(path: Path, text: str) -> Iterable[Any]:
    """The rows of a JSON array; or JSON lines, which many a .json file holds."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _json_lines(path, text)
    return value if isinstance(value, list) else [value]


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    for i, line in enumerate(text.split("\n")):  # other line ends, U+2028 say, may stand in a string
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise QuantkitError(f"{path}, line {i + 1} is no JSON ({first_line(error)}); {_ROWS}") from error


def _csv(path: Path, text: str) -> Iterator[Any]:
    csv.field_size_limit(2**31 - 1)
    try:
        yield from csv.DictReader(io.StringIO(text, newline=""))
    except csv.Error as error:
        raise QuantkitError(f"{path} is no table of comma-separated values ({error})") from error


def _parquet(path: Path, content: bytes) -> list[Any]:
    try:
        from pyarrow import BufferReader
        from pyarrow.parquet import read_table
    except ImportError:
        raise QuantkitError(f"{path} is read by pyarrow, which is not installed (pip install pyarrow)") from None
    try:
        return list(read_table(BufferReader(content)).to_pylist())
    except Exception as error:  # pyarrow raises many kinds
        raise QuantkitError(f"{path} is no Parquet file that pyarrow reads ({first_line(error)})") from error


def _read_hub(source: str, arguments: dict[str, Any]) -> Iterator[Any]:
    try:
        from datasets import load_dataset  # slow to import, and needed only here
    except ImportError:
        raise QuantkitError(
            f"dataset {source!r} is read by the package datasets, which is not installed (pip install "
            "'quantkit-llm[hub]'); without it, give a text file or 'stdlib'"
        ) from None
    online = True
    try:
        with offline_unless_named() as online:
            rows = load_dataset(**arguments, streaming="c4" in arguments["path"])
        for i, row in enumerate(rows):
            if i == _MOST_HUB_ROWS and "wikitext" not in arguments["path"]:
                return
            yield row
    except Exception as error:  # datasets raises whatever its many back ends raise
        reason = first_line(error) if online else "no network here knows the hub's name, and the cache has it not"
        raise QuantkitError(
            f"dataset {source!r} cannot be fetched ({reason}); without the hub, give a text file or 'stdlib'"
        ) from error
