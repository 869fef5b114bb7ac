"""Parameter names of Hugging Face transformers' BLIP and of this project.

Three other things differ. Configurations on the Hub may have 8 text heads (12 is right) and eps 1e-5 in the image
encoder (1e-6 is right). transformers' VQA model starts questions with [CLS], while the released model was trained
with [ENC]. Its generation divides a score by the generated length only.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from models.med_config import BASE_VOCABULARY

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
)
LEFT_OUT = ("_m.", "queue", "temp")  # transformers has no momentum encoders, queues and temperature


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
    return {_rename(key, NAMES): value for key, value in kept.items()}


def from_huggingface(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a state dict from transformers' names; its `position_ids` and `logit_scale` are dropped."""
    kept = {k: v for k, v in state.items() if not k.endswith("position_ids") and k != "logit_scale"}
    return {_rename(key, [(theirs, ours) for ours, theirs in NAMES]): value for key, value in kept.items()}


def settings_of_folder(folder: Path) -> dict[str, Any]:
    """Translate those parts of transformers' configuration that weights do not show."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text, vision = config.get("text_config", {}), config.get("vision_config", {})
    heads = text.get("num_attention_heads")
    if (text.get("hidden_size", 768), heads) == (768, 8):
        heads = 12  # Differs from the Hub: its configurations say 8, and the weights were trained with 12
    settings: dict[str, Any] = {}
    if "num_attention_heads" in vision:
        settings["vit"] = {"num_heads": vision["num_attention_heads"]}
    if heads:
        settings["med_config"] = {"num_attention_heads": heads}
    if text.get("vocab_size", 30524) not in BASE_VOCABULARY and (folder / "vocab.txt").is_file():
        settings.setdefault("med_config", {})["vocab_file"] = str((folder / "vocab.txt").resolve())
    return settings
