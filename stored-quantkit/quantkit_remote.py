"""Loads the packed weights of this folder in any program that trusts it: trust_remote_code=True."""

from transformers import LlamaConfig, LlamaForCausalLM

try:
    import quantkit  # noqa: F401  tells transformers how packed layers are read
except ImportError as error:
    raise ImportError("these weights are packed by quantkit: pip install quantkit-llm") from error


class Config(LlamaConfig):
    """The model's config."""


class Model(LlamaForCausalLM):
    """The model, by its packed weights."""

    config_class = Config
