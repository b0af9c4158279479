"""Mixtures of experts in all the forms in which transformers has them, small and untrained."""

from transformers import (
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_FEW = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1}
EXPERTS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16, norm_topk_prob=True
    ),
    "gpt_oss": GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),  # transposed, interleaved, with biases
    "deepseek_v3": DeepseekV3Config(
        **SIZES, **_FEW, first_k_dense_replace=1, n_shared_experts=1, q_lora_rank=32, kv_lora_rank=32,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    ),
    "glm4_moe": Glm4MoeConfig(**SIZES, **_FEW, first_k_dense_replace=1, head_dim=16),
    "llama4": Llama4TextConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=1, head_dim=16, intermediate_size_mlp=96,
        interleave_moe_layer_step=1,
    ),  # all tokens through all experts, sorted
    "granitemoe": GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip
