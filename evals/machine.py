"""What a record says of where a measurement was made: the processor, versions, and names without places."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from quantkit.core.constants import RELEASE

PACKAGES = ("torch", "transformers", "numpy", "numba", "safetensors")
"""That results depend on."""


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of quantkit, Python, and those of some packages that are installed."""
    found = {"quantkit": RELEASE, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor's name and how many there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs"


def name_of(source: str | Path) -> str:
    """The name of a model or a text: a file's or a folder's without where it lies."""
    path = Path(source)
    return path.resolve().name if path.exists() else str(source)
