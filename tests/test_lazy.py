"""What is not imported: quantkit comes without torch, and transformers knows its format all the same."""

import ast
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.cli.main import app
from quantkit.core.post_import import after_import

from .conftest import ROOT

HEAVY = ("accelerate", "datasets", "numba", "numpy", "safetensors", "torch", "transformers", "triton")
VERBS = [command.name for command in app.registered_commands]
QUIET = f"print(*[name for name in {HEAVY} if name in __import__('sys').modules])"


def python(code, *arguments, path=()):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    code = f"import sys\nfrom quantkit.cli.__main__ import main\ntry:\n    main()\nexcept SystemExit:\n    {QUIET}"
    result = python(code, *arguments)
    assert result.returncode == 0, result.stderr
    *shown, heavy = result.stdout.splitlines()
    assert heavy == ""
    assert any(quantkit.__version__ in line if "--version" in arguments else "Usage" in line for line in shown)


def test_the_package_imports_nothing_heavy_and_names_what_it_has():
    code = f"import quantkit; assert set(quantkit.__all__) <= set(dir(quantkit)); quantkit.PVSettings; {QUIET}"
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


def test_all_names_are_there_for_type_checkers_and_at_run_time():
    typed = {
        alias.name
        for node in ast.walk(ast.parse((ROOT / "quantkit" / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.col_offset > 0
        for alias in node.names
    }
    assert typed == set(quantkit.__all__) == set(quantkit._PLACE)
    for name in quantkit.__all__:
        found = getattr(quantkit, name)
        assert callable(found), f"{name} is {found}"
        assert found.__module__ == quantkit._PLACE[name]
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        quantkit.quantise  # noqa: B018


def test_no_module_takes_the_place_of_a_name():
    """Importing quantkit.x binds `quantkit.x` to the module, whatever was there."""
    for name in quantkit.__all__:
        assert not (ROOT / "quantkit" / name).exists() and not (ROOT / "quantkit" / f"{name}.py").exists(), name


@pytest.fixture(scope="module")
def packed(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lazy") / "packed"
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama_small"), dtype=torch.bfloat16)
    quantkit.quantize(model, method="rtn", bits=4, group_size=32)
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(torch.tensor([[1, 2, 3]])).logits.double().sum().item()


IMPORTS = (
    "import quantkit; from transformers import AutoModelForCausalLM",
    "from transformers import AutoModelForCausalLM; import quantkit",
    "import transformers.quantizers, quantkit; from transformers import AutoModelForCausalLM",
    "import transformers.modeling_utils, quantkit.io.registration; from transformers import AutoModelForCausalLM",
    "import quantkit.io.hf; from transformers import AutoModelForCausalLM",
)
_LOADS = """
import os, sys, torch, torch._dynamo  # which take most of the time, in all orders
assert not {"quantkit", "transformers"} & {name.split(".")[0] for name in sys.modules}

def loads(imports):
    exec(imports, globals())
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    assert sum(type(module).__name__ == "QuantizedLinear" for module in model.modules()) == 14
    with torch.no_grad():
        print(model(torch.tensor([[1, 2, 3]])).logits.double().sum().item(), flush=True)
    import transformers.quantizers
    kind = type(transformers.quantizers.__loader__).__name__
    assert kind == type(transformers.quantizers.__spec__.loader).__name__ == "SourceFileLoader"

for imports in sys.argv[2:]:
    if not os.fork():
        code = 1
        try:
            loads(imports)
            code = 0
        finally:
            if code:
                __import__("traceback").print_exc()
            os._exit(code)
    assert os.wait()[1] == 0, imports
"""


@pytest.mark.slow
def test_transformers_loads_packed_checkpoints_in_any_order_of_imports(packed):
    """Each order in a fork of a process that has imported neither of the two."""
    folder, expected = packed
    result = python(_LOADS, str(folder), *IMPORTS)
    assert result.returncode == 0, result.stderr
    assert [float(line) for line in result.stdout.splitlines()] == [expected] * len(IMPORTS)
    assert "Warning" not in result.stderr


class TestAfterImport:
    @pytest.fixture(autouse=True)
    def _modules(self, tmp_path, monkeypatch):
        """Modules `awaited`, `reacts` and `fails`; each import of the first two is told in a list."""
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
        self.told = sys.told_for_tests = []
        for name in ("awaited", "reacts"):
            (tmp_path / f"{name}.py").write_text(f"import sys; sys.told_for_tests.append('{name}'); done = True")
        (tmp_path / "fails.py").write_text("import awaited; awaited.done and awaited.nothing")
        self.awaited = tmp_path / "awaited.py"
        yield
        for name in ("awaited", "reacts", "fails"):
            sys.modules.pop(name, None)
        del sys.told_for_tests

    def test_reacts_when_the_module_is_whole_and_once(self):
        after_import("awaited", "reacts")
        assert self.told == []
        import awaited

        assert self.told == ["awaited", "reacts"]
        assert type(awaited.__loader__).__name__ == "SourceFileLoader"
        assert awaited.__spec__.loader is awaited.__loader__

    def test_reacts_now_if_the_module_is_there(self):
        import awaited  # noqa: F401

        after_import("awaited", "reacts")
        assert self.told == ["awaited", "reacts"]

    def test_looking_for_the_module_is_not_importing_it(self):
        from importlib.util import find_spec

        after_import("awaited", "reacts")
        spec = find_spec("awaited")
        assert spec.origin == str(self.awaited)
        assert "told_for_tests" in spec.loader.get_source("awaited")
        assert self.told == []
        assert find_spec("no_such_module") is None

    def test_two_that_wait_are_both_told(self):
        after_import("awaited", "reacts")
        after_import("awaited", "fails")
        with pytest.warns(UserWarning, match="fails, which completes awaited, fails: AttributeError"):
            import awaited  # noqa: F401
        assert self.told == ["awaited", "reacts"]

    def test_a_module_that_fails_at_first(self):
        whole = self.awaited.read_text()
        self.awaited.write_text("raise RuntimeError('not yet')")
        after_import("awaited", "reacts")
        with pytest.raises(RuntimeError, match="not yet"):
            import awaited
        assert self.told == []
        self.awaited.write_text(whole + "\n")
        import awaited  # noqa: F401

        assert self.told == ["awaited", "reacts"]


@pytest.mark.parametrize("module", ["typer", "torch"])
@pytest.mark.parametrize("stopping", ["SIGINT", "SIGTERM"])
def test_a_stop_during_imports_is_one_line(module, stopping, tmp_path):
    """A stand-in for the module sends the signal while it is imported."""
    (tmp_path / f"{module}.py").write_text(
        f"import os, signal, time\nos.kill(os.getpid(), signal.{stopping})\ntime.sleep(9)"
    )
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from quantkit.cli.__main__ import main; main()"
    result = python(code, "inspect", str(tmp_path), path=[tmp_path])
    assert result.returncode == 128 + signal.SIGINT
    assert result.stderr.splitlines() == ["error: stopped; nothing is kept"]
