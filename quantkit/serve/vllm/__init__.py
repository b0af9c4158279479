"""vLLM serves packed checkpoints: `vllm serve DIR` and `LLM(DIR)`, without a flag.

vLLM calls `register` by an entry point (group `vllm.general_plugins`) in each of its processes; nothing else of
quantkit imports vLLM. From config.json's `quantization_config` it then finds `config.QuantkitConfig`, which says for
each of its layers how its weight is made (`linear`, `vocabulary`, `experts`):

    placeholders      parameters without numbers, by the checkpoint's local tensor names, for vLLM's loaders to fill
    tensors           come one at a time, with the index of their part where layers are fused (`serve.stored`)
    weights           of all that came: checked, cut to this rank's part (`serve.sharding`), put side by side

Products are quantkit's operators, which torch.compile and CUDA graphs take as they are. On a CPU a layer that runs
slower packed becomes a dense one of vLLM's (`models.unpacking` has the rule).
"""


def register() -> None:
    """Tells vLLM of quant_method "quantkit"; to be told twice changes nothing."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from quantkit.core.constants import METHOD

    if METHOD not in QUANTIZATION_METHODS:
        from quantkit.serve.vllm.config import QuantkitConfig

        register_quantization_config(METHOD)(QuantkitConfig)
