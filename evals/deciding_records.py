"""The file of the table that decides: rows as they are known again and kept.

    {"setting": {model, protocol, text hashes}, "rows": [{"id", "name", "state", "current", figures ...}, ...]}

A row's id is a hash of its settings and of the setting: the model's fingerprint, both texts and the protocol. Rows of
other settings stay in the file and are not `current`; the table and the picture show those that are.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from quantkit.core.errors import QuantkitError
from quantkit.evals.deciding_rows import Protocol, Row
from quantkit.evals.deciding_table import DONE, FAILED, MISSING
from quantkit.evals.machine import name_of
from quantkit.io.classes import meta_model
from quantkit.io.files import parse_json, write_durably
from quantkit.io.shards import Shards
from quantkit.io.source import load_tokenizer
from quantkit.run.documents import documents
from quantkit.run.text import evaluation_text

_NAMES = ("model", "calibration", "test")
"""What a setting calls things; by which it is not known."""


@dataclass(frozen=True)
class Setting:
    """What all rows of one table share, as JSON.

    Attributes:
        values: names of the model and the texts, and what they are known by: the model's fingerprint, hashes of the
            texts, numbers of the protocol.
    """

    values: Mapping[str, Any]

    def id_of(self, row: Row) -> str:
        """By which a row is known: 16 hexadecimal digits."""
        known = {name: value for name, value in self.values.items() if name not in _NAMES}
        return _hash(json.dumps([row.settings, known], sort_keys=True).encode())


def setting_of(model: str, folder: Path, protocol: Protocol) -> Setting:
    """The setting of a model's folder and a protocol.

    Args:
        model: its name.
        folder: of the full-precision model.
        protocol: of all rows.

    Raises:
        QuantkitError: a text cannot be read or is too short.
    """
    tokenizer = load_tokenizer(folder)
    tokens = protocol.text.sequences(tokenizer, meta_model(folder, None))
    texts = documents(protocol.calibration, "calibration")
    judged = evaluation_text(documents(protocol.test, "evaluation"), tokenizer)
    measured = judged.tokens[: protocol.test_sequences * judged.body(protocol.test_seqlen)]
    return Setting(
        {
            "model": model,
            "fingerprint": _hash(json.dumps(Shards(folder).fingerprint(), sort_keys=True).encode()),
            "calibration": name_of(protocol.calibration),
            "calibration_text": _hash(json.dumps(texts).encode()),
            "calibration_tokens": _hash(_bytes(tokens)),
            "num_samples": tokens.shape[0],
            "seqlen": tokens.shape[1],
            "seed": protocol.seed,
            "test": name_of(protocol.test),
            "test_tokens": _hash(_bytes(measured)),
            "test_sequences": measured.numel() // judged.body(protocol.test_seqlen),
            "test_seqlen": protocol.test_seqlen,
            "bos": judged.bos is not None,
        }
    )


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _bytes(tokens: Tensor) -> bytes:
    return tokens.to(torch.int64).contiguous().numpy().tobytes()


class Records:
    """Rows in a file, which is whole at any time; several commands may fill it.

    Args:
        path: of the file; made with the first row.
        setting: of the present table.
        rows: of the present table, in its order.

    Raises:
        QuantkitError: the file is something else.
    """

    def __init__(self, path: Path, setting: Setting, rows: Sequence[Row]) -> None:
        self.path, self.setting = path, setting
        self._order = {setting.id_of(row): index for index, row in enumerate(rows)}
        self.found = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        """Records by id."""
        if not self.path.exists():
            return {}
        try:
            found = parse_json(self.path)
            return {record["id"]: record for record in found["rows"]}
        except (ValueError, TypeError, KeyError) as error:
            raise QuantkitError(f"{self.path} is no file of this table ({error}); give another `--output`") from error

    def refresh(self) -> None:
        """Reads what other commands have written meanwhile."""
        self.found = self._read()

    def get(self, row: Row) -> dict[str, Any]:
        """A row's record; one that is missing says so."""
        return self.found.get(self.setting.id_of(row), {"state": MISSING})

    def put(self, row: Row, measured: Mapping[str, Any]) -> dict[str, Any]:
        """Enters what was measured of a row, or {"error": ...}, and writes the file.

        Returns:
            The record.
        """
        names = {"name": row.name, "label": row.label, "bits": row.bits, "drawn": row.drawn}
        state = FAILED if "error" in measured else DONE
        made = {"id": self.setting.id_of(row), **names, "state": state, "settings": row.settings, **measured}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = Path(tempfile.gettempdir()) / f"quantkit-table-{_hash(str(self.path.resolve()).encode())}.lock"
        with FileLock(lock):
            self.found = self._read() | {made["id"]: made}
            last = len(self._order)
            order = sorted(self.found.values(), key=lambda record: self._order.get(record["id"], last))
            marked = [record | {"current": record["id"] in self._order} for record in order]
            text = json.dumps({"setting": dict(self.setting.values), "rows": marked}, indent=1) + "\n"
            write_durably(self.path, lambda path: path.write_text(text), len(text))
        return made

    def current(self) -> list[dict[str, Any]]:
        """Records of the present table, in its order."""
        return [self.found[key] for key in self._order if key in self.found]
