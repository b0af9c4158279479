"""What vLLM asks about a packed checkpoint: which of its layers are packed, and how each is made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

from quantkit.core.constants import METHOD
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.core.schema import in_words
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.tied import TiedWeight
from quantkit.io.checkpoint import check_version, packed_layers
from quantkit.models.experts import place
from quantkit.models.unpacking import MEMORY_FRACTION, slowdown
from quantkit.serve.stored import Stored
from quantkit.serve.vllm.experts import PackedExperts
from quantkit.serve.vllm.linear import PackedLinear
from quantkit.serve.vllm.vocabulary import PackedVocabulary, hand_over

_DRAFT = "draft_model."
"""What vLLM puts before the names of all layers of a model that drafts for another."""
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""Layers that vLLM fuses under these names even where its model class does not say so."""


HEADS = {"lm_head", "embed_out", "output", "head"}
"""What output heads are called in checkpoints."""


class QuantkitConfig(QuantizationConfig):
    """The packed layers of a checkpoint, by name.

    Args:
        layers: their metadata.

    Attributes:
        heads: vLLM's packed output heads by name.
        tied: names of embeddings, and of the heads whose rows they look up.
        unpack: on a CPU, whether layers become dense: None for those that are faster so, as far as memory allows.
        ranks: processes that share the machine's memory.
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        super().__init__()
        hand_over()
        self.layers = dict(layers)
        self.heads: dict[str, nn.Module] = {}
        self.tied: dict[str, str] = {}
        self.unpack: bool | None = None
        self.ranks = 1
        self._budget: float | None = None

    def get_name(self) -> str:
        """The quant_method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those that the kernels take."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU that vLLM runs on; those older than sm_80 run torch's operations."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json has it all."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QuantkitConfig":
        """Of config.json's quantization_config.

        Raises:
            CheckpointError: of another version, or without layers.
        """
        return cls(check_version(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Holds a folder's files against its config.json, before anything is read of them.

        Raises:
            CheckpointError: they differ.
        """
        if Path(model_name).is_dir():
            packed_layers(Path(model_name))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Renames layers as vLLM's model class names its modules."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        for name, metadata in self.layers.items():
            if metadata.get("format") == TiedWeight.format:
                self.layers[name] = {**metadata, "layer": hf_to_vllm_mapper.map_name(metadata["layer"])}

    def get_checkpoint_weight_mapper(self) -> Any:
        """Tensors that vLLM is to load under other names: a head's, where the embedding serves as the head too."""
        from vllm.model_executor.models.utils import WeightsMapper  # too much for a plugin that is being registered

        alone = {head: embedding for embedding, head in self.tied.items() if head not in self.heads}
        return WeightsMapper(orig_to_new_prefix={f"{head}.": f"{name}." for head, name in alone.items()})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer of vLLM's is made; None for what it makes by itself.

        Raises:
            CheckpointError: an embedding or a head cannot be told from another one.
            QuantkitError: `--additional-config` says of quantkit what it does not know.
        """
        prefix = prefix.removeprefix(_DRAFT)
        vllm = get_current_vllm_config()
        self.ranks, self.unpack = vllm.parallel_config.world_size, _unpack(vllm.additional_config)
        if isinstance(layer, RoutedExperts):
            own = {name: meta for name, meta in self.layers.items() if name.startswith(f"{prefix}.") and place(name)}
            return PackedExperts(self, layer.moe_config, prefix, own) if own else None
        if isinstance(layer, LinearBase):
            stored = self.stored(prefix)
            packed = any(one.metadata is not None for one in stored)
            return PackedLinear(self, stored) if packed else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            name = prefix if prefix else self._nameless(layer)
            return PackedVocabulary(self, name) if name in self.layers else None
        return None

    def stored(self, prefix: str) -> list[Stored]:
        """The layers of the checkpoint that a linear layer of vLLM's is made of."""
        parent, _, last = prefix.rpartition(".")
        names = [prefix]
        if prefix not in self.layers:
            parts = self.packed_modules_mapping.get(last) or FUSED.get(last, [last])
            names = [f"{parent}.{part}" if parent else part for part in parts]
        return [Stored(name, self.layers.get(name)) for name in names]

    def _nameless(self, layer: Any) -> str | None:
        """The packed embedding or head that a layer is whose name vLLM's model class does not tell, by its shape."""
        outside = {
            name: QuantizedWeight.empty(meta) for name, meta in self.layers.items()
            if not any(part.isdigit() for part in name.split("."))
        }  # fmt: skip
        heads = {weight.layer for weight in outside.values() if isinstance(weight, TiedWeight)}
        heads |= {name for name in outside if name.rpartition(".")[2] in HEADS}
        shape, is_head = (layer.org_vocab_size, layer.embedding_dim), isinstance(layer, ParallelLMHead)
        found = [name for name, weight in outside.items() if weight.shape == shape and (name in heads) == is_head]
        if len(found) > 1:
            raise CheckpointError(f"which of {', '.join(found)} is it that vLLM's model class makes without a name?")
        return found[0] if found else None

    def unpacks(self, weights: list[QuantizedWeight], dtype: torch.dtype) -> bool:
        """Whether a layer becomes a dense one: on a CPU, where it is faster so, as far as memory allows."""
        if not current_platform.is_cpu() or self.unpack is False:
            return False
        sizes = [weight.shape[0] * weight.shape[1] for weight in weights]
        slow = sum(slowdown(weight) * size for weight, size in zip(weights, sizes, strict=True)) / sum(sizes)
        if self._budget is None:
            self._budget = MEMORY_FRACTION * psutil.virtual_memory().available / self.ranks
        needed = sum(sizes) * dtype.itemsize
        if not self.unpack and (slow <= 1 or needed > self._budget):
            return False
        self._budget -= needed
        return True


def _unpack(additional: Any) -> bool | None:
    """What vLLM's `--additional-config` says of `unpack`."""
    own = additional.get("quantkit", {}) if isinstance(additional, dict) else {}
    if not isinstance(own, dict) or own.keys() - {"unpack"} or own.get("unpack") not in (None, True, False):
        raise QuantkitError(
            f'--additional-config has {in_words(own)} for quantkit; it takes {{"unpack": true}} or false'
        )
    return own.get("unpack")
