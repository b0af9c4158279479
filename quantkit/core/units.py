"""Bytes as people write and read them."""

import re

from quantkit.core.errors import QuantkitError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes of "4GB" (decimal), "3.5GiB" (binary) or a plain number.

    Raises:
        QuantkitError: it is none of these.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?\s*", text.lower())
    if match is None or float(match[1]) <= 0:
        raise QuantkitError(f"{text!r} is no size; give one such as 4GB, 3.5GiB or 800MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def size(count: float) -> str:
    """Bytes in a unit that suits their number: 11.00 MiB, 2.05 GiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"
