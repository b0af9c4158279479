"""The transformers bridge: packed checkpoints load and save through transformers' own functions.

Importing this module registers quant_method "quantkit". Without that registration transformers only warns
about the unknown method and runs with random weights, so `quantkit.load` is the documented way in.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantkit.checkpoint import METHOD, VERSION, check_tensors, check_version, packed_layers, read_config
from quantkit.embedding import put
from quantkit.errors import CheckpointError, QuantkitError, first_line
from quantkit.formats.tied import TiedWeight
from quantkit.linear import Packed, QuantizedLinear
from quantkit.model import is_linear, is_lookup, linear_weight
from quantkit.shards import Shards, open_shard
from quantkit.weight import QuantizedWeight


@register_quantization_config(METHOD)
class QuantkitConfig(QuantizationConfigMixin):
    """config.json's quantization_config: metadata of every packed layer.

    Args:
        layers: metadata by layer name; see `QuantizedWeight.metadata`.
        version: format version.
    """

    def __init__(self, layers: dict[str, Any] | None = None, version: int = VERSION, **_unknown: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version = version
        self.layers = layers  # None, which no checkpoint has, is refused when a model is loaded


@register_quantizer(METHOD)
class QuantkitHfQuantizer(HfQuantizer):
    """Puts packed modules in place before transformers loads tensors into them."""

    requires_calibration = True
    is_qat_trainable = False
    """Whether transformers' Trainer may train the model without adapters of peft's; `quantkit.finetune` sets it."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_kwargs: Any
    ) -> None:
        config = self.quantization_config
        assert isinstance(config, QuantkitConfig)
        layers = check_version({"version": config.version, "layers": config.layers})
        if checkpoint_files:
            check_tensors(layers, _specs(checkpoint_files))
        weights = {name: QuantizedWeight.empty(metadata) for name, metadata in layers.items()}
        for name, weight in sorted(weights.items(), key=lambda item: isinstance(item[1], TiedWeight)):
            try:
                layer = model.get_submodule(name)
            except AttributeError:
                raise CheckpointError(
                    f"{type(model).__name__} has no layer {name!r} that the checkpoint declares"
                ) from None
            if not (is_linear(layer) or is_lookup(layer)):
                raise CheckpointError(
                    f"{name} is a {type(layer).__name__}, no linear layer or embedding; is this the right model class?"
                )
            if isinstance(weight, TiedWeight):
                head = dict(model.named_modules()).get(weight.layer)
                if not (is_lookup(layer) and isinstance(head, QuantizedLinear)):
                    raise CheckpointError(
                        f"{name} is no embedding that {weight.layer} could serve; config.json is damaged"
                    )
            if is_lookup(layer) and weight.shape != linear_weight(layer).shape:
                raise CheckpointError(
                    f"{name} is {list(linear_weight(layer).shape)} in {type(model).__name__}, and the checkpoint's "
                    f"{list(weight.shape)}; it is damaged, or of another model"
                )
            put(model, name, weight)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_kwargs: Any) -> None:
        for name, module in model.named_modules():
            if isinstance(module, Packed):
                try:
                    module.packed.validate()
                    if isinstance(module, QuantizedLinear):
                        module.settle()
                except ValueError as error:
                    raise CheckpointError(f"{name}: {error}; the checkpoint is damaged") from error

    def is_serializable(self) -> bool:
        """Packed layers save as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters: gradients pass through packed layers, and codes stay."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Kernels are torch.library operators."""
        return True


def attach(model: PreTrainedModel, layers: dict[str, Any], trainable: bool = False) -> None:
    """Makes a model with packed layers save itself as a packed checkpoint.

    Args:
        model: with the layers in place.
        layers: their metadata.
        trainable: whether some of their parts are parameters.
    """
    config = QuantkitConfig(layers=layers)
    quantizer = QuantkitHfQuantizer(config)
    quantizer.is_qat_trainable = trainable
    attributes = {
        "hf_quantizer": quantizer,
        "is_quantized": True,
        "quantization_method": METHOD,
    }
    model.config.quantization_config = config
    for name, value in attributes.items():
        setattr(model, name, value)


def load(
    folder: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device | None = None
) -> PreTrainedModel:
    """Loads a packed checkpoint, or any transformers causal language model.

    Args:
        folder: a folder, or an id on the hub.
        dtype: of activations and dense weights; packed tensors keep their own.
        device: where to put the model; by default the CPU.

    Raises:
        CheckpointError: damaged or incomplete files, or an unknown format.
    """
    path = Path(folder)
    if path.is_dir():
        config = read_config(path).get("quantization_config") or {}
        if config.get("quant_method") == METHOD:
            packed_layers(path)
        elif any(path.glob("*.safetensors*")):
            Shards(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except QuantkitError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"{folder} does not load as a causal language model ({first_line(error)})") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of the model, {missing[0]} among them; fetch it anew"
        )
    return model if device is None else model.to(device)


def _specs(files: list[str]) -> dict[str, tuple[str, list[int]]]:
    specs = {}
    for file in files:
        with open_shard(Path(file)) as shard:
            for name in shard.keys():
                view = shard.get_slice(name)
                specs[name] = (view.get_dtype(), view.get_shape())
    return specs
