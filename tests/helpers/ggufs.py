"""Small Llama models as GGUF files, written by the package gguf."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
"""Of a block's modules, in transformers and in GGUF."""
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def name_of(parameter: str) -> str:
    """A parameter's name in GGUF."""
    module = parameter.removesuffix(".weight")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.weight"
    index, _, inside = module.removeprefix("model.layers.").partition(".")
    return f"blk.{index}.{_NAMES[inside]}.weight"


def in_pairs(weight, heads):
    """Rows of q or k as GGUF has them: of each head, a row of its first half and one of its second in turn."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(0, 2, 1, 3).reshape(rows, columns)


def write_gguf(path: Path, model, tokenizer, kind="F16", metadata=None, more=None, without=(), architecture="llama"):
    """Writes a model, and rounds its own weights as the file has them.

    Args:
        path: of the file.
        model: of Llama's shape, fp32; changed in place.
        tokenizer: byte-level BPE.
        kind: of the matrices, as gguf names it; vectors are in fp32.
        metadata: further entries, text or numbers by key; they replace others.
        more: further tensors by name, fp32 arrays.
        without: names of tensors to leave out.
        architecture: what the file calls it.
    """
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    entries = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    entries = {f"{architecture}.{key}": value for key, value in entries.items()}
    entries |= {f"{architecture}.rope.freq_base": config.rope_parameters["rope_theta"], "general.name": "Tiny"}
    entries |= {f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps}
    entries |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.add_bos_token": False}
    entries |= {f"tokenizer.ggml.{name}_token_id": 0 for name in ("bos", "eos", "unknown", "padding")}
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
    for key, value in (entries | (metadata or {})).items():
        if key not in ("general.architecture",):
            add[type(value)](key, value)
    _add_words(writer, tokenizer)
    kind = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name_of(name) in without:
                continue
            weight, stored = parameter.numpy(), kind if parameter.ndim > 1 else gguf.GGMLQuantizationType.F32
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            for part, count in heads.items():
                weight = in_pairs(weight, count) if part in name else weight
            writer.add_tensor(name_of(name), gguf.quantize(weight, stored), raw_dtype=stored)
            rounded = gguf.dequantize(gguf.quantize(parameter.numpy(), stored), stored)
            parameter.copy_(torch.from_numpy(np.array(rounded)))
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_words(writer, tokenizer):
    """The vocabulary, its special tokens and its merges."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    words = sorted(whole["model"]["vocab"], key=whole["model"]["vocab"].get)
    special = {token["content"] for token in whole["added_tokens"]}
    writer.add_token_list(words)
    writer.add_token_types([3 if word in special else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in whole["model"]["merges"]])
