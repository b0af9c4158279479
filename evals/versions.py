"""The tests with other versions of transformers: the oldest that pyproject.toml admits, and the newest release.

    python -m quantkit.evals.versions --work FOLDER --json FILE
    python -m quantkit.evals.versions --work FOLDER --json FILE --transformers 5.20.0 --tests tests/io

Each version and what it depends on is installed into a folder of its own, which stands in front of this environment's
packages for a run of pytest; so that nothing else differs. Folders are kept and used again. It needs the source tree,
an environment with the tests' packages (`pip install -e '.[dev]'`), and a package index for what is not yet installed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.version import Version

from quantkit.core.errors import QuantkitError
from quantkit.evals.machine import versions

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "transformers"


@dataclass(frozen=True)
class Tested:
    """What became of the tests with a version.

    Attributes:
        version: of transformers.
        beside: of the packages that it brings along and that tests depend on.
        tests: files or folders that were run.
        counts: of tests, by "passed", "failed" and "skipped".
        failed: ids of tests that failed.
        seconds: that they took.
    """

    version: str
    beside: dict[str, str]
    tests: list[str]
    counts: dict[str, int]
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def admitted(released: list[str], requirement: str) -> list[str]:
    """Of some versions those that a requirement admits, without pre-releases, the oldest first.

    Args:
        released: as the package index has them.
        requirement: such as "transformers>=5.17,<6".
    """
    wanted = Requirement(requirement).specifier
    return [str(one) for one in sorted(Version(text) for text in released) if wanted.contains(one, prereleases=False)]


def required() -> str:
    """What pyproject.toml asks of transformers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(line for line in project["dependencies"] if Requirement(line).name == PACKAGE)


def released() -> list[str]:
    """The versions on the package index.

    Raises:
        QuantkitError: pip does not say.
    """
    asked = [sys.executable, "-m", "pip", "index", "versions", PACKAGE]
    done = subprocess.run(asked, capture_output=True, text=True)
    found = re.search(r"Available versions: (.*)", done.stdout)
    if found is None:
        raise QuantkitError(f"pip does not say which versions of {PACKAGE} there are; give them with `--transformers`")
    return [text.strip() for text in found[1].split(",")]


def installed(wanted: str, work: Path) -> Path:
    """The folder with a version of transformers and what it depends on.

    Raises:
        QuantkitError: pip cannot install it.
    """
    folder = work / f"{PACKAGE}-{wanted}"
    if not folder.exists():
        made = work / f".{folder.name}.partial"
        asked = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(made)]
        done = subprocess.run([*asked, f"{PACKAGE}=={wanted}"], capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise QuantkitError(f"{PACKAGE} {wanted} cannot be installed: {(said or ['pip fails'])[-1]}")
        made.rename(folder)
    return folder


def tested(wanted: str, tests: list[str], work: Path) -> Tested:
    """Runs tests with a version, and says what became of them.

    Raises:
        QuantkitError: it cannot be installed, or pytest does not come to run tests.
    """
    folder, result = installed(wanted, work), work / f"{wanted}.xml"
    result.unlink(missing_ok=True)
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    said = subprocess.run(
        [sys.executable, "-c", f"import json, {PACKAGE}; from quantkit.evals.machine import versions\n"
         f"print(json.dumps(versions(('{PACKAGE}', 'huggingface_hub', 'tokenizers', 'torch'))))"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    beside = json.loads(said.stdout)
    if beside.pop(PACKAGE) != wanted:
        raise QuantkitError(f"{folder} does not hold {PACKAGE} {wanted}; remove it")
    start = time.monotonic()
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
    subprocess.run([*pytest, f"--junitxml={result}", *tests], env=environment, cwd=ROOT)
    if not result.exists():
        raise QuantkitError("pytest ended without results; its words are above")
    return Tested(wanted, beside, tests, *read(result), time.monotonic() - start)


def read(result: Path) -> tuple[dict[str, int], list[str]]:
    """(Number of tests by outcome, ids of the failed ones) of a JUnit file as pytest writes it."""
    counts, failed = dict.fromkeys(("passed", "failed", "skipped"), 0), []
    for case in ElementTree.parse(result).iter("testcase"):
        outcome = "failed" if case.find("failure") is not None or case.find("error") is not None else "passed"
        outcome = "skipped" if case.find("skipped") is not None else outcome
        counts[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('file')}::{case.get('name')}")
    return counts, sorted(failed)


def main() -> None:
    """Parses the command line and runs what is asked for; what fails is said in a line."""
    try:
        run()
    except QuantkitError as error:
        sys.exit(f"error: {error}")


def run() -> None:
    """Tests with each version that is asked for, and prints a line for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", nargs="+", metavar="VERSION", help="by default the oldest and the newest")
    parser.add_argument("--tests", nargs="+", default=["tests"], metavar="PATH", help="by default all")
    parser.add_argument("--work", type=Path, required=True, help="folder for the installed versions; kept")
    parser.add_argument("--json", type=Path, required=True, help="of results; versions that it has are measured anew")
    asked = parser.parse_args()
    wanted = asked.transformers
    if wanted is None:
        known = admitted(released(), required())
        wanted = list(dict.fromkeys([known[0], known[-1]]))
    work: Path = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    found = json.loads(asked.json.read_text())["versions"] if asked.json.exists() else []
    for one in wanted:
        result = tested(one, asked.tests, work)
        found = [row for row in found if row["version"] != one] + [asdict(result)]
        record = {"pinned": version(PACKAGE), "machine": versions(), "versions": found}
        asked.json.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{PACKAGE} {one}: " + ", ".join(f"{count} {name}" for name, count in result.counts.items()), flush=True)
        for test in result.failed:
            print(f"    {test}")


if __name__ == "__main__":
    main()
