"""A packed model as another program's: which forms there are, and a run from the packed folder to the new one."""

import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quantkit.core.errors import QuantkitError, UnknownName
from quantkit.exchange.packed import PackedFolder
from quantkit.exchange.target import Exported, Target, Told
from quantkit.io.beside import files_beside

TARGETS: Mapping[str, str] = {
    "dense": "dense:Dense",
    "compressed-tensors": "compressed_tensors:CompressedTensors",
    "gguf": "gguf:GGUF",
    "gptq": "gptq:GPTQForm",
    "mlx": "mlx:MLX",
}
"""The forms, and where they are."""


_GROUPS = {"gguf": 32, "vllm": 128, "mlx": 64}
"""Sizes of groups that a program's kernels are made for, by its name."""


def settings_for(program: str, method: str, bits: float) -> dict[str, Any]:
    """Settings of `gptq` or `rtn` whose weights `export` writes for a program exactly.

    Args:
        program: "gguf", "vllm" or "mlx".
        method: of the two.
        bits: of a code.

    Raises:
        QuantkitError: another method, or bits that the program has nothing for.
    """
    if method not in ("gptq", "rtn"):
        raise QuantkitError(f"{program} has integer grids; `method` is gptq or rtn for it, and not {method}")
    known = (2, 3, 4, 5, 6, 8) if program == "mlx" else range(1, 9)
    if bits not in known:
        raise QuantkitError(f"{program} has codes of {', '.join(map(str, known))} bits, and not of {bits:g}")
    return {"group_size": _GROUPS[program]}


def form(to: str) -> type[Target]:
    """The form of that name.

    Raises:
        UnknownName: there is none.
    """
    if to not in TARGETS:
        raise UnknownName("form", to, [*TARGETS])
    module, _, name = TARGETS[to].partition(":")
    found: type[Target] = getattr(import_module(f"quantkit.exchange.{module}"), name)
    return found


def export_folder(
    folder: Path,
    output: Path,
    to: str,
    dtype: torch.dtype | None = None,
    carrier: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Told = lambda _done, _total, _what: None,
) -> Exported:
    """Writes a packed checkpoint in another form; see `quantkit.export`."""
    kind, settings = form(to), dict[str, Any]()
    if carrier is not None:
        if not hasattr(kind, "carriers"):
            raise QuantkitError(f"`carrier` is of forms with whole numbers, and not of {to}")
        settings["carrier"] = carrier
    kind.check(folder, output, resume, overwrite)
    return kind(PackedFolder(folder), dtype, **settings).write(output, resume, overwrite, progress)


def export_model(model: PreTrainedModel, output: Path, to: str, tokenizer: Any = None, **settings: Any) -> Exported:
    """`export_folder` of a packed model in memory, by way of a folder for as long as it takes.

    Its tokenizer is the one given, or that which lies where the model was loaded from.
    """
    if getattr(model, "hf_quantizer", None) is None:
        raise QuantkitError("the model has no packed layers; `quantkit.quantize` makes some")
    above = output.expanduser().resolve().parent
    above.mkdir(parents=True, exist_ok=True)
    origin = Path(str(model.config._name_or_path or ""))
    with tempfile.TemporaryDirectory(prefix="quantkit-export-", dir=above) as name:
        if tokenizer is None and origin.name and origin.is_dir():
            for own, content in files_beside(origin).items():
                (Path(name) / own).parent.mkdir(parents=True, exist_ok=True)
                (Path(name) / own).write_bytes(content)
        model.save_pretrained(name)
        if tokenizer is not None:
            tokenizer.save_pretrained(name)
        return export_folder(Path(name), output, to, **settings)
