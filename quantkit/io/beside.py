"""What lies beside a model's weights, and goes with the packed model."""

from pathlib import Path

from quantkit.core.errors import QuantkitError
from quantkit.io.checkpoint import WRITTEN_ANEW

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index", ".lock"}
"""Files that hold a model's weights, in one form or another; all others go with a packed model."""
_LARGEST = 2**28
"""Bytes of a file that is copied, at most: what is larger is weights under another name."""


def files_beside(folder: Path) -> dict[str, bytes]:
    """A model's tokenizer, chat templates, code and licence, by name; hidden files are no part of it."""
    found = (path for place in ("*", "additional_chat_templates/*", "*/**/*.py") for path in sorted(folder.glob(place)))
    return {
        path.relative_to(folder).as_posix(): _bytes(path)
        for path in found
        if path.is_file()
        and not path.name.startswith("quantkit_")
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.suffix.lower() not in _WEIGHTS
        and path.name not in WRITTEN_ANEW
        and path.stat().st_size <= _LARGEST
    }


def readme_of(folder: Path) -> str:
    """The README.md beside a model; "" where there is none that can be read."""
    try:
        return (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:  # a card is a courtesy
        return ""


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise QuantkitError(
            f"{path} cannot be read ({error.strerror}), and goes with the packed model; mend or remove it, and `resume`"
        ) from error
