"""Products of fp32 matrices at the full width of this CPU.

torch multiplies fp32 with MKL, which on CPUs that are not Intel's takes half of the vectors' width. oneDNN, which torch
has too, takes all of it, and is used where products may be rounded to bf16 on their way: twice as fast on an AMD EPYC.
A CPU without units for such products does not round them; one that has them is left alone, as a probe tells.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

EXACT = 2e-6
"""Relative error below which a product was not rounded to bf16, which leaves 2e-3."""


_lock = threading.Lock()
_within = 0
_before = ""


@contextmanager
def full_width() -> Iterator[None]:
    """While it lasts, this process multiplies fp32 matrices at full width where that costs no accuracy.

    Threads may be in it at once; the setting is torch's of the whole process, and goes back when the last one leaves.
    """
    global _within, _before
    if not _widens():
        yield
        return
    settings = _settings()
    with _lock:
        if not _within:
            _before, settings.fp32_precision = settings.fp32_precision, "bf16"
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if not _within:
                settings.fp32_precision = _before


@lru_cache
def _widens() -> bool:
    """Whether oneDNN can be had, in all of AVX-512, and with fp32's accuracy."""
    if _settings() is None or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with _lock, torch.autocast("cpu", enabled=False):
        return _stays_exact()


def _stays_exact() -> bool:
    kind: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(0), "dtype": torch.float32, "device": "cpu"}
    for rows, inner, columns in ((512, 512, 512), (64, 1536, 576), (2048, 64, 2048)):
        x = torch.randn(rows, inner, **kind)
        y = torch.randn(inner, columns, **kind)
        exact = x.double() @ y.double()
        with _with_onednn():
            found = x @ y, torch.zeros_like(exact, dtype=x.dtype).addmm_(x, y), torch.nn.functional.linear(x, y.T)
        if any(float((one - exact).norm() / exact.norm()) > EXACT for one in found):
            return False
    return True


def _settings() -> Any:
    """Of torch's products on a CPU; None where this torch has none."""
    found = getattr(torch.backends.mkldnn, "matmul", None)
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return found if has_onednn and hasattr(found, "fp32_precision") else None


@contextmanager
def _with_onednn() -> Iterator[None]:
    settings = _settings()
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
