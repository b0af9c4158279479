"""Which tile sizes a launch uses: those measured on this GPU where there are any, else a rule's.

Measured choices lie in one JSON file per GPU name and versions of torch and Triton, in the user's cache folder;
`quantkit bench --autotune` fills it, and nothing is ever tuned unasked. A rule needs no file and no measurement.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class Config:
    """Sizes of one launch.

    Attributes:
        block_m, block_n: rows of x and of W a program.
        split_k: programs that share the columns of a tile.
        num_warps, num_stages: Triton's.
    """

    block_m: int
    block_n: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4


def cache_file(gpu: str) -> Path:
    """Where the choices for a GPU are kept, by its name and the versions that compiled for it."""
    import triton

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{gpu} torch {torch.__version__} triton {triton.__version__}")
    return root / "quantkit" / f"{name}.json"


@lru_cache
def _table(file: Path) -> dict[str, Config]:
    try:
        return {key: Config(**values) for key, values in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # no file yet, or one that another version wrote
        return {}


def chosen(device: torch.device, key: str, default: Config) -> Config:
    """The measured choice for a launch on a GPU, or `default`."""
    try:
        return _table(_file_of(device)).get(key, default)
    except RuntimeError:  # a user without a home
        return default


@lru_cache
def _file_of(device: torch.device) -> Path:
    return cache_file(torch.cuda.get_device_name(device))


def tune(file: Path, key: str, candidates: Iterable[Config], seconds: Callable[[Config], float]) -> Config:
    """Measures all candidates and keeps the fastest in `file`.

    Args:
        file: see `cache_file`.
        key: what is launched.
        candidates: what to try; one that cannot run (too much shared memory) raises in `seconds` and is passed over.
        seconds: time of a launch.

    Raises:
        ValueError: no candidate ran.
    """
    measured = []
    for config in candidates:
        try:
            measured.append((seconds(config), config))
        except Exception:  # Triton and CUDA raise many kinds
            continue
    if not measured:
        raise ValueError(f"{key}: no configuration runs on this GPU")
    best = min(measured, key=lambda pair: pair[0])[1]
    _table.cache_clear()  # another process may have written since
    table = _table(file)
    table[key] = best
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({key: asdict(config) for key, config in sorted(table.items())}, indent=1) + "\n")
    os.replace(temporary, file)
    return best


def shares(tiles: int, full_tiles: int, multiprocessors: int) -> int:
    """split_k: a power of two such that `tiles` x split_k programs keep a GPU busy, each with 4 tiles of K at least."""
    split = 1
    while tiles * split < 2 * multiprocessors and split < 16 and full_tiles // (2 * split) >= 4:
        split *= 2
    return split


def variations(config: Config, full_tiles: int) -> list[Config]:
    """The space searched around a rule's choice."""
    space = [
        replace(config, block_n=block_n, split_k=split_k, num_stages=num_stages)
        for block_n in (64, 128)
        for split_k in (1, 2, 4, 8, 16)
        for num_stages in (3, 4, 5, 6)
        if split_k == 1 or full_tiles // split_k >= 2
    ]
    return space if config in space else [config, *space]
