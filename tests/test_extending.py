"""docs/extending.md does what it says: its package is installed, its commands run, its test passes."""

import re
import shlex

import pytest
import torch

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
    (group,) = re.findall(r'\[project\.entry-points\."(.*?)"\]\n(.*?)\n\n', FILES["pyproject.toml"], re.S)
    metadata = folder / "ternary_method-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ternary-method\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group[0]}]\n{group[1].replace(chr(34), '')}\n")
    (folder / "evals").symlink_to(ROOT / "evals")
    return folder


def run(installed, module, *arguments, code=0):
    result = server().run(module, *arguments, cwd=installed, path=[installed])
    assert result.returncode == code, result.stdout + result.stderr
    return result.stderr if code else result.stdout


def test_its_own_test_passes(installed):
    run(installed, "pytest", "-q", "-p", "no:cacheprovider", "test_ternary.py")


def test_its_commands_run(installed):
    for line in COMMANDS.strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "quantkit"
        printed = run(installed, "quantkit.cli", *arguments)
    assert "int_group" in printed
    model = load(installed / "out" / "ternary", dtype=torch.float32, unpack=False)
    values = model.model.layers[0].mlp.up_proj.weight[0, :64].abs().unique()
    assert len(values) == 2, "0 and the group's scale"


def test_it_stands_in_plans_searches_and_errors(installed):
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
    run(installed, "quantkit.cli", "search", "evals/reference/model", *candidates)
    assert "ternary(0.6)" in (installed / "out" / "found" / "quantkit_plan.json").read_text()
