"""The source folder runs uninstalled, beside a package that is really called `kernels`."""

import os
import subprocess
import sys
import tomllib

from .conftest import ROOT


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
