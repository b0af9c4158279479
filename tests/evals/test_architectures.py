"""A dozen of the architectures of the command that tries all."""

import json
import sys

import pytest

from quantkit.evals import architectures
from quantkit.evals.architectures import WAYS, kinds, row
from quantkit.evals.deciding_table import architectures_of

SOME = (
    "apertus", "bloom", "cohere2", "falcon_mamba", "gemma2", "gpt_neox", "gptj", "mpt", "olmoe", "opt", "phi3",
    "smollm3",
)  # fmt: skip


@pytest.mark.parametrize("kind", SOME)
def test_an_architecture_is_packed(kind):
    found = row(kind, {"gptq": WAYS["gptq"]})
    assert found["state"] == "ok", found["words"]
    assert found["gptq"]["layers"] > 0 and found["gptq"]["error"] <= 1e-5


def test_what_is_refused_and_what_is_not_made():
    assert row("bert")["state"] == "refused" and "is an encoder; " in row("bert")["words"]
    assert "is an encoder-decoder; " in row("bart")["words"]
    assert row("pix2struct")["state"] in ("refused", "not made")
    assert len(kinds()) > 100


def test_the_command(tmp_path, monkeypatch, capsys):
    known = [{"kind": "llama", "state": "ok", "words": "", "gptq": {"layers": 14, "error": 0.0, "dense": 0.0}}]
    path = tmp_path / "kinds.json"
    path.write_text(json.dumps(known))
    monkeypatch.setattr(architectures, "row", lambda kind: {"kind": kind, "state": "refused", "words": "no"})
    monkeypatch.setattr(sys, "argv", ["architectures", "--only", "llama", "bert", "--json", str(path)])
    architectures.main()
    assert "bert                     refused   no\n1 ok, 1 refused, 0 wrong, 0 not made" in capsys.readouterr().out
    table = architectures_of(json.loads(path.read_text()))
    assert "| ok | llama |" in table and "| refused | bert |" in table
