"""What verbs that run a model begin with: the model that was asked for, and its tokenizer."""

from collections.abc import Callable
from typing import Any


def subject(
    model: str,
    device: str,
    dtype: str | None,
    unpack: bool | None,
    check: Callable[[Any], None] = lambda tokenizer: None,
) -> tuple[Any, Any]:
    """(the model in eval mode on its device, its tokenizer).

    Args:
        model: folder, hub id or GGUF file, packed or not.
        device, dtype, unpack: as the options say; "auto" and None for the defaults.
        check: looks at the tokenizer, before any weights are read.

    Raises:
        QuantkitError: there is no such model, device or dtype.
    """
    import quantkit
    from quantkit.core.device import compute_dtype, parse_dtype, pick_device
    from quantkit.io.checkpoint import read_config
    from quantkit.io.hf import resolve_folder
    from quantkit.io.source import load_tokenizer

    where, folder = pick_device(device), resolve_folder(model)
    read_config(folder)  # a folder without a model says so before its tokenizer does
    tokenizer = load_tokenizer(folder)
    check(tokenizer)
    kept = parse_dtype(dtype) or compute_dtype(where) or "auto"
    return quantkit.load(folder, dtype=kept, device=where, unpack=unpack).eval(), tokenizer
