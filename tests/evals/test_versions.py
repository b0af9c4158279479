"""The tests with other versions of transformers: which ones, and what is read of a run."""

import json
import subprocess
import sys

import pytest

from quantkit.core.errors import QuantkitError
from quantkit.evals import versions

TESTS = """
import pytest

def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip
def test_left_out(): pass
"""


def test_the_oldest_and_the_newest():
    known = ["6.0.0", "5.11.0rc1", "5.10.10", "5.9.2", "5.10.2"]
    assert versions.admitted(known, "transformers>=5.10,<6") == ["5.10.2", "5.10.10"]
    assert versions.required().startswith("transformers>=")


def test_what_became_of_a_run(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    result = tmp_path / "result.xml"
    pytest_run = [sys.executable, "-m", "pytest", "-q", f"--junitxml={result}", "-o", "junit_family=xunit1"]
    subprocess.run([*pytest_run, str(tmp_path / "test_some.py")], cwd=tmp_path, capture_output=True)
    assert versions.read(result) == ({"passed": 1, "failed": 1, "skipped": 1}, ["test_some.py::test_bad"])


def test_another_version_runs_in_front(tmp_path, capfd, monkeypatch):
    """A package that stands in for a version: tests see it, and a folder of another one is not taken for it."""
    stand_in = tmp_path / "work" / "transformers-5.99.0"
    (stand_in / "transformers").mkdir(parents=True)
    (stand_in / "transformers" / "__init__.py").write_text("__version__ = '5.99.0'\n")
    record = stand_in / "transformers-5.99.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.99.0\n")
    (tmp_path / "test_it.py").write_text(
        "def test_it():\n    import transformers\n    assert transformers.__version__ == '5.99.0'\n"
    )
    monkeypatch.setattr(sys, "argv", [
        "versions", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "found.json"), "--transformers",
        "5.99.0", "--tests", str(tmp_path / "test_it.py"),
    ])  # fmt: skip
    versions.main()
    (found,) = json.loads((tmp_path / "found.json").read_text())["versions"]
    assert (found["version"], found["counts"]["passed"], found["failed"]) == ("5.99.0", 1, [])
    assert "transformers 5.99.0: 1 passed" in capfd.readouterr().out
    stand_in.rename(stand_in.with_name("transformers-5.98.0"))
    with pytest.raises(QuantkitError, match=r"does not hold transformers 5.98.0"):
        versions.tested("5.98.0", ["tests"], tmp_path / "work")
