"""Names of parameters in Hugging Face transformers' BLIP, and ours, both ways.

Three things differ between the two besides names. The text configuration on the Hub may say 8 heads where 12 are
right, and its vision configuration eps 1e-5 where 1e-6 is. transformers' VQA model feeds questions with [CLS] where
the released model was trained with [ENC]. Its generation divides a score by the generated length only.
"""

import re

import torch

# Ours -> theirs, by pattern; texts and projections have one name in both, but for the ITM model's prefix.
VISION = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
)
BACK = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"visual_encoder.blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"visual_encoder.blocks.\1.attn.qkv."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"visual_encoder.blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"visual_encoder.blocks.\1.mlp."),
    (r"^vision_model\.post_layernorm\.", "visual_encoder.norm."),
)
HOMELESS = ("_m.", "queue", "temp")  # momentum copies, queues and temperature have no place there


def is_huggingface(state: dict[str, torch.Tensor]) -> bool:
    """Tell whether a state dict has transformers' names."""
    return any(key.startswith("vision_model.") for key in state)


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, name in rules:
        key, found = re.subn(pattern, name, key)
        if found:
            break
    return key


def to_huggingface(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a captioner's, VQA model's or ITM model's state dict to transformers' names."""
    kept = {key: value for key, value in state.items() if not any(word in key for word in HOMELESS)}
    return {_rename(key, VISION): value for key, value in kept.items()}


def from_huggingface(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename transformers' state dict to ours; its `position_ids` and `logit_scale` are dropped."""
    kept = {k: v for k, v in state.items() if not k.endswith("position_ids") and k != "logit_scale"}
    return {_rename(key, BACK): value for key, value in kept.items()}
