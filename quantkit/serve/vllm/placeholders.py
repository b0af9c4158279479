"""Parameters without numbers under the names of a checkpoint's tensors, whose loaders hand on what vLLM reads."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantkit.core.errors import QuantkitError
from quantkit.serve.stored import Stored

QKV = {"q": 0, "k": 1, "v": 2}
"""What vLLM calls the parts of a fused attention layer."""


def put(module: nn.Module, stored: Sequence[Stored], dtype: torch.dtype) -> None:
    """Gives a module a parameter for each tensor of its layers; those of nested weights lie in child modules.

    Args:
        module: vLLM's layer.
        stored: the layers of the checkpoint that it is made of, in the order of vLLM's shard ids.
        dtype: that of dense ones.
    """
    for key, kind in {key: kind for one in stored for key, kind in one.wanted(dtype).items()}.items():
        *path, leaf = key.split(".")
        holder = module
        for name in path:
            if name not in holder._modules:
                holder.add_module(name, nn.Module())
            holder = holder.get_submodule(name)
        parameter = nn.Parameter(torch.empty(0, dtype=kind), requires_grad=False)
        parameter.weight_loader = _Loader(stored, key)  # type: ignore[attr-defined]
        holder.register_parameter(leaf, parameter)


class _Loader:
    """What vLLM calls with a tensor that it has read.

    Args:
        stored: the layers that the tensor may be of.
        key: its local name.
    """

    def __init__(self, stored: Sequence[Stored], key: str) -> None:
        self.stored, self.key = stored, key

    def __call__(self, parameter: nn.Parameter, loaded: Tensor, shard_id: int | str | None = None) -> None:
        index = QKV.get(shard_id, -1) if isinstance(shard_id, str) else shard_id or 0
        if not isinstance(index, int) or not 0 <= index < len(self.stored):
            names = ", ".join(one.name for one in self.stored)
            raise QuantkitError(f"vLLM has a part {shard_id!r} of {names}, which quantkit does not know")
        self.stored[index].found[self.key] = loaded


def remove(module: nn.Module, stored: Sequence[Stored], dtype: torch.dtype) -> None:
    """Takes back what `put` put there."""
    for key in {key for one in stored for key in one.wanted(dtype)}:
        first, _, rest = key.partition(".")
        (module._modules if rest else module._parameters).pop(first, None)
