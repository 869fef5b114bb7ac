"""Names of parameters in Hugging Face transformers' BLIP, and ours, both ways.

Three things differ between the two besides names. The text configuration on the Hub may say 8 heads where 12 are
right, and its vision configuration eps 1e-5 where 1e-6 is. transformers' VQA model feeds questions with [CLS] where
the released model was trained with [ENC]. Its generation divides a score by the generated length only.
"""

import re
from collections.abc import Iterable

import torch

# Ours and theirs; {} is a block's number. Texts and projections have one name in both.
NAMES = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.blocks.{}.norm1.", "vision_model.encoder.layers.{}.layer_norm1."),
    ("visual_encoder.blocks.{}.norm2.", "vision_model.encoder.layers.{}.layer_norm2."),
    ("visual_encoder.blocks.{}.attn.qkv.", "vision_model.encoder.layers.{}.self_attn.qkv."),
    ("visual_encoder.blocks.{}.attn.proj.", "vision_model.encoder.layers.{}.self_attn.projection."),
    ("visual_encoder.blocks.{}.mlp.", "vision_model.encoder.layers.{}.mlp."),
    ("visual_encoder.norm.", "vision_model.post_layernorm."),
)
HOMELESS = ("_m.", "queue", "temp")  # momentum copies, queues and temperature have no place there


def is_huggingface(state: dict[str, torch.Tensor]) -> bool:
    """Tell whether a state dict has transformers' names."""
    return any(key.startswith("vision_model.") for key in state)


def _rename(key: str, names: Iterable[tuple[str, str]]) -> str:
    for old, new in names:
        pattern = "^" + re.escape(old).replace(r"\{\}", r"(\d+)")
        key, found = re.subn(pattern, new.replace("{}", r"\1"), key)
        if found:
            break
    return key


def to_huggingface(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a captioner's, VQA model's or ITM model's state dict to transformers' names."""
    kept = {key: value for key, value in state.items() if not any(word in key for word in HOMELESS)}
    return {_rename(key, NAMES): value for key, value in kept.items()}


def from_huggingface(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename transformers' state dict to ours; its `position_ids` and `logit_scale` are dropped."""
    kept = {k: v for k, v in state.items() if not k.endswith("position_ids") and k != "logit_scale"}
    return {_rename(key, [(theirs, ours) for ours, theirs in NAMES]): value for key, value in kept.items()}
