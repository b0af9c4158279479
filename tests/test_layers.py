"""A folder is a layer: imports run strictly downward, and files and functions stay readable."""

import ast

import pytest

from quantkit.evals.benchmarks.structure import LAYERS, Module, depths, modules, upward

from .conftest import ROOT

DEPTH = 13
LIBRARY_DEPTH = 9
"""Of the longest chain of imports; less is better."""


@pytest.fixture(scope="module")
def found():
    return modules()


def test_imports_run_downward(found):
    assert len(found) > 150
    assert upward(found) == []


def test_no_circles_and_no_long_chains(found):
    chains = depths(found)
    assert len(max(chains.values(), key=len)) <= DEPTH
    library = [chain for name, chain in chains.items() if not name.startswith(("evals", "cli"))]
    assert len(max(library, key=len)) <= LIBRARY_DEPTH


def test_every_folder_has_its_line(found):
    assert {module.layer for module in found.values()} == set(range(len(LAYERS)))


def test_what_is_wrong_is_seen(tmp_path):
    def module(name, *imported):
        return name, Module(name, tmp_path, frozenset(imported), frozenset(imported))

    right = dict(
        [module("core.errors"), module("io.shards", "core.errors"), module("tuning.pv"), module("kvcache.cache")]
    )
    assert upward(right) == []
    assert upward(right | dict([module("core.errors", "io.shards")])) == ["core.errors imports io.shards"]
    assert upward(right | dict([module("tuning.pv", "kvcache.cache")])) == ["tuning.pv imports kvcache.cache"]
    assert max(depths(right).values(), key=len) == ["io.shards", "core.errors"]
    with pytest.raises(ValueError, match=r"core.errors -> io.shards -> core.errors"):
        depths(right | dict([module("core.errors", "io.shards")]))
    with pytest.raises(ValueError, match="no line of LAYERS"):
        upward(dict([module("attic.weight", "core.errors"), module("core.errors")]))


def test_kernels_import_nothing_else_of_quantkit(found):
    for name, module in found.items():
        if name.startswith("kernels."):
            assert all(other.startswith("kernels.") for other in module.imported), name


def test_kernels_folder_is_a_namespace():
    """An __init__.py there would shadow Hugging Face's package `kernels`, which transformers imports."""
    assert not list((ROOT / "kernels").rglob("__init__.py"))


def test_files_and_functions_stay_readable(found):
    for module in found.values():
        source = module.path.read_text()
        assert source.count("\n") <= 500, module.path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 120, f"{module.path}: {node.name}"
