"""QuantizedLinear: a linear layer that keeps its weight packed."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantkit.core.errors import QuantkitError
from quantkit.core.weight import QuantizedWeight


class Outputs(Protocol):
    """A launch that computes several layers' outputs at once; see `quantkit.fuse`."""

    weight: QuantizedWeight

    def output(self, slot: int, x: Tensor) -> Tensor:
        """The output [..., out_features] of the layer with this slot for x [..., in_features]."""

    def left(self) -> None:
        """A layer has its tensors for itself again."""


class _Payload(nn.Module):
    """A quantized weight's tensors as buffers, nested weights as child modules of the same names."""

    def __init__(self, weight: QuantizedWeight) -> None:
        nn.Module.__init__(self)  # of subclasses that are nn.Linear too, not theirs, which would make a weight
        self._fill(weight)

    def _fill(self, weight: QuantizedWeight) -> None:
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        for name, inner in weight.nested().items():
            self.add_module(name, _Payload(inner))

    def _forget(self) -> None:
        """Drops what was derived from the tensors, so that it does not keep them alive where they were."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # A cast of the model must not touch the payload, whose dtypes belong to the format; a move may.
        self._forget()
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        originals = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            moved, original = self._buffers[name], originals[name]
            if moved is not None and original is not None and moved.dtype != dtype:
                self._buffers[name] = original.to(moved.device)
        return self


class Packed(_Payload):
    """A module with a packed weight; buffers carry the checkpoint's local tensor names.

    Args:
        weight: the packed weight.

    Attributes:
        metadata: of the weight that a checkpoint has under this module's name.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__(weight)
        self.metadata = weight.metadata()
        self._prepared: dict[str, Any] | None = None  # the metadata of what the buffers hold, where it is not as stored
        self._cached: QuantizedWeight | None = None
        self._watched: list[tuple[dict[str, Tensor | None], str, Tensor]] = []

    @property
    def packed(self) -> QuantizedWeight:
        """The weight as a checkpoint has it, made of this module's present buffers."""
        return self.used.stored() if self._prepared else self.used

    @property
    def used(self) -> QuantizedWeight:
        """The weight as products take it, which may be in another form (`prepared`); its tensors are the buffers."""
        weight = self._cached
        if weight is not None:
            for buffers, name, tensor in self._watched:
                if buffers.get(name) is not tensor:  # loaders replace them
                    break
            else:
                return weight
        state = {name: buffer for name, buffer in self.named_buffers()}
        weight = QuantizedWeight.from_state(self._prepared or self.metadata, state)
        self._cached, self._watched = weight, list(_places(weight, self))
        return weight

    def _hold(self, weight: QuantizedWeight) -> None:
        """Puts a weight's tensors in the places of the buffers."""
        metadata = weight.metadata()
        self._prepared = None if metadata == self.metadata else metadata
        _replace(self, weight)
        self._cached, self._watched = None, []

    def become(self, weight: QuantizedWeight) -> None:
        """Takes another packed weight, of any format.

        Args:
            weight: of the same shape, on the same device.
        """
        self._forget()
        self._buffers.clear()
        self._modules.clear()
        self._fill(weight)
        self.metadata, self._prepared = weight.metadata(), None
        self._cached, self._watched = None, []

    def _forget(self) -> None:
        if self._prepared:
            self._hold(self.packed)
        self._cached, self._watched = None, []

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """A module's, with the checkpoint's tensors."""
        if not self._prepared:
            return super().state_dict(*args, **kwargs)
        used = self.used
        self._hold(used.stored())
        try:
            return super().state_dict(*args, **kwargs)
        finally:
            self._hold(used)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()  # what was derived from the tensors, whose values change
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files hold nothing that follows from the buffers."""
        return self.__dict__ | {"_cached": None, "_watched": []}


class QuantizedLinear(Packed, nn.Linear):
    """y = x W^T + b with W in packed form.

    It is an nn.Linear to those who ask, as libraries that put adapters on linear layers do (peft; `models.lora` merges
    them). Its `weight` is a copy that refuses to be written to.

    Args:
        weight: the packed weight.
        bias: [out_features] or None, added in the activations' dtype.

    Attributes:
        unpacked: whether the first product on a CPU unpacks the weight for all that follow; see `models.unpacking`.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._held: Tensor | None = None
        self._is_hf_initialized = True  # transformers must not draw it anew, nor unpack it to find that out
        self.unpacked = False
        self._stamp: list[tuple[int, int]] = []  # of the tensors that an unpacked weight was made from
        self.shared: Outputs | None = None
        self._slot = 0
        self.looked_up = False  # whether an embedding reads this weight's rows

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, fp32 [out_features, in_features], for model code that looks at it; see `read_only`."""
        return read_only(self.used.dequantize())

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Takes what is there already, as libraries put back what they took out; see `read_only`.

        Args:
            value: fp32 [out_features, in_features].

        Raises:
            QuantkitError: it differs from the weight.
        """
        if not torch.equal(value, self.weight):
            raise QuantkitError(REFUSED)

    @property
    def qweight(self) -> Tensor:
        """One of the packed tensors, of its format's shape and dtype.

        By this name libraries find out where such a layer is, without unpacking it.
        """
        return next(self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype.

        Raises:
            ValueError: x has another last dimension.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x is {tuple(x.shape)}; this layer takes [..., {self.in_features}]")
        if self.shared is not None:
            return self.shared.output(self._slot, x)
        if self.unpacked and x.is_cpu and not torch.compiler.is_compiling():
            self._unpack(x.dtype)
        held, bias = self._held, self.bias
        if held is None:
            return self.used.matmul(x, bias)
        if held.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):  # which casts by itself
            held = held.to(x.dtype)
        return torch.nn.functional.linear(x, held, None if bias is None else bias.to(x.dtype))

    def _unpack(self, dtype: torch.dtype) -> None:
        """Holds the weight as its tensors are now; not while any of them is trained."""
        self.used  # noqa: B018  (looks whether the tensors are still the same, and lists them)
        if torch.is_grad_enabled() and any(tensor.requires_grad for _, _, tensor in self._watched):
            self.release()
            return
        stamp = [(id(t), 0 if t.is_inference() else t._version) for _, _, t in self._watched]
        if self._held is None or stamp != self._stamp:
            with torch.inference_mode(False), torch.no_grad():  # it is kept longer than the caller's mode
                self.hold(dtype)
            self._stamp = stamp

    def share(self, shared: Outputs, slot: int, weight: QuantizedWeight) -> None:
        """Answers with output `slot` of a fused launch from now on; `weight` is this layer's part of its weight."""
        self._hold(weight)
        self.shared, self._slot = shared, slot

    def unshare(self) -> None:
        """Ends `share`: the tensors are this layer's own again."""
        if self.shared is not None:
            self.shared.left()
            self.shared = None
            self._hold(self.used.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format)))

    def settle(self) -> None:
        """Brings the weight into the form that products take where its tensors have come to."""
        if self.shared is None:
            prepared = self.used.prepared()
            if prepared is not self.used:
                self._hold(prepared)
        self.used.prepare()

    def hold(self, dtype: torch.dtype) -> None:
        """Keeps the dequantized weight until the next move or cast: for many large inputs in a row."""
        self._held = self.used.dequantize(dtype)

    def release(self) -> None:
        """Ends `hold`."""
        self._held = None

    def _forget(self) -> None:
        self.unshare()
        self._held = None
        super()._forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.settle()
        return self

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """See `Packed`; of a layer that shares a fused weight, whose tensors are views, copies of its own."""
        found = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.shared is not None:
            own = [name for name in found if name.startswith(prefix) and not isinstance(found[name], nn.Parameter)]
            for name in own:
                found[name] = found[name].clone(memory_format=torch.contiguous_format)
        return found

    def extra_repr(self) -> str:
        """Shape, format and measured bits per weight."""
        form = self.metadata["format"]
        return f"{self.in_features}, {self.out_features}, format={form}, bias={self.bias is not None}"


