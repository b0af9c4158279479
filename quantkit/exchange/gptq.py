"""GPTQ's form, as AutoGPTQ began it and GPTQModel, vLLM, ExLlama and transformers read it."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from quantkit.core.errors import QuantkitError
from quantkit.exchange.integers import Integers, grid, is_ordered, number_bits
from quantkit.exchange.packed import PackedFolder
from quantkit.exchange.whole_numbers import WholeNumbers
from quantkit.kernels.int_group_layout import STORED


class GPTQForm(WholeNumbers):
    """Numbers of 4 or 8 bits, of one width and one size of groups in all layers."""

    name: ClassVar[str] = "gptq"
    carriers = (4, 8)

    def __init__(self, packed: PackedFolder, dtype: torch.dtype | None = None, carrier: int | None = None) -> None:
        super().__init__(packed, dtype, carrier)
        held = [weight for _, weight in self._held()]
        own = [found for weight in held if (found := grid(weight)) is not None]
        groups = {min(weight.group_size, weight.in_features) for weight in own}
        by_rows = all(weight.group_size >= weight.in_features for weight in own)
        if len(groups) > 1 and not by_rows:
            raise QuantkitError(f"{self.name} has one size of groups in all layers, and these have {sorted(groups)}")
        self.group_size = -1 if by_rows else groups.pop()
        self.asked = super().carrier(max(number_bits(weight) for weight in own))
        self.symmetric = all(weight.zero != STORED for weight in own)
        self.ordered = any(is_ordered(weight) for weight in held)

    def shape_refusal(self, rows: int, columns: int) -> str:
        """See `WholeNumbers`: words hold whole numbers of both sides."""
        return f"a shape of {rows} x {columns}; sides are multiples of 32" if rows % 32 or columns % 32 else ""

    def stored(self, name: str, found: Integers, scales: Tensor) -> dict[str, Tensor]:
        """See `WholeNumbers`: numbers from 0 on, along the inputs; zeros, less one, along the outputs."""
        assert self.asked is not None
        bits, middle = self.asked, 2 ** (self.asked - 1)
        if found.zeros is None:
            numbers, zeros = found.numbers + middle, torch.full_like(scales, middle, dtype=torch.int16)
        else:
            numbers, zeros = found.numbers, found.zeros
        if int(zeros.min()) < 1 or int(zeros.max()) > 2**bits:
            raise QuantkitError(f"{name}: zeros from {int(zeros.min())} to {int(zeros.max())} do not fit {bits} bits")
        return {
            f"{name}.qweight": _words(numbers.T, bits),
            f"{name}.qzeros": _words(zeros - 1, bits).T.contiguous(),
            f"{name}.scales": scales.T.contiguous(),
            f"{name}.g_idx": found.group.int(),
        }

    def config(self) -> dict[str, Any]:
        """The model's, with what GPTQ's readers ask for."""
        said = {
            "quant_method": "gptq", "checkpoint_format": "gptq", "bits": self.asked, "group_size": self.group_size,
            "sym": self.symmetric, "desc_act": self.ordered, "damp_percent": 0.01, "true_sequential": True,
        }  # fmt: skip
        return self.packed.config() | {"dtype": str(self.dtype).removeprefix("torch."), "quantization_config": said}


def _words(numbers: Tensor, bits: int) -> Tensor:
    """Numbers [n, m] in words along the first dimension, the lowest bits first: int32 [n * bits / 32, m]."""
    parts = numbers.long().reshape(-1, 32 // bits, numbers.shape[1])
    shifts = torch.arange(0, 32, bits).view(1, -1, 1)
    words = (parts << shifts).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()
