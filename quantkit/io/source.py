"""A full-precision model as runs need it: in memory, or on disk, its tensors read a block at a time."""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from quantkit.core.errors import QuantkitError, first_line
from quantkit.core.remote import REMOTE
from quantkit.io.beside import files_beside, readme_of
from quantkit.io.checkpoint import ADAPTER, MERGE, is_packed, packed_layers, read_config
from quantkit.io.classes import meta_model
from quantkit.io.conversion import Origin, origins, others
from quantkit.io.hf import load
from quantkit.io.registration import QuantkitConfig, QuantkitHfQuantizer
from quantkit.io.shards import Shards
from quantkit.io.stored_forms import Dequantized, quantization_of, without_quantization
from quantkit.io.weights import LoadedWeights, ModelTensors, ShardedWeights
from quantkit.models.experts import put_together, take_apart
from quantkit.models.forward import WeightSource
from quantkit.models.linear import Packed
from quantkit.models.plan import Plan, tied
from quantkit.models.rotation import Rotation, find_structure, rotate_model
from quantkit.models.structure import block_linears, find_blocks, outer_linears, refuse_rescaled
from quantkit.models.ties import belongs, inner_ties, tied_names, untie

logger = logging.getLogger(__name__)

_ADAPTER_PART = re.compile("base_layer|lora_[AB]|lora_embedding_[AB]")
"""Of the names of what peft puts into a model."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies beside a model.

    Raises:
        QuantkitError: there is none that loads.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=REMOTE.get())
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


def refuse_adapters(model: str, names: Iterable[str]) -> None:
    """Raises QuantkitError where adapters sit on a model's layers, by the names of its modules or tensors.

    Args:
        model: what to call it.
        names: peft has the adapted layer as `<layer>.base_layer`, and most of what it adds as `lora_A`, `lora_B`.
    """
    for name in names:
        if any(map(_ADAPTER_PART.fullmatch, name.split("."))):
            raise QuantkitError(f"{model} has an adapter that is not merged ({name}); {MERGE}")


class Source(ABC):
    """A full-precision model that is about to be quantized.

    Args:
        model: a causal language model; on the meta device where its weights are read when needed.
        name: of the model, for reports.
        config: JSON of its config.json.

    Attributes:
        model, name, config: the same.
        notes: what is to be said of the files.
        prefix, blocks: of its decoder blocks; see `models.structure.find_blocks`.

    Raises:
        QuantkitError: it is quantized already, has adapters, or no decoder blocks.
    """

    def __init__(self, model: PreTrainedModel, name: str, config: dict[str, Any]) -> None:
        refuse_quantized(config)
        refuse_adapters(name, (module for module, _ in model.named_modules()))
        refuse_rescaled(model)
        take_apart(model)
        self.model, self.name, self.config = model, name, config
        self.notes: tuple[str, ...] = ()
        self.prefix, self.blocks = find_blocks(model)
        self._ties = len(tied_names(model))

    @property
    def untied(self) -> bool:
        """Whether a tie of head and embedding was ended, be it that they are packed as one weight."""
        return len(tied_names(self.model)) < self._ties

    def dense(self, index: int, packed: set[str]) -> dict[str, Tensor]:
        """Tensors of a block as they will be stored, but for the weights of packed layers.

        Args:
            index: of the block; -1 for all that is outside the blocks, and what belongs to no part of the model.
            packed: names of the packed layers.

        Returns:
            Tensors by the model's names, in its own shapes [...] and the stored dtypes.

        Raises:
            CheckpointError: a shard cannot be read.
        """
        blocks = tuple(f"{self.prefix}.{block}." for block in range(len(self.blocks)))
        inside = blocks if index < 0 else blocks[index]
        here = [name for name in self._stored() if name.startswith(inside) == (index >= 0)]
        return dict(self._read([name for name in here if not belongs(name, packed)]))

    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(self._stored().values())

    def packed_nbytes(self, layers: Iterable[str]) -> int:
        """Bytes that the stored weights of these layers take now."""
        packed = set(layers)
        return sum(nbytes for name, nbytes in self._stored().items() if belongs(name, packed))

    def check_finite(self) -> None:
        """Reads all tensors once, before any work is done on them.

        Raises:
            QuantkitError: one holds NaN or Inf; the message says which, and how many.
        """
        for name, tensor in self._read(list(self._stored())):
            if tensor.is_floating_point():
                tensor = tensor.half() if tensor.element_size() == 1 else tensor  # there is no such test of fp8
                wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
                if wrong:
                    raise QuantkitError(
                        f"{name} holds NaN or Inf in {wrong:,} of {tensor.numel():,} places; the checkpoint is damaged"
                    )

    def linears(self) -> list[torch.nn.Module]:
        """All linear layers in the decoder blocks."""
        return list(block_linears(self.model).values())

    def block_nbytes(self, itemsize: int) -> int:
        """Bytes of the largest block with `itemsize` bytes a number."""
        return max(sum(p.numel() for p in block.parameters()) for block in self.blocks) * itemsize

    @abstractmethod
    def settle(self, plan: Plan) -> None:
        """Brings the model into the form in which the plan packs it.

        Ties of planned layers end (`models.ties.untie`); experts of which no layer is planned are put together again.
        """

    @abstractmethod
    def rotate(self, rotation: Rotation) -> None:
        """Rotates the model: its tensors are rotated ones from now on. A tied head gets a weight of its own.

        Raises:
            QuantkitError: the model has another shape.
        """

    @abstractmethod
    def weights(self, plan: Plan, head: bool = False) -> WeightSource:
        """The walker's source of weights; with those of the head, be it packed or not, if asked for."""

    @abstractmethod
    def unpacked(self, plan: Plan) -> Callable[[], "Source"]:
        """What gives the model back as it is now, to be called when a walk has packed the planned layers.

        That may read the model's folder again, and raises QuantkitError as `open_folder` does.
        """

    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            QuantkitError: there is none.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Hashes by which another model is known."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """What lies beside a model's weights, by name.

        Raises:
            QuantkitError: a file cannot be read.
        """

    def readme(self) -> str:
        """The model's card, the README.md beside it; "" where there is none."""
        return ""

    @abstractmethod
    def in_memory(self, device: torch.device) -> PreTrainedModel:
        """The model with all its weights, on `device` if they have to be read; nothing is to walk over it then."""

    @contextmanager
    def walked(self) -> Iterator[None]:
        """The time in which layers are packed."""
        yield

    @abstractmethod
    def _stored(self) -> dict[str, int]:
        """The bytes of all stored tensors, by name."""

    @abstractmethod
    def _read(self, names: list[str]) -> Iterable[tuple[str, Tensor]]:
        """Stored tensors by name."""