class _Copy(Tensor):
    """A tensor that raises QuantkitError where it would be changed in place, which nobody would see."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = isinstance(args[0], cls) if args else False
        if (written and _writes(func)) or isinstance(kwargs.get("out"), cls):
            raise QuantkitError(REFUSED)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return result.as_subclass(cls) if func in _ALIASES and isinstance(result, Tensor) else result


REFUSED = (
    "a packed layer's weight is a copy, and a change of it would be lost; LoRA adapters of peft can be merged "
    "(merge_and_unload), other adapters and inits that move the base weight cannot"
)
_DATA: Any = Tensor.data
_ALIASES = {_DATA.__get__, Tensor.detach}
_HARMLESS = {"requires_grad_", "retain_grad", "share_memory_"}


def _writes(func: Any) -> bool:
    """Whether a function of tensors changes its first argument."""
    name: str = func.__name__
    if name.startswith("__"):
        return func == _DATA.__set__ or name == "__setitem__" or (name.startswith("__i") and name in _IN_PLACE)
    return name.endswith("_") and name not in _HARMLESS


_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}


def read_only(weight: Tensor) -> Tensor:
    """A weight [out_features, in_features], unpacked for code that looks at it; to write to it raises QuantkitError."""
    if not torch.compiler.is_compiling():
        weight = weight.as_subclass(_Copy)
    weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers must not draw it anew
    return weight


def _replace(module: nn.Module, weight: QuantizedWeight) -> None:
    """Puts a weight's tensors in the places of a module's buffers."""
    module._buffers.clear()
    module._buffers.update(weight.tensors())
    for name, inner in weight.nested().items():
        _replace(module.get_submodule(name), inner)


def _places(weight: QuantizedWeight, module: nn.Module) -> Iterator[tuple[dict[str, Tensor | None], str, Tensor]]:
    """(buffers of a module, name there, tensor) for each tensor of the weight that the module holds."""
    for name, tensor in weight.tensors().items():
        yield module._buffers, name, tensor
    for name, inner in weight.nested().items():
        yield from _places(inner, module.get_submodule(name))


def new_linear(weight: QuantizedWeight, replaced: nn.Module) -> QuantizedLinear:
    """A QuantizedLinear with `replaced`'s bias."""
    bias = getattr(replaced, "bias", None)
    return QuantizedLinear(weight, bias if isinstance(bias, torch.Tensor) else None)


def put_in_places(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts modules where others are, and wherever else those are, as in blocks that are called at several depths.

    Args:
        model: whose `get_submodule` gives the others.
        modules: by the others' names.
    """
    every = dict(model.named_modules(remove_duplicate=False))
    new = {every[name]: module for name, module in modules.items()}
    for name, module in every.items():
        if module in new:
            model.set_submodule(name, new[module])
