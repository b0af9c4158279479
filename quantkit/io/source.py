"""A model on disk, opened without its weights: structure on the meta device, tensors read when needed."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quantkit.core.errors import QuantkitError, first_line
from quantkit.io.checkpoint import read_config
from quantkit.io.hf import load
from quantkit.io.shards import Shards
from quantkit.io.weights import LoadedWeights, ModelTensors, ShardedWeights, match_names
from quantkit.models.forward import WeightSource
from quantkit.models.plan import Plan, tied
from quantkit.models.rotation import Rotation, find_structure, rotate_model
from quantkit.models.structure import block_linears, find_blocks, outer_linears
from quantkit.models.ties import belongs, tied_names, untie

logger = logging.getLogger(__name__)


def resolve_folder(model: str | Path) -> Path:
    """The folder of a model given as a folder or as an id on the hub (which is then fetched).

    Raises:
        QuantkitError: no such folder, or the hub cannot deliver.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    text = str(model)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise QuantkitError(f"{text} is not a folder; give a model folder or a hub id such as Qwen/Qwen2-0.5B")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub raises its own, requests' and OS errors
        raise QuantkitError(
            f"{text!r} is neither a folder here nor a model that the hub delivers ({first_line(error)})"
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies beside a model.

    Raises:
        QuantkitError: there is none that loads.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise QuantkitError(
            f"{folder} holds no tokenizer that loads ({first_line(error)}); put its tokenizer files there"
        ) from error


def refuse_quantized(config: Any) -> None:
    """Raises QuantkitError where a model's config says that it is quantized already."""
    found = (
        config.get("quantization_config") if isinstance(config, dict) else getattr(config, "quantization_config", None)
    )
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", "?")
        raise QuantkitError(f"the model is quantized already (quant_method {method}); give the full-precision one")


class ModelFolder:
    """A full-precision model's folder as the walker and the writer need it.

    Args:
        folder: holds config.json and safetensors.
        dtype: of the computation; None for the checkpoint's own.
        structure_only: never read weights; names, shapes and sizes are all that is wanted.

    Attributes:
        model: the causal language model; on the meta device unless `whole`.
        whole: the shards store some tensors in another form than the model (fused experts, say), so transformers
            had to load all of it at once, in its own dtype.

    Raises:
        QuantkitError: not a loadable causal language model, quantized already, or damaged shards.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, structure_only: bool = False) -> None:
        self.folder = folder
        self.config = read_config(folder)
        refuse_quantized(self.config)
        self.shards = Shards(folder)
        self.model: PreTrainedModel = _meta_model(folder, dtype)
        self.prefix, self.blocks = find_blocks(self.model)
        self._mapping = match_names(self.model, self.shards) or {}
        self._tensors = ModelTensors(self.shards, self._mapping)
        self.whole, self._structure_only = not self._mapping, structure_only
        unused = sorted(set(self.shards.specs) - set(self._mapping.values()))
        if unused and not self.whole:
            logger.info("%d stored tensors belong to no part of the model, %s among them", len(unused), unused[0])
        if self.whole and structure_only:
            self.model = _meta_model(folder, None)  # in the type in which it would be loaded and stored
            self.prefix, self.blocks = find_blocks(self.model)
        elif self.whole:
            logger.warning("%s stores tensors in another form than the model; loading all of it at once", folder)
            self.model = load(folder).eval()
            self.prefix, self.blocks = find_blocks(self.model)
        self._ties = len(tied_names(self.model))

    @property
    def untied(self) -> bool:
        """Whether a tie of head and embedding was ended, be it that they are packed as one weight."""
        return len(tied_names(self.model)) < self._ties

    def untie(self, plan: Plan) -> None:
        """Ends the ties of planned layers; see `io.shards.untie`."""
        untie(self.model, plan, tied(plan), self._mapping)

    def rotate(self, rotation: Rotation) -> None:
        """Turns the model: its tensors are turned ones from now on. A tied head gets a weight of its own.

        Raises:
            QuantkitError: the model has another shape.
        """
        if self.whole and not self._structure_only:
            rotate_model(self.model, rotation.seed)
            return
        structure = find_structure(self.model, rotation)
        untie(self.model, {structure.head}, mapping=self._mapping)
        if not self._structure_only:
            gains = structure.gains(self._tensors.read)
            self._tensors.change = lambda name, tensor: structure.rotated(name, tensor, gains)

    def source(self, plan: Plan) -> WeightSource:
        """The walker's source of weights."""
        if self.whole:
            return LoadedWeights(self.model)
        head = self.model.get_output_embeddings()  # other layers outside the blocks may run in front of them
        unused = {name for name, layer in outer_linears(self.model).items() if layer is head and name not in plan}
        return ShardedWeights(self.model, self._tensors, self.model.dtype, unused)

    def dense(self, index: int, packed: set[str]) -> dict[str, Tensor]:
        """Tensors of a block (-1: of all else) as stored, or turned, but for the weights of packed layers."""
        names = [name for name in self._stored_names() if self._is_in(name, index) and not belongs(name, packed)]
        if self.whole:
            state = self.model.state_dict()
            return {name: state[name].contiguous() for name in names}
        return dict(self._tensors.read(names))

    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(self._tensor_bytes(name) for name in self._stored_names())

    def packed_nbytes(self, layers: Iterable[str]) -> int:
        """Bytes that the stored weights of these layers take now."""
        packed = set(layers)
        return sum(self._tensor_bytes(name) for name in self._stored_names() if belongs(name, packed))

    def linears(self) -> list[torch.nn.Module]:
        """All linear layers in the decoder blocks."""
        return list(block_linears(self.model).values())

    def block_nbytes(self, itemsize: int) -> int:
        """Bytes of the largest block with `itemsize` bytes a number."""
        return max(sum(p.numel() for p in block.parameters()) for block in self.blocks) * itemsize

    def _stored_names(self) -> list[str]:
        if not self.whole:
            return list(self._mapping)
        tied = tied_names(self.model)
        return [name for name in self.model.state_dict() if name not in tied]

    def _is_in(self, name: str, index: int) -> bool:
        return name.startswith(f"{self.prefix}.{index}.") if index >= 0 else not name.startswith(f"{self.prefix}.")

    def _tensor_bytes(self, name: str) -> int:
        if self.whole:
            tensor = self.model.state_dict()[name]
            return tensor.numel() * tensor.element_size()
        return self.shards.tensor_nbytes(self._mapping[name])


def _meta_model(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(folder)
        kept = dtype or getattr(config, "dtype", None) or torch.float32
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=kept)
    except Exception as error:  # transformers and huggingface_hub raise many kinds on a bad config
        raise QuantkitError(
            f"{folder} is not a causal language model that transformers knows ({first_line(error)})"
        ) from error
    model.tie_weights()
    return model.eval()
