"""What tests of exports have in common: a text, small models that other programs know, and their logits."""

import torch

import quantkit

TOKENS = torch.arange(10, 40).view(2, 15)


TEXT = "class Node:\n    def __init__(self, value=12.5):\n        self.value = value  # naïve\n"


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model.eval()(tokens).logits.float()


def close(found, packed, most=1e-5):
    expected = logits(quantkit.load(packed, dtype=torch.float32))
    torch.testing.assert_close(found, expected, rtol=0, atol=most * float(expected.abs().max()))


def rtn(bits, grid):
    return {"method": f"rtn({bits}, group_size=64, grid={grid!r})", "group_size": None}


SIZES = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip


LLAMAS = {
    "llama": {},
    "llama, scaled": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 128},
    "gemma3_text": {
        "num_hidden_layers": 6, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 256,
        "query_pre_attn_scalar": 256, "sliding_window": 64, "tie_word_embeddings": True,
    },
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 160,
    },
    "qwen3_moe": {
        "num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 96, "norm_topk_prob": True, "head_dim": 64
    },
}  # fmt: skip
