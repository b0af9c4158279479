"""The transformers bridge: packed checkpoints load and save through transformers' own functions.

quant_method "quantkit" is registered by `quantkit.io.registration`. Without that registration transformers only warns
about the unknown method and runs with random weights, so `quantkit.load` is the documented way in.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit.core.constants import METHOD
from quantkit.core.errors import CheckpointError, QuantkitError, first_line
from quantkit.io.checkpoint import packed_layers, read_config
from quantkit.io.registration import QuantkitConfig, QuantkitHfQuantizer
from quantkit.io.shards import Shards
from quantkit.models.unpacking import ASKED, choose_unpacked


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
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    unpack: bool | None = None,
) -> PreTrainedModel:
    """Loads a packed checkpoint, or any transformers causal language model.

    Args:
        folder: a folder, or an id on the hub.
        dtype: of activations and dense weights; packed tensors keep their own.
        device: where to put the model; by default the CPU.
        unpack: on a CPU, unpack each packed layer at its first use (True) or never (False); by default those that run
            faster so, as far as memory allows. A line of the log says what that costs.

    Raises:
        CheckpointError: damaged or incomplete files, or an unknown format.
        QuantkitError: unpack=True, and memory does not suffice.
    """
    path = Path(folder)
    if path.is_dir():
        config = read_config(path).get("quantization_config") or {}
        if config.get("quant_method") == METHOD:
            packed_layers(path)
        elif any(path.glob("*.safetensors*")):
            Shards(path)
    asked = ASKED.set(unpack)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except QuantkitError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"{folder} does not load as a causal language model ({first_line(error)})") from error
    finally:
        ASKED.reset(asked)
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of the model, {missing[0]} among them; fetch it anew"
        )
    model = model if device is None else model.to(device)
    if torch.cuda.is_available():
        choose_unpacked(model, unpack)
    return model
