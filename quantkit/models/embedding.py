"""QuantizedEmbedding: an input embedding whose rows are unpacked when they are looked up."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.weight import QuantizedWeight
from quantkit.formats.tied import TiedWeight
from quantkit.models.linear import Packed, QuantizedLinear, new_linear, read_only
from quantkit.models.structure import is_lookup

logger = logging.getLogger(__name__)


class QuantizedEmbedding(Packed):
    """rows[token], times a factor where the replaced embedding had one; results are of the model's dtype.

    An embedding that is tied to a head holds no tensors and reads the head's.

    Args:
        weight: the packed weight [tokens, features], a `TiedWeight` if there is a head.
        replaced: the embedding in whose place this one is; it tells the dtype, `padding_idx` and the factor.
        head: whose weight is looked up; None for `weight`.

    Attributes:
        padding_idx: the replaced embedding's; its row is looked up like all others.
        dtype: of the results; follows casts of the model.
    """

    def __init__(self, weight: QuantizedWeight, replaced: nn.Embedding, head: QuantizedLinear | None = None) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.dtype = replaced.padding_idx, replaced.weight.dtype
        scale = getattr(replaced, "embed_scale", None)
        self._cast_scale = isinstance(scale, Tensor)  # Gemma's is rounded to the model's dtype first, BART's is a float
        self._scale = getattr(replaced, "scalar_embed_scale", scale)
        self._head = None if head is None else (head,)  # in a tuple, so that it is no child of this module
        if head is not None:
            head.looked_up = True

    @property
    def head(self) -> QuantizedLinear | None:
        """The layer whose weight this one looks up, or None."""
        return None if self._head is None else self._head[0]

    @property
    def packed(self) -> QuantizedWeight:
        """The weight that is looked up: the head's where there is one."""
        return super().packed if self.head is None else self.head.used

    @property
    def weight(self) -> Tensor:
        """The weight [rows, embedding_dim], for model code that looks at it; see `models.linear.read_only`."""
        return read_only(self.packed.dequantize(self.dtype))

    def forward(self, index: Tensor) -> Tensor:
        """int [...] -> [..., embedding_dim]."""
        weight = self.packed
        device = next(iter(weight.state().values())).device  # a head's may be another than the tokens'
        rows = weight.rows(index.to(device), self.dtype).to(index.device)
        if self._scale is None:
            return rows
        return rows * (torch.tensor(self._scale, dtype=self.dtype) if self._cast_scale else self._scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """Shape and format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.metadata['format']}"


def put(root: nn.Module, name: str, weight: QuantizedWeight) -> Packed:
    """Puts a packed layer in the place of a linear layer or an embedding.

    Args:
        root: the model, or a part of it.
        name: of the layer in `root`. One that is tied comes after the layer that it is tied to, and is that one then
            where both are linear.
        weight: the packed weight.
    """
    replaced = root.get_submodule(name)
    module: Any
    if isinstance(replaced, nn.Embedding) and is_lookup(replaced):
        head = root.get_submodule(weight.layer) if isinstance(weight, TiedWeight) else None
        assert head is None or isinstance(head, QuantizedLinear)
        module = QuantizedEmbedding(weight, replaced, head)
        if not module.packed.by_rows:
            logger.warning("%s: %s is unpacked as a whole at every lookup; int_group is not", name, module.packed.label)
    elif isinstance(weight, TiedWeight):
        module = root.get_submodule(weight.layer)
    else:
        module = new_linear(weight, replaced)
    root.set_submodule(name, module)
    assert isinstance(module, Packed)
    return module
