"""Predictions beside runs: which rows, and that they are of the ways that ran."""

import pytest

from quantkit.core.errors import QuantkitError
from quantkit.evals.deciding_records import Records, setting_of
from quantkit.evals.deciding_rows import ROWS, Protocol
from quantkit.evals.predicted import held_against, is_plain

FIGURES = {"kl": 0.5, "kl_se": 0.01, "bits_per_weight": 3.25}


@pytest.fixture
def protocol(tmp_path, texts):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(texts)[:40_000])
    return Protocol(str(path), str(path), num_samples=8, seqlen=64, test_sequences=2, test_seqlen=48)


def test_measured_rows_stand_beside_what_was_expected_of_them(model_folder, protocol, tmp_path):
    folder = model_folder("llama_small")
    records = Records(tmp_path / "table.json", setting_of("m", folder, protocol), ROWS)
    with pytest.raises(QuantkitError, match="no row of this model and these texts"):
        held_against(folder, protocol, records, 4)
    measured = ("rtn-g64-3", "gptq-g64-3", "gptq-g64-2", "gptq-g64-fisher-3", "gptq-g64-rank8-3", "gptq-g64-shift0-3")
    for row in ROWS:
        if row.name in measured:
            records.put(row, FIGURES)
    found = {row["name"]: row for row in held_against(folder, protocol, records, 4)}
    assert set(found) == {"rtn-g64-3", "gptq-g64-3", "gptq-g64-2", "gptq-g64-fisher-3"}
    expected = {name: row["predicted"] for name, row in found.items()}
    assert 0 < expected["gptq-g64-3"] < expected["gptq-g64-2"]
    assert expected["gptq-g64-fisher-3"] != expected["gptq-g64-3"]  # little is felt by an untrained model
    assert all(row["ratio"] == row["predicted"] / 0.5 and row["kl_se"] == 0.01 for row in found.values())


def test_rows_that_do_more_than_pack_are_left_out():
    names = {row.name for row in ROWS if is_plain(row)}
    assert {"trellis-12-2", "rtn-g64-4", "pyramid-2.5", "gptq-g64-asym-3", "trellis-12-no-fisher-2"} <= names
    left = ("shift0", "rank", "tuned", "blocks", "head", "search", "llm-compressor", "auto-round")
    assert not [name for name in names if any(part in name for part in left)]