class Loaded(Source):
    """A model in memory, which is packed in place.

    Args:
        model: on one device.
        tokenizer: None where nothing reads text.
        folder: that the model was loaded from because its files hold some tensors in another form than the model, and
            that everything else is copied from; None for a model that the user loaded.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None, folder: Path | None = None) -> None:
        name = folder.name if folder else getattr(model.config, "_name_or_path", "") or type(model).__name__
        super().__init__(model, name, read_config(folder) if folder else model.config.to_dict())
        self._tokenizer, self._folder = tokenizer, folder

    def settle(self, plan: Plan) -> None:
        """See `Source`."""
        put_together(self.model, plan)
        untie(self.model, plan, tied(plan))

    def rotate(self, rotation: Rotation) -> None:
        """See `Source`."""
        if self.model.device.type == "meta":
            untie(self.model, {find_structure(self.model, rotation).head})
        else:
            rotate_model(self.model, rotation.seed)

    def weights(self, plan: Plan, head: bool = False) -> WeightSource:
        """See `Source`."""
        return LoadedWeights(self.model)

    def unpacked(self, plan: Plan) -> Callable[[], Source]:
        """See `Source`."""
        home, originals = self.model.device, {name: self.model.get_submodule(name) for name in plan}

        def again() -> Source:
            for layer, module in originals.items():
                self.model.set_submodule(layer, module.to(home))
            return self

        return again

    def tokenizer(self) -> Any:
        """See `Source`."""
        if self._tokenizer is None and self._folder is None:
            raise QuantkitError("this run reads calibration text and needs the model's tokenizer; RTN works without")
        return load_tokenizer(self._folder) if self._folder is not None else self._tokenizer

    def fingerprint(self) -> dict[str, str]:
        """Of the files that the model was loaded from; a user's model is known to nobody else."""
        return Shards(self._folder).fingerprint() if self._folder is not None else {}

    def files(self) -> dict[str, bytes]:
        """See `Source`."""
        return files_beside(self._folder) if self._folder is not None else {}

    def readme(self) -> str:
        """See `Source`."""
        return "" if self._folder is None else readme_of(self._folder)

    def in_memory(self, device: torch.device) -> PreTrainedModel:
        """See `Source`."""
        return self.model

    @contextmanager
    def walked(self) -> Iterator[None]:
        """Puts the model into evaluation mode meanwhile.

        Raises:
            QuantkitError: what was raised meanwhile, with a word on where it leaves a user's model.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        except QuantkitError as error:
            if self._folder is None and any(isinstance(module, Packed) for module in self.model.modules()):
                error.args = (f"{error}; the model in memory is partly packed now: load it anew",)
            raise
        finally:
            self.model.train(was_training)

    def _stored(self) -> dict[str, int]:
        shared = tied_names(self.model)
        return {name: tensor.nbytes for name, tensor in self.model.state_dict().items() if name not in shared}

    def _read(self, names: list[str]) -> Iterable[tuple[str, Tensor]]:
        state = self.model.state_dict()
        return ((name, state[name].contiguous()) for name in names)


class Sharded(Source):
    """A model on disk; no more than a block of it is in memory.

    Args:
        folder: holds config.json and safetensors.
        model: its structure, on the meta device, in the dtype of the computation.
        shards: of the folder.
        mapping: where the model's tensors are in them.
        structure_only: never read weights; names, shapes and sizes are all that is wanted.

    Attributes:
        shards: the same.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        shards: Shards,
        mapping: dict[str, Origin],
        structure_only: bool = False,
    ) -> None:
        super().__init__(model, folder.name, without_quantization(read_config(folder)))
        if isinstance(shards, Dequantized):
            self.notes = (
                f"the files hold the model as {shards.form}, from which it is read; sizes are in its own dtype",
            )
        self._folder, self.shards, self._structure_only = folder, shards, structure_only
        self._tensors = ModelTensors(shards, mapping)
        self._rotation: Rotation | None = None
        self._others = others(model, shards, mapping)
        if self._others:
            words = "%d stored tensors belong to no part of the model, %s among them, and go along as they are"
            logger.info(words, len(self._others), self._others[0])

    def origin(self, name: str) -> Origin | None:
        """Where a tensor of the model is stored; None for one that another is tied to."""
        return self._tensors.mapping.get(name)

    def settle(self, plan: Plan) -> None:
        """See `Source`."""
        mapping = self._tensors.mapping
        for stack, names in put_together(self.model, plan).items():
            own = [mapping.pop(name) for name in names]
            mapping[stack] = Origin(own[0].group, own[0].name, None, sum(part.nbytes for part in own))
        untie(self.model, plan, tied(plan), mapping)

    def rotate(self, rotation: Rotation) -> None:
        """See `Source`."""
        self._rotation = rotation
        structure = find_structure(self.model, rotation)
        untie(self.model, {structure.head}, mapping=self._tensors.mapping)
        if not self._structure_only:
            gains = structure.gains(self._tensors.read)
            self._tensors.change = lambda name, tensor: structure.rotated(name, tensor, gains)

    def weights(self, plan: Plan, head: bool = False) -> WeightSource:
        """See `Source`."""
        last = self.model.get_output_embeddings()  # other layers outside the blocks may run in front of them
        outer = () if head else outer_linears(self.model).items()
        unused = {name for name, layer in outer if layer is last and name not in plan}
        return ShardedWeights(self.model, self._tensors, self.model.dtype, unused)

    def unpacked(self, plan: Plan) -> Callable[[], Source]:
        """See `Source`."""

        def again() -> Source:
            source = open_folder(self._folder, self.model.dtype)
            if self._rotation is not None:
                source.rotate(self._rotation)
            source.settle(plan)
            return source

        return again

    def tokenizer(self) -> Any:
        """See `Source`."""
        return load_tokenizer(self._folder)

    def fingerprint(self) -> dict[str, str]:
        """Of the files."""
        return self.shards.fingerprint()

    def files(self) -> dict[str, bytes]:
        """See `Source`."""
        return files_beside(self._folder)

    def readme(self) -> str:
        """See `Source`."""
        return readme_of(self._folder)

    def in_memory(self, device: torch.device) -> PreTrainedModel:
        """See `Source`."""
        weights = ShardedWeights(self.model, self._tensors, self.model.dtype, set())
        weights.load("", self.model, device)
        for index, block in enumerate(self.blocks):
            weights.load(f"{self.prefix}.{index}", block, device)
        return self.model

    def _stored(self) -> dict[str, int]:
        apart = {name: self.shards.tensor_nbytes(name) for name in self._others}
        shared = inner_ties(self.model, self.prefix)
        own = {name: origin.nbytes for name, origin in self._tensors.mapping.items() if name not in shared}
        return own | apart

    def _read(self, names: list[str]) -> Iterable[tuple[str, Tensor]]:
        apart = set(self._others).intersection(names)
        yield from self._tensors.read([name for name in names if name not in apart])
        yield from self.shards.read(apart)


