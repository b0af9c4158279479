"""The class of a model: the one that its config.json names, towers and projectors included.

A model may bring code of its own, named by `auto_map` in its config.json; that is run where it is trusted, and only
there (`core.remote`).
"""

from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from quantkit.core.constants import SHIM
from quantkit.core.errors import QuantkitError, first_line
from quantkit.core.remote import REMOTE
from quantkit.io.files import parse_json
from quantkit.models.experts import take_apart

_TEXT, _MORE = (AutoModelForCausalLM,), (AutoModelForImageTextToText, AutoModelForMultimodalLM)
"""Where a config's class is looked up if it names none."""


def config_of(folder: Path) -> Any:
    """transformers' config of a model's folder.

    Raises:
        QuantkitError: transformers knows no such model, or it needs code of its own, which is not trusted.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=REMOTE.get())
    except Exception as error:  # transformers and huggingface_hub raise many kinds on a bad config
        if "trust_remote_code" in str(error) and not REMOTE.get():
            named = parse_json(folder / "config.json").get("auto_map")
            places = {str(place).split("--")[-1].rpartition(".")[0] for place in (named or {}).values()}
            code = ", ".join(f"{place}.py" for place in sorted(places)) or "which its config.json does not name"
            raise QuantkitError(
                f"{folder.name} needs code of its own ({code}); read it, and give `trust_remote_code` if it may be run"
            ) from error
        raise QuantkitError(
            f"{folder} is not a causal language model that transformers knows ({first_line(error)})"
        ) from error


def class_of(config: Any) -> type[PreTrainedModel]:
    """The class that a model is loaded by: what its config names, where that generates text, else what suits it.

    Classes for text alone are known for some models that see and hear too; by those their towers would be lost.

    Raises:
        QuantkitError: it is an encoder, or has one, or transformers has no class that generates text for it.
    """
    name = next(iter(getattr(config, "architectures", None) or ()), None)
    called = name or type(config).__name__.removesuffix("Config")
    if type(config) in AutoModelForMaskedLM._model_mapping and not (
        getattr(config, "is_decoder", False) or config.is_encoder_decoder
    ):
        raise QuantkitError(f"{called} is an encoder; quantkit quantizes models that predict the next token")
    if config.is_encoder_decoder:
        raise QuantkitError(f"{called} is an encoder-decoder; quantkit quantizes decoder-only models")
    own = getattr(config, "auto_map", None) or {}
    for auto in (*_TEXT, *_MORE) if REMOTE.get() else ():
        if auto.__name__ in own and not own[auto.__name__].startswith(f"{SHIM}."):
            found = get_class_from_dynamic_module(own[auto.__name__], config._name_or_path)
            return cast(type[PreTrainedModel], found)
    named = getattr(transformers, name or "", None)
    if isinstance(named, type) and issubclass(named, PreTrainedModel) and named.can_generate():
        return _repaired(named)
    for auto in _TEXT + _MORE if config.get_text_config() is config else _MORE + _TEXT:
        if type(config) in auto._model_mapping:
            made: Any = auto._model_mapping[type(config)]
            return _repaired(cast(type[PreTrainedModel], made[0] if isinstance(made, tuple) else made))
    raise QuantkitError(f"{called} is not a causal language model that transformers knows")


def _repaired(found: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class; Llama 4's reads, in transformers 5.24, what the output of its language model lacks."""
    if found.__name__ == "Llama4ForConditionalGeneration" and not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        MoeCausalLMOutputWithPast.image_outputs = None  # type: ignore[attr-defined]
    return found


def meta_model(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model's structure on the meta device, its experts taken apart.

    Args:
        folder: holds config.json.
        dtype: of the weights; None for the checkpoint's own.

    Raises:
        QuantkitError: transformers knows no such causal language model.
    """
    config = config_of(folder)
    if getattr(config, "quantization_config", None):
        del config.quantization_config
    made = class_of(config)
    kept = dtype or getattr(config, "dtype", None) or torch.float32
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = made._from_config(config, dtype=kept)
    except Exception as error:  # models raise many kinds on a bad config
        raise QuantkitError(f"{folder}: its config.json makes no {made.__name__} ({first_line(error)})") from error
    model.tie_weights()
    take_apart(model)
    return model.eval()
