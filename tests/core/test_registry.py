"""Names of formats and quantizers: built-in, installed, installed meanwhile, removed, and claimed twice."""

import sys

import pytest

from quantkit.core import registry
from quantkit.core.errors import UnknownName

METHOD = "class Ternary:\n    bits = 1.58\n"


@pytest.fixture(autouse=True)
def _forget():
    yield
    registry.rescan()
    sys.modules.pop("ternary_for_tests", None)


def install(folder, entry="ternary = ternary_for_tests:Ternary", name="ternary"):
    """A package as pip leaves it."""
    (folder / "ternary_for_tests.py").write_text(METHOD)
    metadata = folder / f"{name}-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(f"[quantkit.quantizers]\n{entry}\n")
    return metadata


def test_installed_packages_are_looked_for_once(monkeypatch):
    registry.rescan()
    scans = []
    monkeypatch.setattr(registry, "entry_points", lambda group: scans.append(group) or [])
    for _ in range(100):
        registry.resolve("quantkit.formats", "int_group")
    assert scans == ["quantkit.formats"]


def test_a_package_that_is_installed_meanwhile_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownName, match="unknown quantizer 'ternary'"):
        registry.resolve("quantkit.quantizers", "ternary")
    install(tmp_path)
    assert registry.resolve("quantkit.quantizers", "ternary").bits == 1.58
    assert "ternary" in registry.names("quantkit.quantizers")


def test_a_package_that_was_removed_is_forgotten_by_a_rescan(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    metadata = install(tmp_path)
    registry.rescan()
    assert "ternary" in registry.names("quantkit.quantizers")
    (metadata / "entry_points.txt").unlink()
    registry.rescan()
    with pytest.raises(UnknownName, match="unknown quantizer 'ternary'"):
        registry.resolve("quantkit.quantizers", "ternary")


def test_two_claims_on_a_name_are_an_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "gptq = ternary_for_tests:Ternary")
    registry.rescan()
    with pytest.raises(ValueError, match="both claim the name 'gptq'"):
        registry.resolve("quantkit.quantizers", "gptq")
