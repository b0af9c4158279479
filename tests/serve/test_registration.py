"""How vLLM finds quantkit: an entry point to a function that imports nothing before it is called."""

import subprocess
import sys
import tomllib
from importlib import import_module
from types import ModuleType

from ..conftest import ROOT
from ..test_lazy import QUIET, python


def entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (value,) = project["entry-points"]["vllm.general_plugins"].values()
    module, _, name = value.partition(":")
    return module, name


def test_the_entry_point_is_there_and_imports_nothing_heavy():
    module, name = entry_point()
    assert callable(getattr(import_module(module), name))
    result = python(f"import {module}; {QUIET}; print('vllm' in __import__('sys').modules)")
    assert result.stdout.split() == ["False"], result.stderr


def test_registering_twice_changes_nothing(monkeypatch):
    """With modules that stand in for vLLM's and for the one that imports vLLM's classes."""
    told, methods = [], []

    def register_quantization_config(name):
        methods.append(name)
        return lambda cls: told.append((name, cls))

    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vllm = ModuleType("quantization")
    vllm.QUANTIZATION_METHODS, vllm.register_quantization_config = methods, register_quantization_config
    own = ModuleType("config")
    own.QuantkitConfig = object
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.quantization", vllm)
    monkeypatch.setitem(sys.modules, "quantkit.serve.vllm.config", own)
    module, name = entry_point()
    register = getattr(import_module(module), name)
    register()
    register()
    assert told == [("quantkit", object)]


def test_no_other_module_imports_vllm():
    found = subprocess.run(
        ["grep", "-rlE", r"^\s*(from|import) vllm\b", "--include=*.py", *("quantkit", "kernels", "cli")],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert found and all(name.startswith("quantkit/serve/vllm/") for name in found)
