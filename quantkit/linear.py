"""QuantizedLinear: a linear layer that keeps its weight packed."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantkit.weight import QuantizedWeight


class _Payload(nn.Module):
    """A quantized weight's tensors as buffers, nested weights as child modules of the same names."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        for name, inner in weight.nested().items():
            self.add_module(name, _Payload(inner))

    def _forget(self) -> None:
        """Drops what was derived from the tensors, so that it does not keep them alive where they were."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # A cast of the model must not touch the payload, whose dtypes belong to the format; a move may.
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        originals = dict(self._buffers)
        self._forget()
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            moved, original = self._buffers[name], originals[name]
            if moved is not None and original is not None and moved.dtype != dtype:
                self._buffers[name] = original.to(moved.device)
        return self


class QuantizedLinear(_Payload):
    """y = x W^T + b with W in packed form; buffers carry the checkpoint's local tensor names.

    Args:
        weight: the packed weight.
        bias: [out_features] or None, added in the activations' dtype.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._metadata = weight.metadata()
        self._cached: QuantizedWeight | None = None
        self._held: Tensor | None = None

    @property
    def packed(self) -> QuantizedWeight:
        """The weight, made of this module's present buffers."""
        if self._cached is None or not _is_current(self._cached, self):
            state = {name: buffer for name, buffer in self.named_buffers()}
            self._cached = QuantizedWeight.from_state(self._metadata, state)
        return self._cached

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, fp32, for model code that looks at its linears; writing to it changes nothing."""
        weight = self.packed.dequantize()
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers must not draw it anew
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype."""
        y = self.packed.matmul(x) if self._held is None else torch.nn.functional.linear(x, self._held)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def hold(self, dtype: torch.dtype) -> None:
        """Keeps the dequantized weight until the next move or cast: for many large inputs in a row."""
        self._held = self.packed.dequantize(dtype)

    def release(self) -> None:
        """Ends `hold`."""
        self._held = None

    def _forget(self) -> None:
        self._cached = self._held = None

    def extra_repr(self) -> str:
        """Shape, format and measured bits per weight."""
        meta = self._metadata
        return f"{self.in_features}, {self.out_features}, format={meta['format']}, bias={self.bias is not None}"


def _is_current(weight: QuantizedWeight, module: nn.Module) -> bool:
    """Whether `weight` holds the very tensors that are now `module`'s buffers (loaders replace them)."""
    buffers = module._buffers
    return all(buffers[name] is tensor for name, tensor in weight.tensors().items()) and all(
        _is_current(inner, module.get_submodule(name)) for name, inner in weight.nested().items()
    )


def new_linear(weight: QuantizedWeight, replaced: nn.Module) -> QuantizedLinear:
    """A QuantizedLinear with `replaced`'s bias."""
    bias = getattr(replaced, "bias", None)
    return QuantizedLinear(weight, bias if isinstance(bias, torch.Tensor) else None)
