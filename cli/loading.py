"""What verbs that run a model begin with: the model that was asked for, and its tokenizer."""

from typing import Any


def subject(model: str, device: str, dtype: str | None, unpack: bool | None) -> tuple[Any, Any]:
    """(the model in eval mode on its device, its tokenizer).

    Args:
        model: folder, hub id or GGUF file, packed or not.
        device, dtype, unpack: as the options say; "auto" and None for the defaults.

    Raises:
        QuantkitError: there is no such model, device or dtype.
    """
    import quantkit
    from quantkit.core.device import compute_dtype, parse_dtype, pick_device
    from quantkit.io.hf import resolve_folder
    from quantkit.io.source import load_tokenizer

    where, folder = pick_device(device), resolve_folder(model)
    tokenizer = load_tokenizer(folder)
    kept = parse_dtype(dtype) or compute_dtype(where) or "auto"
    return quantkit.load(folder, dtype=kept, device=where, unpack=unpack).eval(), tokenizer
