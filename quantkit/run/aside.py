"""What may ride along a walk over a model without anyone reading it; `run.check` is of that kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from quantkit.core.weight import QuantizedWeight
    from quantkit.models.forward import WeightSource


class Aside:
    """What rides along a walk: nothing; the walker calls these in their order."""

    def begin(self, model: nn.Module, source: WeightSource, device: torch.device, batch_tokens: int) -> None:
        """Nothing is packed yet."""

    def front_packed(self) -> None:
        """What runs in front of the blocks, and is packed by itself, is packed by now."""

    def through_full(self, index: int) -> None:
        """A block is loaded, and nothing in it is packed yet."""

    def through_packed(self, index: int) -> None:
        """The same block has its packed layers."""

    def full_ends(self) -> None:
        """The rest outside the blocks is about to be packed."""

    def finish(self, again: bool, finished: Callable[[int], dict[str, QuantizedWeight] | None]) -> None:
        """All is packed."""
