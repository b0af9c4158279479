"""The archives are whole, and the source folder runs uninstalled, beside a package that is really called `kernels`."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

from .conftest import ROOT

FOLDERS = ("quantkit", "kernels", "cli", "evals", "tests", "docs")
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "requirements.txt")
LINKS = {"quantkit/kernels": "../kernels", "quantkit/cli": "../cli", "quantkit/evals": "../evals"}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The sdist of a copy of the source tree, unpacked, and the wheel of the unpacked sdist; no network."""
    root = tmp_path_factory.mktemp("archives")
    source = root / "source"
    source.mkdir()
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, source)
    _run([sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(root)!r})"], source)
    with tarfile.open(next(root.glob("*.tar.gz"))) as archive:
        archive.extractall(root, filter="data")
    unpacked = next(root.glob("quantkit_llm-*/"))
    pip = [sys.executable, "-m", "pip", "-q", "--no-cache-dir"]
    _run([*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(root), str(unpacked)], root)
    return source, unpacked, next(root.glob("*.whl"))


def _run(command, folder, **environment):
    result = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _files(root):
    found = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return {name for name in found if not name.split("/")[0].endswith((".egg-info", "build"))}


@pytest.mark.slow
def test_the_sdist_is_the_source_tree(archives):
    source, unpacked, _ = archives
    assert {link: os.readlink(unpacked / link) for link in LINKS} == LINKS
    assert _files(unpacked) - {"PKG-INFO", "setup.cfg"} == _files(source)


@pytest.mark.slow
def test_the_wheel_has_what_runs_and_the_reference_model_but_no_tests_and_no_results(archives):
    source, _, wheel = archives
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name.split("/")[0] for name in names if name.endswith("/entry_points.txt"))
        assert "quantkit = quantkit.cli.__main__:main" in archive.read(f"{metadata}/entry_points.txt").decode()
    modules = {
        path.relative_to(source).as_posix()
        for folder in ("", *LINKS)
        for path in (source / (folder or "quantkit")).rglob("*.py")
    }
    modules = {name for name in modules if not name.startswith("quantkit/evals/benchmarks/")}
    model = {f"quantkit/evals/reference/model/{path.name}" for path in (source / "evals/reference/model").iterdir()}
    assert f"{metadata}/licenses/LICENSE" in names
    assert {name for name in names if not name.startswith(metadata)} == modules | model | {"quantkit/py.typed"}


@pytest.mark.slow
def test_an_installed_wheel_quantizes_and_evaluates_the_reference_model(archives, tmp_path):
    target = tmp_path / "installed"
    with zipfile.ZipFile(archives[2]) as archive:
        archive.extractall(target)
    path = {"PYTHONPATH": str(target)}
    where = _run([sys.executable, "-c", "import quantkit; print(quantkit.__file__)"], tmp_path, **path)
    assert where.startswith(str(target))
    assert _run([sys.executable, "-m", "quantkit.cli", "--version"], tmp_path, **path).startswith("quantkit ")
    commands = (
        "quantize reference --method=rtn --bits=8 --output=out",
        "eval out --baseline=reference --data=stdlib --seqlen=128 --num-samples=2",
    )
    assert "KL to baseline  0.000" in _run([sys.executable, "-c", _COMMANDS, *commands], tmp_path, **path)


_COMMANDS = """
import sys
from quantkit.cli.__main__ import main

for command in sys.argv[1:]:  # in one process, which imports once
    sys.argv = ["quantkit", *command.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
"""


def test_claimed_pythons_are_those_that_run_the_tests():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    claimed = [line.split(" :: ")[-1] for line in project["project"]["classifiers"] if "Python :: 3." in line]
    lowest = project["project"]["requires-python"].removeprefix(">=")
    assert claimed == [lowest]
    assert project["tool"]["ruff"]["target-version"] == f"py{lowest.replace('.', '')}"
    assert project["tool"]["mypy"]["python_version"] == lowest
    assert f"Python {lowest}" in (ROOT / "README.md").read_text()


def test_transformers_imports_from_the_root_beside_another_package_called_kernels(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("MARK = 'the other one'\n")
    metadata = tmp_path / "kernels-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.1.0\n")
    code = "import kernels; assert kernels.MARK; import quantkit.kernels.int_group_matmul, quantkit.evals, quantkit.cli"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_pins_lie_in_the_declared_ranges():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [Requirement(r) for r in project["dependencies"] + project["optional-dependencies"]["dev"]]
    pins = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        line = line.split("#")[0].strip()
        if line:
            requirement = Requirement(line)
            pins[requirement.name] = next(iter(requirement.specifier)).version
    for requirement in ranges:
        assert requirement.name in pins, f"{requirement.name} is not pinned in requirements.txt"
        assert requirement.specifier.contains(pins[requirement.name])
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")


def test_common_gpu_image_is_in_range():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for name, version in {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}.items():
        assert ranges[name].contains(version)
