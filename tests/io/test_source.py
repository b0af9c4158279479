"""The names by which a model is found."""

import pytest

from quantkit.core.errors import QuantkitError
from quantkit.io import source
from quantkit.io.source import resolve_folder


def test_reference_is_the_reference_model(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("reference").samefile(reference)


def test_a_folder_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference").mkdir()
    assert resolve_folder("reference").samefile(tmp_path / "reference")


def test_an_installation_without_it_says_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "REFERENCE", tmp_path / "nowhere")
    with pytest.raises(QuantkitError, match="nowhere; it is in quantkit's wheel and source tree"):
        resolve_folder("reference")
