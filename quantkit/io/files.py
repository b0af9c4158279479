"""Files that are whole or not there, and names that lead to files below a folder."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from xxhash import xxh3_64_hexdigest

from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.core.units import size

LARGEST_JSON, DEEPEST_JSON = 2**28, 64
"""Bytes and levels of a JSON file: metadata of the largest models take some megabytes and ten levels."""
_CHECKSUM = "checksum"


def write_durably(path: Path, write: Callable[[Path], Any], needed: int) -> None:
    """Writes a file so that it is either whole or not there: synced under a temporary name, then renamed.

    Args:
        path: the file.
        write: writes it to the path that it is given.
        needed: bytes, at least.

    Raises:
        QuantkitError: the disk is full, or does not take it.
    """
    temporary = path.with_name(path.name + ".tmp")
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise QuantkitError(_disk_full(path, needed, free))
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~umask())  # safetensors makes files that only their owner can read
        temporary.replace(path)
        sync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: what torch.save makes of a full disk
        temporary.unlink(missing_ok=True)
        if "No space" in str(error) or "os error 28" in str(error):
            raise QuantkitError(_disk_full(path, needed, shutil.disk_usage(path.parent).free)) from error
        if isinstance(error, RuntimeError) and "StreamWriter" not in str(error):
            raise
        raise QuantkitError(f"{path} cannot be written ({error})") from error


def parse_json(path: Path) -> Any:
    """What a JSON file holds, whoever wrote it.

    Raises:
        ValueError: it cannot be read, is not JSON, or is larger or nested deeper than any that a user has.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {size(LARGEST_JSON)}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if _nested(found) > DEEPEST_JSON:
        raise ValueError(f"it is nested more than {DEEPEST_JSON} deep")
    return found


def _nested(value: Any) -> int:
    """Levels of lists and objects in parsed JSON, as far as they matter."""
    level, depth = [value], 0
    while level and depth <= DEEPEST_JSON:
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [part for each in inner for part in (each.values() if isinstance(each, dict) else each)]
        depth += bool(inner)
    return depth


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object that quantkit has written.

    Args:
        path: the file.
        what: it should be, and a way out: "a search's state; remove it".

    Raises:
        CheckpointError: it is missing, not JSON, or no object.
    """
    try:
        found = parse_json(path)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as {what} ({error})") from error


def record(name: str, value: Mapping[str, Any]) -> bytes:
    """A JSON object as text, with a checksum of itself and of the name that it goes by, for `read_record`."""
    return (json.dumps({**value, _CHECKSUM: _sum_of(name, value)}, indent=2) + "\n").encode()


def read_record(path: Path, name: str, what: str) -> dict[str, Any]:
    """The JSON object of a file that `record` has written, and nothing has changed since.

    Args:
        path: the file.
        name: that it was written under; a record in the place of another is none.
        what: see `read_json`.

    Raises:
        CheckpointError: it is missing, or not as it was written.
    """
    found = read_json(path, what)
    if found.pop(_CHECKSUM, None) != _sum_of(name, found):
        raise CheckpointError(f"{path} cannot be read as {what} (it is not as it was written)")
    return found


def _sum_of(name: str, value: Mapping[str, Any]) -> str:
    return str(xxh3_64_hexdigest(json.dumps([name, value], sort_keys=True).encode()))


def files_below(folder: Path) -> list[str]:
    """Names of all files below a folder, sorted; links are not followed."""
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        found += [(Path(place) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def remove_below(root: Path, names: Iterable[str]) -> None:
    """Removes files below a folder, and the folders that this empties."""
    for name in names:
        path = root / name
        with suppress(OSError):
            path.unlink()
        for parent in path.parents:
            if parent == root or root not in parent.parents:
                break
            with suppress(OSError):
                parent.rmdir()


def leads_below(root: Path, name: Any) -> bool:
    """Whether a name leads to a place below a folder, whatever links lie on the way; another is damage or worse."""
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        return False
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(root / name)
        place = (root / name).parent.resolve()
    except (OSError, ValueError):  # it is too long, or holds what no name has
        return False
    return place == root.resolve() or root.resolve() in place.parents


def sync(folder: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_full(path: Path, needed: int, free: int) -> str:
    return (
        f"the disk is full: {path.name} takes {size(needed)} and {size(free)} are free; "
        "what was finished before is kept, so free some space and repeat with `resume`"
    )


def umask() -> int:
    """The process's mask of permissions."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
