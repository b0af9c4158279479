"""Which device a run uses, and in which type it computes there."""

import psutil
import torch

from quantkit.core.errors import QuantkitError


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; for None or "auto" a GPU if there is one, else the CPU.

    Raises:
        QuantkitError: no such device here.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise QuantkitError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from error
    if where.type not in ("cpu", "cuda"):
        raise QuantkitError(f"device {device!r} is not supported; use cpu, cuda or cuda:N")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise QuantkitError(
            f"device {device!r} was asked for; torch sees {torch.cuda.device_count()} GPUs here: use cpu or auto"
        )
    return where


def compute_dtype(device: torch.device) -> torch.dtype | None:
    """fp32 on a CPU, where half types are slow; None, the checkpoint's own type, on a GPU."""
    return torch.float32 if device.type == "cpu" else None


def multiplies_bf16(device: torch.device) -> bool:
    """Whether this is a CPU with instructions for products of bf16, which are several times faster there than fp32."""
    if device.type != "cpu":
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.11
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A floating-point type by its name; None for None.

    Raises:
        QuantkitError: another name.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise QuantkitError(f"unknown dtype {name!r}; use {', '.join(known)}")
    return None if name is None else known[name]


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in this machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
