"""The sizes that `evals.architectures` makes models small by: one rule, and what single kinds need besides."""

import re
from typing import Any

TOKENS = 2048
_SIZES = {
    64: "hidden_size d_model n_embd dim embed_dim model_dim d_embed out_hidden_size embedding_dim moe_hidden_size "
    "projector_hidden_size projector_input_dim projector_output_dim image_token_embed_dim router_hidden_size "
    "text_hidden_size encoder_hidden_size hidden_size_global",
    96: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size intermediate_size_mlp mlp_hidden_size encoder_ffn_dim "
    "decoder_ffn_dim dim_ff share_expert_dim mlp_dim",
    2: "num_hidden_layers n_layer num_layers n_layers depth encoder_layers decoder_layers layers num_experts_per_tok "
    "num_experts_per_token moe_topk moe_k top_k num_key_value_heads num_kv_heads num_query_groups "
    "swa_num_key_value_heads num_layers_per_stack zero_expert_num num_blocks",
    4: "num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts linear_num_key_heads linear_num_value_heads num_linear_heads "
    "index_n_heads linear_num_heads swa_num_attention_heads num_sliding_attention_heads mamba_dt_rank",
    16: "head_dim linear_key_head_dim linear_value_head_dim state_size ssm_state_size mamba_d_state mamba_headdim "
    "mamba_d_head mamba_head_dim dim_head v_head_dim rotary_dim hidden_size_per_layer_input qk_head_dim "
    "index_head_dim linear_head_dim swa_head_dim d_head",
    8: "qk_rope_head_dim qk_nope_head_dim mamba_n_heads mamba_num_heads n_mamba_heads laurel_rank adapter_rank "
    "index_topk",
    32: "moe_intermediate_size kv_lora_rank q_lora_rank o_lora_rank shared_expert_intermediate_size sliding_window "
    "attention_head_dim base_channels",
    1: "n_group topk_group n_groups mamba_n_groups n_shared_experts first_k_dense_replace num_expert_group",
    128: "mamba_d_ssm attention_hidden_size lru_width",
    256: "max_position_embeddings n_positions max_seq_len seq_length n_ctx merged_hidden_size",
    TOKENS: "vocab_size vocab_size_per_layer_input unpadded_vocab_size encoder_hash_byte_group_vocab",
}
"""Sizes by what configs call them."""
_INNER = re.compile("inner|ff(?!set)|intermediate|feed_forward")
"""What else configs call the width inside an MLP."""
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}
_DEPTHS = "num_hidden_layers", "n_layer", "num_layers", "n_layers"
_KINDS = "layer_types", "layers_block_type", "mlp_layer_types"
"""Lists of the kinds of layers."""
_OPEN = "head_dim", "num_key_value_heads"
_OPEN_EXPERTS = "num_experts_per_tok", "n_routed_experts", "n_shared_experts"
"""What some configs leave open, and their classes need: of all models, and of mixtures of experts."""


def _of_text(changes: dict[str, Any]) -> dict[str, Any]:
    """The same for a kind that has such a text model in it."""
    return {f"text_config.{name}": value for name, value in changes.items()}


