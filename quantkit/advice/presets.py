"""Presets: the method that suits so many bits on a machine, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from quantkit.core.constants import HEAD_BITS, TARGET_SHIFT
from quantkit.core.errors import QuantkitError
from quantkit.kernels.cpu import has_numba

Preset = Literal["quality", "balanced", "fast"]
MOST_TRELLIS_BITS = 4
"""Up to which trellis codes are worth their time."""


@dataclass(frozen=True)
class Way:
    """How a preset packs a model.

    Attributes:
        method: by its name.
        settings: of the method.
        fisher, target_shift, true_sequential, head_bits: of the recipe.
        reason: in words.
    """

    method: str
    reason: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    fisher: bool = False
    target_shift: float = TARGET_SHIFT
    true_sequential: bool = True
    head_bits: int | None = HEAD_BITS


def unasked(bits: float) -> str:
    """What `--bits` alone means, in words."""
    if bits > MOST_TRELLIS_BITS:
        return "gptq, integers, which lose next to nothing at so many bits"
    return f"gptq, integers, quick to make and read everywhere; --preset balanced loses less at {bits:g} bits"


def way(preset: str, bits: float, device: torch.device) -> Way:
    """What a preset means.

    Args:
        preset: "quality", "balanced" or "fast".
        bits: wanted of the codes.
        device: where the run takes place.

    Raises:
        QuantkitError: there is no such preset, or it has no way to so many bits.
    """
    if preset not in get_args(Preset):
        raise QuantkitError(f"preset {preset!r}: there are {', '.join(get_args(Preset))}")
    whole = bits == int(bits)
    few = bits <= MOST_TRELLIS_BITS
    if preset == "fast":
        if not whole:
            raise QuantkitError(f"preset 'fast' packs integers, whole bits a weight; {bits:g} needs 'balanced'")
        return Way("gptq", "integers, one stream of activations, one pass a block: the quickest to make and to run",
                   target_shift=0, true_sequential=False)  # fmt: skip
    if few and (preset == "quality" or device.type == "cuda"):
        return Way("trellis", f"trellis codes lose least at {bits:g} bits", {"state_bits": 16}, True)
    if few and (has_numba() or not whole):
        return Way("trellis", f"trellis codes lose least at {bits:g} bits; short ones, since there is no GPU",
                   {"state_bits": 12}, True)  # fmt: skip
    if not whole:
        raise QuantkitError(f"{bits:g} bits: above {MOST_TRELLIS_BITS} give a whole number")
    if few:
        return Way("gptq", "integers, since trellis codes take long without a GPU or numba; 'quality' makes them",
                   {"group_size": 64}, True)  # fmt: skip
    return Way("gptq", f"integers lose next to nothing at {bits:g} bits", {}, preset == "quality")
