"""What makes programs that know nothing of quantkit load a packed checkpoint right, or not at all.

Beside a checkpoint lies code of a few lines, which config.json names (`auto_map`): a program that trusts it
(`trust_remote_code=True`) imports quantkit by it, and loads the packed weights. A program that doesn't would have
transformers skip a quant_method that it doesn't know, and go on with random weights behind a warning. So config.json
also names a file of weights that is not there (`transformers_weights`), which transformers asks for before any other;
quantkit, once it is imported, takes that name away (`quantkit.io.registration`).
"""

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedModel

from quantkit.core.constants import GUARD, SHIM

_CODE = '''"""Loads the packed weights of this folder in any program that trusts it: trust_remote_code=True."""

from transformers import {config}, {model}

try:
    import quantkit  # noqa: F401  tells transformers how packed layers are read
except ImportError as error:
    raise ImportError("these weights are packed by quantkit: pip install quantkit-llm") from error


class Config({config}):
    """The model's config."""


class Model({model}):
    """The model, by its packed weights."""

    config_class = Config
'''


def entries(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json says beside the rest, for a model on any device."""
    if not _known(model):
        return {"transformers_weights": GUARD}
    places = {"AutoConfig": f"{SHIM}.Config"}
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(model.config) in auto._model_mapping:
            places[auto.__name__] = f"{SHIM}.Model"
    return {"transformers_weights": GUARD, "auto_map": places}


def files(model: PreTrainedModel) -> dict[str, bytes]:
    """The code, by the name of its file; none for a model that brings code of its own."""
    if not _known(model):
        return {}
    code = _CODE.format(config=type(model.config).__name__, model=type(model).__name__)
    return {f"{SHIM}.py": code.encode()}


def leave(model: PreTrainedModel, folder: Path) -> None:
    """Adds both to a folder that transformers has written the model's config.json into."""
    for name, content in files(model).items():
        (folder / name).write_bytes(content)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries(model), indent=2, sort_keys=True) + "\n")


def _known(model: PreTrainedModel) -> bool:
    """Whether transformers has the classes, under their names."""
    return all(getattr(transformers, type(one).__name__, None) is type(one) for one in (model, model.config))