_AXES = [2, 3, 3]
"""Rotary angles of a usual head along time, height and width."""
_HYBRID = ["linear_attention", "full_attention"]
_CONVOLVED = ["conv", "full_attention"]
_MINIMAX = {
    "layer_types": ["full_attention", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse"],
    "index_block_size": 4,
    "index_topk_blocks": 2,
}
_ZAMBA = {
    "num_hidden_layers": 3,
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"],  # of which the last two share their weights
    "hybrid_layer_ids": [1, 2],
    "num_key_value_heads": 4,
}
_BOTH = ["sliding_attention", "full_attention"]
_COMPASS = {
    "layer_types": _BOTH,
    "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": _AXES} for kind in _BOTH},
}
_DOTS = {
    "head_dim": 16,
    "rope_parameters.indexed_attention.partial_rotary_factor": 0.5,
    "rope_parameters.sliding_attention.partial_rotary_factor": 0.5,
    "per_layer_config": {1: {"num_attention_heads": 8, "num_key_value_heads": 8}},
}
_SECTIONS = {"text_config.rope_parameters.mrope_section": _AXES}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
CHANGES: dict[str, dict[str, Any]] = {
    **{kind: _SECTIONS for kind in ("glm4v", "glm46v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl")},
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 10}},
    "cohere_compass": _of_text(_COMPASS),
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": [*_BOTH, "sliding_attention"],
    },
    "dots3_note": _of_text(_DOTS)
    | {
        "vision_config.adapter_in_dim": 64,
        "vision_config.adapter_out_dim": 64,
        "audio_config.num_key_value_heads": 4,
        "audio_config.adapter_input_size": 64,
        "audio_config.adapter_out_dim": 64,
        "audio_config.downsample_hidden_size": 32,
    },
    "dots3_note_text": _DOTS,
    "emu3": {"vocabulary_map": {"<image>": 10, "<|extra_200|>": 11}},
    "apertus1p5": {
        "vision_config.codebook_size": 512,
        "image_token_offset": 512,
        "audio_token_offset": 1024,
        "audio_config.codebook_size": 512,
        "audio_config.codebook_dim": 64,
    },
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters.mrope_section": [3, 3, 2],
        "text_config.moe_intermediate_size": [32, 32],
    },
    "gemma3n_text": {  # the last two layers use what the first two cache
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": _BOTH * 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [2, 1, 1]},
    "glm5_next": {
        "text_config.index_kpool": 4,
        "text_config.qk_rope_head_dim": 0,
        "text_config.qk_head_dim": 8,
        "text_config.head_dim": 0,
    },
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [(-1, 0)], "spatial_target_layers": [1]},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "hrm_text": {"num_hidden_layers": 16},  # of two stacks of two layers, by how often each is gone through
    "hunyuan_vl": _SECTIONS,
    "janus": {"vision_config.projection_dim": 64, "vq_config.projection_dim": 64, "vq_config.num_embeddings": 512},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": _BOTH, "num_attention_heads_per_layer": [8, 4]},
    "lfm2": {"layer_types": _CONVOLVED},
    "lfm2_moe": {"layer_types": _CONVOLVED, "num_dense_layers": 1},
    "lfm2_vl": {"text_config.layer_types": _CONVOLVED},
    "minimax_m3_vl": _of_text(_MINIMAX),
    "minimax_m3_vl_text": _MINIMAX,
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "muse_spark": {
        "audio_config.patch_sizes": (16, 6),
        "audio_config.hidden_sizes": (32, 64),
        "audio_config.depths": (1, 1),
    },
    "nemotron_h": {"layers_block_type": [*_HYBRID, "moe", "mlp"]},
    "nemotron_h_omni": {"text_config.layers_block_type": [*_HYBRID, "moe", "mlp"]},
    "phi4_multimodal": {
        "audio_config.nemo_conv_channels": 64,
        "audio_config.ext_pw_out_channel": 64,
        "audio_config.depthwise_separable_out_channel": 64,
    },
    "qwen2_5_omni_thinker": _SECTIONS | {"vision_start_token_id": 5},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 5},
    "qwen4_exp": _of_text(_INDEXER),
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv": {"attention_hidden_size": 64},
    "step3p7": {
        "vision_config.mlp_ratio": 1.5,
        "text_config.sliding_window": 32,
        "text_config.layer_types": _BOTH,
        "text_config.rope_parameters.sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "text_config.per_layer_config": {0: {"num_attention_heads": 8}},
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA | {"num_query_groups": 4},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single kinds need besides the rule, by the dotted names of fields: mostly what their defaults leave open."""


def small(config: Any) -> Any:
    """A config made small in place, its parts too: whatever has a usual name gets a usual size."""
    _shrink(config)
    for names, value in CHANGES.get(config.model_type, {}).items():
        *owners, last = names.split(".")
        owner = config
        for name in owners:
            owner = owner[name] if isinstance(owner, dict) else getattr(owner, name)
        if isinstance(owner, dict):
            owner[last] = value
        else:
            setattr(owner, last, value)
    return config


def _shrink(config: Any) -> None:
    single = config.to_dict().get("per_layer_config")
    if single is not None:  # while it is there, the sizes that it overrides cannot be read
        config.per_layer_config = None
    depth = next((count for name in _DEPTHS if isinstance(count := vars(config).get(name), int)), 0)
    kept = [0, 1]
    for name, value in [*vars(config).items()]:
        if hasattr(value, "to_dict"):
            _shrink(value)
        elif name in _SIZE_OF and _is_count(value):
            setattr(config, name, _SIZE_OF[name])
        elif _INNER.search(name) and _is_count(value) and value > 512:
            setattr(config, name, 96)
        elif name.endswith("_token_id") and isinstance(value, int):
            setattr(config, name, min(value, TOKENS - 1))
        elif isinstance(value, list) and len(value) > 2 and (name in _KINDS or len(value) == depth > 4):
            other = next((at for at, kind in enumerate(value) if kind != value[0]), 1)
            setattr(config, name, _of_two(name, value, other))
            kept = [0, other] if name in _KINDS[:2] else kept
    _settle(config)
    _settle_rope(config)
    if single is not None:
        of_kept = {at: own for at, layer in enumerate(kept) for key, own in single.items() if int(key) == layer}
        config.per_layer_config = {at: {name: _doubled(name, own[name]) for name in own} for at, own in of_kept.items()}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _of_two(name: str, values: list[Any], other: int) -> list[Any]:
    """What is left for two layers of a list with something for each: the first's and the first that differs."""
    size = _SIZE_OF.get(name.removesuffix("_per_layer"))
    if size is not None:
        return [size, size]
    return [0, 1] if values == [*range(len(values))] else [values[0], values[other]]


def _doubled(name: str, value: Any) -> Any:
    """What a single layer has of its own: twice the usual size, so that it stays a layer like no other."""
    return 2 * _SIZE_OF[name] if name in _SIZE_OF else value


def _settle(config: Any) -> None:
    """Gives the fields that depend on others, or are left open, what fits."""
    for name in _OPEN + (_OPEN_EXPERTS if getattr(config, "moe_intermediate_size", None) else ()):
        if vars(config).get(name, 0) is None:
            setattr(config, name, _SIZE_OF[name])
    if hasattr(config, "qk_rope_head_dim"):  # of which rotary embeddings are made, if not of a part of the whole
        partial = "partial_rotary_factor" in (getattr(config, "rope_parameters", None) or {})
        config.head_dim = _SIZE_OF["qk_head_dim" if partial else "qk_rope_head_dim"]
    if getattr(config, "kv_lora_rank", None):
        config.num_key_value_heads = config.num_attention_heads  # what is compressed is one for all
    if hasattr(config, "expand") and hasattr(config, "num_heads"):
        config.num_heads = config.expand * config.hidden_size // config.head_dim


def _settle_rope(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):  # one for each kind
        return
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = 1e4
    if "mrope_section" in rope:
        rotated = getattr(config, "qk_rope_head_dim", _SIZE_OF["head_dim"])
        half = int(rotated * rope.get("partial_rotary_factor", 1)) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
