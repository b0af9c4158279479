"""Dense: the model that a packed one stands for, as transformers saves it, which any program reads."""

from typing import Any, ClassVar

from torch import Tensor

from quantkit.core.weight import QuantizedWeight
from quantkit.exchange.target import FolderTarget


class Dense(FolderTarget):
    """Every packed layer becomes dense, rounded to the type of the other weights."""

    name: ClassVar[str] = "dense"

    def holds(self, layer: str) -> bool:
        """No layer stays packed."""
        return False

    def refusal(self, name: str, weight: QuantizedWeight) -> str:
        """Nothing is refused."""
        return ""

    def tensors(self, name: str, weight: QuantizedWeight) -> tuple[dict[str, Tensor], Tensor]:
        """Not asked, since no layer stays packed."""
        raise AssertionError(name)

    def config(self) -> dict[str, Any]:
        """That of the model, of another type where one was asked for."""
        config = self.packed.config()
        return config if self.dtype is None else config | {"dtype": str(self.dtype).removeprefix("torch.")}
