"""Gradient checkpointing by the settings `text_grad_ckpt` and `grad_ckpt`."""

from typing import Any

from torch import nn

from models.med import TextTransformer
from models.vit import VisionTransformer
from utils import UserError

# what fairscale's wrapper does not go with: its values, and why
FAIRSCALE_LIMITS = (
    ("parallel", ("ddp",), "it does not gather the shards of a block that runs again"),
    ("compile", (False,), "its wrapper cannot be compiled"),
    ("amp", ("",), "it does not restore bfloat16 where it runs a block again"),
)


def set_grad_checkpointing(model: nn.Module, config: Any) -> None:
    """Checkpoint layers of the text transformers if asked, and ViT blocks by PyTorch or by fairscale."""
    for part in model.modules():
        if isinstance(part, TextTransformer):
            part.grad_checkpointing = config.get("text_grad_ckpt", False)
    if config.get("grad_ckpt") == "fairscale":
        for key, allowed, reason in FAIRSCALE_LIMITS:
            if config.get(key, allowed[0]) not in allowed:
                raise UserError(f"grad_ckpt: fairscale does not go with {key}: {config[key]} ({reason}); use torch")
        for part in model.modules():
            if isinstance(part, VisionTransformer):
                part.use_fairscale()
