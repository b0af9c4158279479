"""The transformers bridge: packed checkpoints load and save through transformers' own functions.

quant_method "quantkit" is registered by `quantkit.io.registration`; what happens without it is up to `io.shim`.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quantkit.core.constants import METHOD
from quantkit.core.errors import CheckpointError, QuantkitError, first_line
from quantkit.core.remote import REMOTE
from quantkit.io.checkpoint import is_packed, packed_layers, read_config
from quantkit.io.checkpoint import verify as verify_folder
from quantkit.io.classes import class_of, config_of
from quantkit.io.gguf import gguf_folder
from quantkit.io.gguf_header import is_gguf
from quantkit.io.registration import QuantkitConfig, QuantkitHfQuantizer
from quantkit.io.shards import Shards
from quantkit.io.stored_forms import FORMS, quantization_of
from quantkit.models.unpacking import ASKED, choose_unpacked

REFERENCE = Path(__file__).resolve().parents[1] / "evals" / "reference" / "model"
"""The reference model, which is installed with the library and called `reference`."""
GGUF = ".gguf"
"""How GGUF files end."""


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


def resolve_folder(model: str | Path) -> Path:
    """The folder of a model, which may be given in other ways.

    Args:
        model: a folder; a GGUF file; an id on the hub, or `owner/name/file.gguf` there, which is then fetched; or
            `reference`. A GGUF file becomes a folder in the cache, see `quantkit.io.gguf`.

    Raises:
        QuantkitError: no such folder or file, the hub cannot deliver, or the GGUF file cannot be read.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and (path.suffix.lower() == GGUF or is_gguf(path)):
        return gguf_folder(path)
    text = str(model)
    if text == "reference":
        if not REFERENCE.is_dir():
            raise QuantkitError(f"the reference model is not at {REFERENCE}; it is in quantkit's wheel and source tree")
        return REFERENCE
    if path.suffix.lower() == GGUF:
        return gguf_folder(_fetched(text))
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise QuantkitError(f"{text} is not a folder; give a model folder or a hub id such as Qwen/Qwen2-0.5B")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md", *["*.py"] * REMOTE.get()]
        folder = Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub raises its own, requests' and OS errors
        raise QuantkitError(
            f"{text!r} is neither a folder here nor a model that the hub delivers ({first_line(error)})"
        ) from error
    if not (folder / "config.json").is_file():
        raise QuantkitError(
            f"{text} has no config.json on the hub; where it holds GGUF files, give one: {text}/FILE{GGUF}"
        )
    return folder


def _fetched(name: str) -> Path:
    """A GGUF file on the hub, given as owner/name/file.gguf.

    Raises:
        QuantkitError: it is no such name, or the hub cannot deliver.
    """
    parts = name.split("/", 2)
    if len(parts) < 3 or not all(parts) or name.startswith((".", "~")):
        raise QuantkitError(f"{name} is not there; a GGUF file on the hub is given as OWNER/NAME/FILE.gguf")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2]))
    except Exception as error:  # huggingface_hub raises its own, requests' and OS errors
        raise QuantkitError(
            f"{name!r} is neither a file here nor one that the hub delivers ({first_line(error)})"
        ) from error


def load(
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    unpack: bool | None = None,
    verify: bool = False,
) -> PreTrainedModel:
    """Loads a packed checkpoint, or any transformers causal language model, dequantized if need be.

    Args:
        folder: a folder, or an id on the hub.
        dtype: of activations and dense weights; packed tensors keep their own.
        device: where to put the model; by default the CPU.
        unpack: on a CPU, unpack each packed layer at its first use (True) or never (False); by default those that run
            faster so, as far as memory allows. A line of the log says what that costs.
        verify: hold all tensors and files against the checksums that their run wrote; reads the files once more.

    Raises:
        CheckpointError: damaged or incomplete files, or an unknown format.
        QuantkitError: unpack=True, and memory does not suffice.
    """
    folder = resolve_folder(folder)
    if verify:
        verify_folder(folder)
    form = check_files(folder)
    if form != METHOD and form in FORMS:
        return _dequantized(folder, dtype, device)
    asked = ASKED.set(unpack)
    try:
        loaded: Any = class_of(config_of(folder)).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except QuantkitError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"{folder} does not load as a causal language model ({first_line(error)})") from error
    finally:
        ASKED.reset(asked)
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing and set(missing) <= _of_head(model):
        raise CheckpointError(
            f"{folder} holds a model without its head ({missing[0]}), which predicts no tokens; give the one that "
            "transformers' AutoModelForCausalLM loads and saves"
        )
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of the model, {missing[0]} among them; fetch it anew"
        )
    model = model if device is None else model.to(device)
    if torch.cuda.is_available():
        choose_unpacked(model, unpack)
    return model


def check_files(folder: Path) -> str:
    """Looks into the headers of a model's files, and reads no weights.

    Returns:
        What its weights are quantized by, as its config.json says; "" for nothing.

    Raises:
        CheckpointError: no model, damaged or incomplete files, or an unknown format.
    """
    config = read_config(folder)
    if is_packed(config):
        packed_layers(folder)
        return METHOD
    form = str(quantization_of(config).get("quant_method") or "")
    if form in FORMS or any(folder.glob("*.safetensors*")):
        Shards(folder)
    return form


def _of_head(model: PreTrainedModel) -> set[str]:
    """Names of the output head's parameters; none where the model has no head of its own."""
    head = model.get_output_embeddings()
    return {
        f"{place}.{name}"
        for place, module in model.named_modules()
        if module is head
        for name, _ in module.named_parameters(recurse=False)
    }


def _dequantized(folder: Path, dtype: str | torch.dtype, device: str | torch.device | None) -> PreTrainedModel:
    """A model whose files hold quantized weights, with the weights that these stand for."""
    from quantkit.io.source import open_folder  # which loads models by this module

    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    source = open_folder(folder, kind)
    source.settle({})
    return source.in_memory(torch.device(device or "cpu"))
