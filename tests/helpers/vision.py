"""Models that see, small and untrained, in each of their forms: a language model behind a vision tower."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    Llama4Config,
    LlavaConfig,
    Mistral3Config,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SmolVLMConfig,
)

from .experts import SIZES

IMAGE = 2000
"""The token in whose place an image's features go."""
_TEXT = SIZES | {"head_dim": 16}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


@dataclass(frozen=True)
class Seeing:
    """A family.

    Attributes:
        config: of a small model.
        tokens: that an image takes among the text's.
        pixels: shape of `pixel_values`.
        more: what else goes with an image.
    """

    config: Any
    tokens: int
    pixels: tuple[int, ...]
    more: dict[str, list]

    def inputs(self) -> dict[str, torch.Tensor]:
        """Of a prompt with an image in it."""
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(5, 1500, (12,), generator=generator).tolist()
        ids = torch.tensor([text[:4] + [IMAGE] * self.tokens + text[4:]])
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found["pixel_values"] = torch.randn(self.pixels, generator=generator)
        if "image_grid_thw" in self.more:
            found["mm_token_type_ids"] = (ids == IMAGE).int()
        return found | {name: torch.tensor(value) for name, value in self.more.items()}


def _qwen(config: type, patch: int, text: dict[str, Any] | None = None, **tower: Any) -> Seeing:
    text = _TEXT | {"rope_parameters": _ROPE} | (text or {})
    made = config(
        text_config=text, vision_config=_QWEN | {"patch_size": patch, "spatial_merge_size": 2} | tower,
        image_token_id=IMAGE, video_token_id=IMAGE + 1, vision_start_token_id=IMAGE + 2, vision_end_token_id=IMAGE + 3,
    )  # fmt: skip
    return Seeing(made, 4, (16, 3 * 2 * patch**2), {"image_grid_thw": [[1, 4, 4]]})


_LLAMA = {"model_type": "llama"} | _TEXT
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SEEING = {
    "llava": Seeing(
        LlavaConfig(
            text_config=_LLAMA, vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
            | _TOWER, image_token_index=IMAGE, image_seq_length=4,
        ), 4, (1, 3, 28, 28), {},
    ),
    "mistral3": Seeing(
        Mistral3Config(
            text_config={"model_type": "mistral"} | _TEXT,
            vision_config={"model_type": "pixtral", "image_size": 56, "patch_size": 14, "head_dim": 16} | _TOWER,
            image_token_index=IMAGE, spatial_merge_size=2,
        ), 4, (1, 3, 56, 56), {"image_sizes": [[56, 56]]},
    ),
    "internvl": Seeing(
        InternVLConfig(
            text_config={"model_type": "qwen2"} | _TEXT, vision_config={"image_size": [28, 28], "patch_size": [14, 14]}
            | _TOWER, image_token_id=IMAGE, image_seq_length=1,
        ), 1, (1, 3, 28, 28), {},
    ),
    "smolvlm": Seeing(
        SmolVLMConfig(
            text_config=_LLAMA, vision_config={"image_size": 28, "patch_size": 14} | _TOWER, image_token_id=IMAGE,
            scale_factor=2,
        ), 1, (1, 1, 3, 28, 28), {},
    ),
    "idefics3": Seeing(
        Idefics3Config(
            text_config=_LLAMA, vision_config={"image_size": 28, "patch_size": 14} | _TOWER, image_token_id=IMAGE,
            scale_factor=2,
        ), 1, (1, 1, 3, 28, 28), {},
    ),
    "gemma3": Seeing(
        Gemma3Config(
            text_config=_TEXT, vision_config={"image_size": 28, "patch_size": 14} | _TOWER, image_token_index=IMAGE,
            boi_token_index=IMAGE + 1, eoi_token_index=IMAGE + 2, mm_tokens_per_image=4,
        ), 4, (1, 3, 28, 28), {},
    ),
    "llama4": Seeing(
        Llama4Config(
            text_config=_TEXT | {
                "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96,
                "interleave_moe_layer_step": 1,
            },
            vision_config={
                "image_size": 28, "patch_size": 14, "pixel_shuffle_ratio": 0.5, "projector_input_dim": 32,
                "projector_output_dim": 32, "vision_output_dim": 32,
            } | _TOWER | {"intermediate_size": 128},
            image_token_index=IMAGE, boi_token_index=IMAGE + 1, eoi_token_index=IMAGE + 2,
        ), 1, (1, 3, 28, 28), {},
    ),
    "qwen2_vl": _qwen(Qwen2VLConfig, 14, embed_dim=32, hidden_size=64),
    "qwen2_5_vl": _qwen(Qwen2_5_VLConfig, 14, fullatt_block_indexes=[1], window_size=56),
    "qwen3_vl": _qwen(Qwen3VLConfig, 16, deepstack_visual_indexes=[0], num_position_embeddings=16),
    "qwen3_vl_moe": _qwen(
        Qwen3VLMoeConfig, 16, _EXPERTS, deepstack_visual_indexes=[0], num_position_embeddings=16
    ),
    "qwen3_5": _qwen(
        Qwen3_5Config, 16, {
            "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        }, num_position_embeddings=16,
    ),
}  # fmt: skip
"""By their names in transformers."""