def open_folder(folder: Path, dtype: torch.dtype | None = None, structure_only: bool = False) -> Source:
    """A model's folder, opened.

    Args:
        folder: holds config.json and safetensors.
        dtype: of the computation; None for the checkpoint's own.
        structure_only: never read weights; names, shapes and sizes are all that is wanted.

    Returns:
        Its structure over the shards, its experts taken apart; or the model itself, in the dtype in which it is stored,
        where the shards hold some tensors in a form that transformers alone brings into the model's.

    Raises:
        QuantkitError: not a loadable causal language model, quantized already, with adapters, or damaged shards.
    """
    config = read_config(folder)
    shards = Shards(folder)
    if quantization_of(config) and not is_packed(config):
        shards = Dequantized(shards, config)
    refuse_quantized(without_quantization(config))
    refuse_adapters(folder.name, shards.specs)
    if (folder / ADAPTER).is_file():  # transformers would put it on the model, and a run would leave it out
        raise QuantkitError(f"{folder} holds an adapter beside the model; {MERGE}")
    model = meta_model(folder, dtype)
    mapping = origins(model, shards)
    if mapping:
        return Sharded(folder, model, shards, mapping, structure_only)
    if isinstance(shards, Dequantized):
        raise QuantkitError(f"{folder} is stored as {shards.form}, and as tensors that do not make this model's")
    if structure_only:
        return Loaded(meta_model(folder, None), folder=folder)
    logger.warning("%s stores tensors in another form than the model; loading all of it at once", folder)
    return Loaded(load(folder).eval(), folder=folder)


def packed_structure(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A packed checkpoint's model, its packed layers in place, on the meta device; reads no weights.

    Args:
        folder: of the checkpoint.
        dtype: of the dense weights; None for the checkpoint's own.

    Raises:
        CheckpointError: no packed checkpoint, or a damaged one.
    """
    layers = packed_layers(folder)
    model = meta_model(folder, dtype)
    QuantkitHfQuantizer(QuantkitConfig(layers))._process_model_before_weight_loading(model)
    return model
