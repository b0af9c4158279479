"""docs/extending.md does what it says: its package is installed, its commands run, its test passes."""

import json
import re
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file

from quantkit.core import registry
from quantkit.core.errors import CheckpointError
from quantkit.io.hf import load

from .conftest import ROOT
from .helpers.forks import server

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE, re.S))
(COMMANDS,) = re.findall(r"<!-- commands -->\n```bash\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder whose packages a process finds, as if pip had installed them there."""
    folder = tmp_path_factory.mktemp("package")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    groups = re.findall(r'\[project\.entry-points\."(.*?)"\]\n(.*?)\n\n', FILES["pyproject.toml"], re.S)
    metadata = folder / "ternary_method-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ternary-method\nVersion: 0.1.0\n")
    entries = [f"[{name}]\n{lines.replace(chr(34), '')}\n" for name, lines in groups]
    (metadata / "entry_points.txt").write_text("\n".join(entries))
    (folder / "evals").symlink_to(ROOT / "evals")
    return folder


def run(installed, module, *arguments, code=0):
    result = server().run(module, *arguments, cwd=installed, path=[installed])
    assert result.returncode == code, result.stdout + result.stderr
    return result.stderr if code else result.stdout


def checkpoint(folder):
    """All tensors of a checkpoint."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_its_own_test_passes(installed):
    run(installed, "pytest", "-q", "-p", "no:cacheprovider", "test_ternary.py")


@pytest.fixture(scope="module")
def printed(installed):
    """What the page's commands print, one after the other."""
    lines = COMMANDS.replace("\\\n", " ").strip().splitlines()
    assert all(line.startswith("quantkit ") for line in lines)
    return [run(installed, "quantkit.cli", *shlex.split(line)[1:]) for line in lines]


def test_its_commands_run_and_tuning_moves_scales_alone(installed, printed):
    assert "ternary" in printed[-1]
    plain, tuned = (checkpoint(installed / "out" / name) for name in ("ternary", "tuned"))
    assert plain.keys() == tuned.keys()
    codes, scales = ([name for name in plain if name.endswith(kind)] for kind in (".codes", ".scales"))
    assert codes and all(torch.equal(plain[name], tuned[name]) for name in codes)
    assert any(not torch.equal(plain[name], tuned[name]) for name in scales)


@pytest.fixture
def findable(installed, monkeypatch):
    """This process finds the package too, as long as a test runs."""
    monkeypatch.syspath_prepend(installed)
    yield
    monkeypatch.undo()
    registry.rescan()


@pytest.mark.usefixtures("printed", "findable")
def test_its_checkpoints_are_read_and_checked(installed):
    folder, damaged = installed / "out" / "ternary", installed / "out" / "damaged"
    model = load(folder, dtype=torch.float32, unpack=False)
    values = model.model.layers[0].mlp.up_proj.weight[0, :64].abs().unique()
    assert len(values) == 2, "0 and the group's scale"
    shutil.copytree(folder, damaged)
    config = damaged / "config.json"
    changed = json.loads(config.read_text().replace('"group_size": 64', '"group_size": 0', 1))
    del changed["quantization_config"]["checksums"]  # else they are what differs first
    config.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="group_size=0"):
        load(damaged)


def test_it_stands_in_plans_searches_and_errors(installed, short_reference):
    (installed / "plan.json").write_text('{"layers": {"model.layers.0.mlp.up_proj": "ternary(0.6)"}}')
    quantize = ["quantkit.cli", "quantize", "evals/reference/model", "--dry-run"]
    assert "1," in run(installed, *quantize, "--plan", "plan.json")
    said = run(installed, *quantize, "--method", "ternary", "--treshold", "3", code=2)
    assert "did you mean --threshold?" in said
    said = run(installed, *quantize, "--method", "ternary", "--bits", "3", code=2)
    assert "ternary has no setting 'bits'" in said
    text = (
        "--num-samples 2 --seqlen 64 --search-samples 6 --held-out 2 --generations 1 --offspring 2 --calibration stdlib"
    )
    candidates = ["--candidates", "ternary(0.6), gptq(3)", "--avg-bits", "2.9", "--output", "out/found", *text.split()]
    run(installed, "quantkit.cli", "search", short_reference, *candidates)
    assert "ternary(0.6)" in (installed / "out" / "found" / "quantkit_plan.json").read_text()
