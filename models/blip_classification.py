"""Classification of an image and a text, such as visual entailment (not in the paper; after LAVIS)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models.med import TextTransformer
from models.med_config import MED_CONFIG, create_text_config
from models.pretrained import load_pretrained
from models.tokenizer import tokenize
from models.vit import create_vit

MAX_TEXT_TOKENS = 40


class BLIP_Classification(nn.Module):
    """Image-grounded text encoder and a classifier on its first token.

    Args:
        med_config, image_size, vit, vit_grad_ckpt, vit_ckpt_layer: as `models.blip.BLIP_Base`.
        num_classes: number of classes.
        drop_path_rate: stochastic depth of the ViT.
        first_token: "enc", as in pretraining's matching, or "cls", as in LAVIS.
    """

    def __init__(
        self,
        med_config: str | Path | Mapping = MED_CONFIG,
        image_size: int = 384,
        vit: str | Mapping = "base",
        vit_grad_ckpt: bool = False,
        vit_ckpt_layer: int = 0,
        num_classes: int = 3,
        drop_path_rate: float = 0.0,
        first_token: str = "enc",
    ):
        super().__init__()
        self.visual_encoder, vision_width = create_vit(vit, image_size, vit_grad_ckpt, vit_ckpt_layer, drop_path_rate)
        self.tokenizer, config = create_text_config(med_config, vision_width)
        self.text_encoder = TextTransformer(config)
        width = config.hidden_size
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_classes))
        self.first_token = first_token

    def forward(
        self, image: torch.Tensor, text: Sequence[str], targets: torch.Tensor | None = None, train: bool = True
    ) -> torch.Tensor:
        """Classify pairs of an image and a text.

        Args:
            image: float (batch, 3, H, W).
            text: one per image.
            targets: int64 (batch,), for the loss.
            train: return the cross-entropy, a scalar; otherwise logits (batch, num_classes).
        """
        tokens = tokenize(self.tokenizer, text, self.first_token, MAX_TEXT_TOKENS, image.device)
        hidden = self.text_encoder(*tokens, self.text_encoder.project(self.visual_encoder(image)))
        logits = self.cls_head(hidden[:, 0])
        return F.cross_entropy(logits.float(), targets) if train else logits


def blip_classification(pretrained: str = "", allow_pickle: bool = False, **kwargs) -> BLIP_Classification:
    """Build a classifier; from a checkpoint of another task its head starts fresh."""
    return load_pretrained(BLIP_Classification(**kwargs), pretrained, "classification", allow_pickle)
