"""What the forms have in common that hold whole numbers with a scale for each group."""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantkit.core.errors import QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.exchange.integers import Integers, grid, integers, number_bits
from quantkit.exchange.packed import DENSE, PackedFolder
from quantkit.exchange.target import FolderTarget
from quantkit.kernels.int_group_layout import STORED
from quantkit.models.experts import place


def scales_dtype(packed: PackedFolder) -> torch.dtype:
    """The type of scales and dense weights where nobody asks for one: fp16, which keeps scales; not of Gemma's models,
    whose activations leave its range.
    """
    wide = str(getattr(packed.model.config, "model_type", "")).startswith("gemma")
    return torch.bfloat16 if wide else torch.float16


class WholeNumbers(FolderTarget):
    """A form of linear layers with whole numbers.

    Args:
        packed, dtype: see `Target`; scales have `scales_dtype` where no dtype is given.
        carrier: bits of a number; None for the fewest of `carriers` that hold it.
    """

    carriers: tuple[int, ...]
    experts: ClassVar[bool] = False
    """Whether the form holds experts, one by one, where the model's files have them so."""

    def __init__(self, packed: PackedFolder, dtype: torch.dtype | None = None, carrier: int | None = None) -> None:
        if carrier is not None and carrier not in self.carriers:
            known = ", ".join(map(str, self.carriers))
            raise QuantkitError(f"carrier={carrier}: {self.name} has numbers of {known} bits")
        self.asked = carrier
        super().__init__(packed, dtype or scales_dtype(packed))
        self.refuse_nothing()
        for name, weight in self._held():
            own = grid(weight)
            if own is not None and own.zero == STORED:
                zeros = packed.field(name, next(key for key in weight.state() if key.rpartition(".")[2] == "zeros"))
                if not torch.equal(zeros, zeros.round()):
                    raise QuantkitError(
                        f"{name}: its zeros lie between whole numbers, which {self.name} does not hold; `--to mlx` "
                        f"does, a symmetric grid goes, and {DENSE}"
                    )

    def refusal(self, name: str, weight: QuantizedWeight) -> str:
        """See `Target`."""
        own = grid(weight)
        if own is None:
            return f"{weight.label}; it holds whole numbers with scales (`--method gptq` or `rtn`), and {DENSE}"
        if not self.packed.places[name]:
            return f"experts that the model's files have all in one tensor; {DENSE}"
        if place(name) is not None and not self.experts:
            return f"experts one by one; `--to compressed-tensors` has them, and {DENSE}"
        if not isinstance(self.packed.model.get_submodule(name), nn.Linear):
            return f"layers such as {type(self.packed.model.get_submodule(name)).__name__}; {DENSE}"
        rows, columns = weight.shape
        if own.group_size < columns and columns % own.group_size:
            return f"groups of {own.group_size} of {columns} inputs, the last of which is shorter; {DENSE}"
        bits = number_bits(own)
        if self.asked is not None and bits > self.asked:
            return f"{own.bits}-bit codes in numbers of {self.asked} bits: they take {bits}"
        if bits > max(self.carriers):
            return f"{own.bits}-bit codes half a step off zero, which take {bits} bits; {DENSE}"
        return self.shape_refusal(rows, columns)

    def settings(self) -> dict[str, Any]:
        """See `FolderTarget`."""
        return super().settings() | {"carrier": self.asked}

    def shape_refusal(self, rows: int, columns: int) -> str:
        """What of a weight's shape the form does not hold; "" where it does."""
        return ""

    def carrier(self, bits: int) -> int:
        """Bits of the numbers that hold numbers of `bits` bits."""
        return self.asked or min(width for width in self.carriers if width >= bits)

    def tensors(self, name: str, weight: QuantizedWeight) -> tuple[dict[str, Tensor], Tensor]:
        """See `Target`."""
        assert self.dtype is not None
        found = integers(weight)
        assert found is not None
        scales = self.cast(f"{name}'s scales", found.scales)
        tensors: dict[str, Tensor] = {}
        for called, outputs in self.packed.places[name]:
            tensors |= self.stored(called, found.of(outputs), scales[outputs])
        return tensors, replace(found, scales=scales.float()).values()

    @abstractmethod
    def stored(self, name: str, found: Integers, scales: Tensor) -> dict[str, Tensor]:
        """The form's tensors of a layer.

        Args:
            name: of the layer in the files.
            found: its whole numbers.
            scales: [out_features, groups] in the type in which they are stored.
        """
