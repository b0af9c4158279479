"""Where a walk over a model takes its weights from: shards, a module at a time, or a model in memory."""

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from quantkit.core.errors import QuantkitError
from quantkit.io.conversion import Origin, read
from quantkit.io.shards import Shards
from quantkit.models.linear import Packed
from quantkit.models.structure import find_blocks


class ModelTensors:
    """A model's tensors in shards, under the model's names.

    Args:
        shards: where they are.
        mapping: see `io.conversion.origins`.

    Attributes:
        mapping: the same.
        change: what becomes of a tensor, given its name, once it is read.
    """

    def __init__(self, shards: Shards, mapping: dict[str, Origin]) -> None:
        self._shards, self.mapping = shards, mapping
        self.change: Callable[[str, Tensor], Tensor] = lambda _name, tensor: tensor

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) in the dtype in which it is stored, and the shape that the model has.

        Raises:
            CheckpointError: a shard cannot be read.
        """
        for name, tensor in read(self._shards, self.mapping, names):
            yield name, self.change(name, tensor)


class ShardedWeights:
    """A WeightSource that reads modules of a model on the meta device from shards and drops them after use.

    Args:
        model: on the meta device.
        tensors: the model's weights.
        dtype: floating-point tensors are cast to it when loaded.
        unused: modules outside the blocks that nothing will run (the head, where it stays dense).
    """

    def __init__(self, model: nn.Module, tensors: ModelTensors, dtype: torch.dtype, unused: set[str]) -> None:
        self._model, self._tensors, self._dtype = model, tensors, dtype
        self._blocks = find_blocks(model)[0] + "."
        self._unused = tuple(f"{name}." for name in unused)

    def _names(self, module_name: str) -> list[str]:
        """The stored tensors of a block, or ("") of everything outside the blocks, but for what is packed by now."""
        if module_name:
            names = [name for name in self._tensors.mapping if name.startswith(f"{module_name}.")]
        else:
            outer = (name for name in self._tensors.mapping if not name.startswith(self._blocks))
            names = [name for name in outer if not name.startswith(self._unused)]
        return [name for name in names if not isinstance(self._model.get_submodule(name.rpartition(".")[0]), Packed)]

    def load(self, name: str, module: nn.Module, device: torch.device) -> None:
        """Reads the tensors of a block, or ("") of everything outside the blocks."""
        for local, tensor in self._tensors.read(self._names(name)):
            value = tensor.to(self._dtype) if tensor.is_floating_point() else tensor
            set_module_tensor_to_device(self._model, local, device, value=value, dtype=value.dtype)
        for buffer_name, buffer in module.named_buffers():
            if name and buffer.device != device and not buffer.is_meta:
                set_module_tensor_to_device(module, buffer_name, device, value=buffer)
        if not name:
            self._model.tie_weights()  # type: ignore[operator]
            _move_outer_buffers(self._model, self._blocks, device)

    def release(self, name: str, module: nn.Module) -> None:
        """Sends the module's stored tensors back to the meta device, packed ones included; computed buffers stay."""
        for child in module.modules() if name else ():
            if isinstance(child, Packed):
                child.to("meta")
        for local in self._names(name):
            set_module_tensor_to_device(self._model, local, "meta")
        if not name:
            self._model.tie_weights()  # type: ignore[operator]
        _return_freed_memory()


def _return_freed_memory() -> None:
    """Gives freed heap pages back to the system; glibc would keep them, and the process would grow block by block."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _move_outer_buffers(model: nn.Module, blocks: str, device: torch.device) -> None:
    """Buffers that are computed rather than stored, such as rotary frequencies."""
    for name, buffer in model.named_buffers():
        if not name.startswith(blocks) and not buffer.is_meta and buffer.device != device:
            set_module_tensor_to_device(model, name, device, value=buffer)


class LoadedWeights:
    """A WeightSource over a model that is in memory: blocks visit the device and go back."""

    def __init__(self, model: nn.Module) -> None:
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise QuantkitError(
                f"the model is spread over {found}; put it on one device, or quantize it from its folder"
            )
        self._home = devices.pop()
        self._model, self._blocks = model, find_blocks(model)[1]

    def load(self, name: str, module: nn.Module, device: torch.device) -> None:
        """Moves a block, or ("") everything outside the blocks, to the device."""
        self._move(name, module, device)

    def release(self, name: str, module: nn.Module) -> None:
        """Moves it back to where the model lives."""
        self._move(name, module, self._home)

    def _move(self, name: str, module: nn.Module, device: torch.device) -> None:
        if name or device == self._home:
            module.to(device)
            return
        inside = {id(child) for child in self._blocks.modules()}
        for child in self._model.modules():
            if id(child) not in inside:
                child._apply(lambda tensor: tensor.to(device), recurse=False)
