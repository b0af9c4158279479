import json
import sys

import pytest

from quantkit.evals import cpu_decode


def test_products_are_right_and_say_their_ratio(monkeypatch):
    monkeypatch.setattr(cpu_decode, "_DISTINCT_BYTES", 2**16)
    rows = list(cpu_decode.products([(96, 256)], [1, 20], list(cpu_decode.KINDS)))
    assert len(rows) == 2 * len(cpu_decode.KINDS)
    assert all(row.error < 1e-5 and row.ratio == row.packed / row.dense for row in rows)


def test_models_and_file(monkeypatch, tmp_path, model_folder, capsys):
    folder = model_folder("llama_small")
    monkeypatch.setattr(
        sys, "argv",
        ["", "--shapes", "--baseline", str(folder), "--models", str(folder), "--json", str(tmp_path / "found.json")],
    )  # fmt: skip
    cpu_decode.main()
    timings = json.loads((tmp_path / "found.json").read_text())["timings"]
    assert [(row["what"].split(", ")[1], row["case"].split()[0]) for row in timings] == [
        ("by default", "generate"), ("by default", "read"), ("all packed", "generate"), ("all packed", "read"),
    ]  # fmt: skip
    assert "ratio" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--models", "x"], ["--shapes", "64"]])
def test_wrong_arguments(monkeypatch, wrong):
    monkeypatch.setattr(sys, "argv", ["", *wrong])
    with pytest.raises(SystemExit):
        cpu_decode.main()
