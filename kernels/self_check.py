"""Whether a family of Triton kernels may be used on a GPU: checked once there, before its first use.

No kernel is trusted on a GPU, with a driver, a torch or a Triton that it never ran with. The first use of a family
there runs a few small products (`self_check_cases`) against fp64, which takes well under a second once the kernels are
compiled, and the seconds of compiling them before. The verdict is kept in the user's cache folder, beside the launch
sizes of `tuning`, under the GPU's name, the versions of all of these and a digest of the kernels' source; later uses
cost a look into a dictionary. A family that raises or errs is not used: the caller takes its reference, and one warning
says so. `quantkit doctor` checks all families anew.

While a CUDA graph is being recorded nothing else may run: a family that was not checked by then is trusted for the
recording, and checked at its next use outside of one. A check that runs out of memory says nothing, and is repeated.
"""

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

from quantkit.kernels import tuning

RIGHT = "right"
logger = logging.getLogger(__name__)


class Case(NamedTuple):
    """One comparison.

    Attributes:
        name: what was computed.
        error: how far it is off.
        most: how far it may be.
    """

    name: str
    error: float
    most: float


Cases = Callable[[torch.device], Iterable[Case]]
_verdicts: dict[tuple[str, torch.device], bool] = {}
_lock = threading.RLock()
_own = threading.local()


def trusted(family: str, device: torch.device) -> bool:
    """Whether to use a family's kernels on a GPU; checks them where that is not known.

    Args:
        family: one of `self_check_cases.FAMILIES`.
        device: the GPU, with its index.
    """
    verdict = _verdicts.get((family, device))
    return _decide(family, device) if verdict is None else verdict


def known(family: str, device: torch.device) -> bool:
    """Whether the verdict is in, so that it need not be asked for again; a recording of a CUDA graph leaves none."""
    return device.type == "cpu" or (family, device) in _verdicts


def check(family: str, device: torch.device) -> str | None:
    """Runs a family's cases: RIGHT, or what is wrong; None where the GPU's memory did not suffice."""
    _own.checking = getattr(_own, "checking", frozenset()) | {family}
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), _on(device):
            for case in cases_of(family)(device):
                if not case.error <= case.most:  # NaN too
                    return f"{case.name} is off by {case.error:.2g}, where {case.most:.2g} is rounding"
    except torch.OutOfMemoryError:
        return None
    except Exception as error:  # Triton, its compilers and CUDA raise many kinds
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
    finally:
        _own.checking -= {family}
    return RIGHT


def keep(family: str, device: torch.device, found: str) -> None:
    """Makes what `check` found the verdict, here and for later processes; warns where it is not RIGHT."""
    with _lock:
        file = verdict_file(device)
        if file is not None:
            _write(file, _read(file) | {family: found})
        _settle(family, device, found)


def cases_of(family: str) -> Cases:
    """A family's cases; imported now, since they import the families."""
    return import_module("quantkit.kernels.self_check_cases").FAMILIES[family]


def verdict_file(device: torch.device) -> Path | None:
    """Where verdicts on this GPU, with these versions, are kept; None for a user without a home."""
    try:
        return tuning.cache_file(f"self-check {_identity(device)} kernels {_source_digest()}")
    except RuntimeError:
        return None


def _decide(family: str, device: torch.device) -> bool:
    if device.type == "cpu" or family in getattr(_own, "checking", ()) or _capturing(device):
        return True  # on a CPU kernels run through Triton's interpreter, as tests ask for
    with _lock:
        if (family, device) in _verdicts:  # by another thread meanwhile
            return _verdicts[family, device]
        file = verdict_file(device)
        known = None if file is None else _read(file).get(family)
        if known is not None:
            return _settle(family, device, known)
        found = check(family, device)
        if found is None:
            return True
        keep(family, device, found)
        return found == RIGHT


def _settle(family: str, device: torch.device, found: str) -> bool:
    if found != RIGHT and _verdicts.get((family, device)) is not False:
        logger.warning(
            "the %s kernel is not used on %s, where it errs (%s): its reference runs instead, which is slow; "
            "`quantkit doctor` checks again",
            *(family, device, found),
        )
    _verdicts[family, device] = found == RIGHT
    return found == RIGHT


def _capturing(device: torch.device) -> bool:
    with _on(device):
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache
def _identity(device: torch.device) -> str:
    """A GPU by its name, compute capability and driver; torch and Triton are named by `tuning.cache_file`."""
    found = torch.cuda.get_device_properties(device)
    return f"{found.name} sm {found.major}{found.minor} driver {driver()}"


def driver() -> str:
    """The version of the GPU's driver, or of the CUDA that it offers."""
    try:
        found = re.search(r"Kernel Module\D+([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found[1] if found else f"of cuda {getattr(torch._C, '_cuda_getDriverVersion', lambda: 'unknown')()}"


@lru_cache
def _source_digest() -> str:
    """Digest of all kernels' sources: a changed one is checked anew, whatever its version says."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _read(file: Path) -> dict[str, str]:
    """Verdicts by family; none where the file is missing or damaged."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    fits = isinstance(found, dict) and all(isinstance(verdict, str) for verdict in found.values())
    return found if fits else {}


def _write(file: Path, verdicts: dict[str, str]) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(verdicts, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, file)
    except OSError as error:
        logger.info("verdicts on kernels are not kept: %s", error)
