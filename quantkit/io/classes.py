"""The class of a model: the one that its config.json names, towers and projectors included."""

from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)

from quantkit.core.errors import QuantkitError, first_line

_TEXT, _MORE = (AutoModelForCausalLM,), (AutoModelForImageTextToText, AutoModelForMultimodalLM)
"""Where a config's class is looked up if it names none."""


def config_of(folder: Path) -> Any:
    """transformers' config of a model's folder.

    Raises:
        QuantkitError: transformers knows no such model.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers and huggingface_hub raise many kinds on a bad config
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
    named = getattr(transformers, name or "", None)
    if isinstance(named, type) and issubclass(named, PreTrainedModel) and named.can_generate():
        return named
    for auto in _TEXT + _MORE if config.get_text_config() is config else _MORE + _TEXT:
        if type(config) in auto._model_mapping:
            found: Any = auto._model_mapping[type(config)]
            made: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
            return made
    raise QuantkitError(f"{called} is not a causal language model that transformers knows")
