"""The table of quality against bits, and its picture."""

import json
import sys

import pytest

from quantkit.evals import quality


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["quality", *map(str, arguments)])
    quality.main()


def test_rows_json_and_picture(model_folder, text_file, tmp_path, monkeypatch, capsys):
    call(
        monkeypatch, model_folder("llama_small"), "--data", text_file, "--calibration", "stdlib",
        "--methods", "rtn", "gptq", "--bits", 3, "--group-size", 32, "--quantizers", "hadamard(trellis(2, 8))",
        "--num-samples", 2, "--seqlen", 64, "--target-shift", 0.7, "--max-windows", 3, "--device", "cpu",
        "--output", tmp_path / "rows.json", "--png", tmp_path / "rows.png",
    )  # fmt: skip
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["quantizer"] for row in rows] == [
        "rtn(3, group_size=32)", "gptq(3, group_size=32)", "hadamard(trellis(2, state_bits=8))"
    ]  # fmt: skip
    assert all(row["kl"] > 0 and row["bits_per_weight"] > row["bits"] for row in rows)
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"| {row['quantizer']} |" in printed for row in rows)


def test_a_quantizer_that_does_not_exist_is_one_line(model_folder, monkeypatch):
    for text, message in (("trellis(9)", "1 to 8 bits"), ("trelis(2)", "trelis")):
        with pytest.raises(SystemExit, match=message):
            call(monkeypatch, model_folder("llama"), "--quantizers", text)
