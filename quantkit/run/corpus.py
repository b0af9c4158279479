"""Text that every machine has: the Python standard library's own source and docstrings.

The interpreter that runs quantkit ships about 12 MB of prose and code. It is the text of the
offline demonstration: the reference model is trained on the training part, `--calibration stdlib`
draws from that same part, and `--data stdlib` evaluates on the held-out part, which no training
or calibration step ever reads.
"""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_MODULES = (
    "argparse",
    "configparser",
    "csv",
    "difflib",
    "fractions",
    "heapq",
    "http",
    "json",
    "logging",
    "pathlib",
    "statistics",
    "tarfile",
    "textwrap",
    "zipfile",
)
"""Top-level modules or packages kept out of training and calibration."""

# Tests exist only on some installations, and codec tables are numbers rather than text.
_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib-dynload",
    "site-packages",
    "test",
    "tests",
}


def standard_library(part: str) -> list[str]:
    """Reads one part of the running interpreter's standard library.

    Args:
        part: "train" for everything but `HELD_OUT_MODULES`, "held_out" for those alone.

    Returns:
        One string a source file, in the order of the files' paths.

    Raises:
        FileNotFoundError: this interpreter keeps no Python source of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(_sources(root)):
        is_held_out = path.relative_to(root).parts[0].removesuffix(".py") in HELD_OUT_MODULES
        if is_held_out == (part == "held_out"):
            text = path.read_text(encoding="utf-8", errors="ignore").strip()
            if text:
                documents.append(text)
    if not documents:
        raise FileNotFoundError(f"no Python source below {root}; give a text file instead")
    return documents


def _sources(root: Path) -> Iterator[Path]:
    """The library's modules; installed packages, which are most of the folders there, are not looked through."""
    for folder, inside, names in os.walk(root):
        inside[:] = [
            name
            for name in inside
            if name not in _SKIPPED_FOLDERS and not (folder == str(root) and name.startswith("config-"))
        ]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))
