"""Parameter names of Hugging Face transformers' BLIP and of this project.

Two other things differ. transformers' VQA model starts questions with [CLS], while the released model was trained with
[ENC]. Its generation divides a score by the generated length only.
"""

import re
from collections.abc import Iterable

import torch

# our name and theirs; {} is the index of a block; names of text transformers and projections are equal
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
    ("text_encoder.", "text_model."),  # of BlipModel; the other models have our names
)
LEFT_OUT = ("_m.", "queue", "temp")  # transformers has no momentum encoders, queues and temperature
NOT_OURS = re.compile(r"position_ids$|^logit_scale$|^text_model\.pooler\.")


def is_huggingface(state: dict[str, torch.Tensor]) -> bool:
    """Return True if a state dict has transformers' names."""
    return any(key.startswith("vision_model.") for key in state)


def _rename(key: str, names: Iterable[tuple[str, str]]) -> str:
    for old, new in names:
        pattern = "^" + re.escape(old).replace(r"\{\}", r"(\d+)")
        key, found = re.subn(pattern, new.replace("{}", r"\1"), key)
        if found:
            break
    return key


def to_huggingface(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the state dict of a captioner, VQA model or ITM model to transformers' names."""
    kept = {key: value for key, value in state.items() if not any(word in key for word in LEFT_OUT)}
    return {_rename(key, NAMES[:-1]): value for key, value in kept.items()}


def from_huggingface(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a state dict from transformers' names, without what this project's models have no use for."""
    kept = {key: value for key, value in state.items() if not NOT_OURS.search(key)}
    return {_rename(key, [(theirs, ours) for ours, theirs in NAMES]): value for key, value in kept.items()}
