"""compressed-tensors' "pack-quantized", which vLLM, llm-compressor and transformers read."""

import json
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantkit.core.errors import QuantkitError
from quantkit.core.weight import QuantizedWeight
from quantkit.exchange.integers import Integers, grid, is_ordered, number_bits
from quantkit.exchange.packed import DENSE, PackedFolder
from quantkit.exchange.whole_numbers import WholeNumbers
from quantkit.kernels.int_group_layout import STORED
from quantkit.models.experts import place

_EXPERTS = r"re:.*\.experts\.\d+\..*"
"""Of a scheme, which layers have it: transformers knows experts' scheme by such a pattern."""


class CompressedTensors(WholeNumbers):
    """Numbers of 4 or 8 bits, for which vLLM has kernels, or of any other width that is asked for."""

    name: ClassVar[str] = "compressed-tensors"
    carriers = tuple(range(2, 9))
    fast = (4, 8)
    experts: ClassVar[bool] = True

    def __init__(self, packed: PackedFolder, dtype: torch.dtype | None = None, carrier: int | None = None) -> None:
        if find_spec("compressed_tensors") is None:
            raise QuantkitError("the package compressed-tensors is missing: pip install compressed-tensors")
        super().__init__(packed, dtype, carrier)
        self.check_experts(self._sort)
        of_experts = {self._sort(weight): name for name, weight in self._held() if place(name) is not None}
        if len(of_experts) > 1:
            raise QuantkitError(
                f"{' and '.join([*of_experts.values()][:2])} are packed in two ways, and readers of {self.name} have "
                f"one scheme for all experts; give them one width and size of groups, or {DENSE}"
            )

    def refusal(self, name: str, weight: QuantizedWeight) -> str:
        """See `WholeNumbers`; groups by activation order, which it once had, it has no more."""
        own = grid(weight)
        if place(name) is not None and own is not None and own.zero == STORED:
            return f"experts with zeros, for which its readers have no code; a symmetric grid goes, and {DENSE}"
        if is_ordered(weight):
            return f"groups of inputs that lie apart; `--to gptq` has them, and {DENSE}"
        return super().refusal(name, weight)

    def carrier(self, bits: int) -> int:
        """See `WholeNumbers`."""
        return self.asked or min(width for width in self.fast if width >= bits)

    def stored(self, name: str, found: Integers, scales: Tensor) -> dict[str, Tensor]:
        """See `WholeNumbers`: signed numbers, so that of those with zeros both are shifted."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        bits = self.carrier(found.bits)
        shift = 0 if found.zeros is None else 2 ** (bits - 1)
        tensors = {
            f"{name}.weight_packed": pack_to_int32((found.numbers - shift).to(torch.int8), bits),
            f"{name}.weight_scale": scales.contiguous(),
            f"{name}.weight_shape": torch.tensor(found.numbers.shape),
        }
        if found.zeros is not None:
            if int(found.zeros.min()) < 0 or int(found.zeros.max()) >= 2**bits:
                raise QuantkitError(f"{name}: zeros from {int(found.zeros.min())} to {int(found.zeros.max())} do not "
                                    f"fit {bits} bits")  # fmt: skip
            zeros = (found.zeros - shift).to(torch.int8)
            tensors[f"{name}.weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0)
        return tensors

    def _sort(self, weight: QuantizedWeight) -> tuple[int, int, bool]:
        """What layers of one scheme have in common: bits, the size of groups, whether zero is the number 0."""
        own = grid(weight)
        assert own is not None
        group = -1 if own.group_size > own.in_features else own.group_size
        return self.carrier(number_bits(own)), group, own.zero != STORED

    def config(self) -> dict[str, Any]:
        """The model's, with a scheme for each sort of layers; experts have one of their own, as readers look for it."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

        sorts: dict[tuple[bool, int, int, bool], list[str]] = {}
        for name, weight in self._held():
            bits, group, symmetric = self._sort(weight)
            if place(name) is None and group >= weight.shape[1]:
                group = -1
            sorts.setdefault((place(name) is not None, bits, group, symmetric), []).append(name)
        kept = {name for names in sorts.values() for name in names}
        others = [
            name for name, module in self.packed.model.named_modules()
            if _has_matrix(module) and name not in kept
        ]  # fmt: skip
        schemes = {}
        for nth, ((of_experts, bits, group, symmetric), names) in enumerate(sorts.items()):
            grouped = {"strategy": "channel"} if group < 0 else {"strategy": "group", "group_size": group}
            weights = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **grouped)
            targets = [_EXPERTS] if of_experts else ["Linear"] if len(sorts) == 1 else self._named(names)
            schemes[f"group_{nth}"] = QuantizationScheme(targets=targets, weights=weights)
        made = QuantizationConfig(
            config_groups=schemes, format="pack-quantized", quantization_status="compressed", ignore=self._named(others)
        )
        dtype = str(self.dtype).removeprefix("torch.")
        return self.packed.config() | {"dtype": dtype, "quantization_config": json.loads(made.model_dump_json())}

    def _named(self, layers: list[str]) -> list[str]:
        """Layers as readers may call them: as transformers' modules, and as the files have them."""
        places = self.packed.places
        apart = {layer: [name for name, _ in places.get(layer, [])] for layer in layers}
        ours = [layer for layer in layers if place(layer) is None]
        return list(dict.fromkeys([*ours, *(name for names in apart.values() for name in names)]))


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module has a matrix to multiply by: routers, which are of classes of their own, have."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)
