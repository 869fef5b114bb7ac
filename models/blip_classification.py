"""Classification of an image and a text, such as visual entailment (not in the paper; after LAVIS)."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from models.base import ImageTextModel
from models.med import TextTransformer
from models.med_config import MED_CONFIG, MedSource
from models.pretrained import load_pretrained
from models.tokenizer import tokenize

MAX_TEXT_TOKENS = 40


class BLIP_Classification(ImageTextModel):
    """Image-grounded text encoder and a classifier on its first token; more arguments as the base's.

    Args:
        num_classes: number of classes.
        first_token: "enc", as in pretraining's matching, or "cls", as in LAVIS.
    """

    def __init__(
        self, med_config: MedSource = MED_CONFIG, image_size: int = 384, vit: str | Mapping = "base",
        vit_grad_ckpt: bool = False, vit_ckpt_layer: int = 0, num_classes: int = 3,
        drop_path_rate: float = 0.0, first_token: str = "enc",
    ):  # fmt: skip
        super().__init__(med_config, image_size, vit, vit_grad_ckpt, vit_ckpt_layer, drop_path_rate)
        self.text_encoder = TextTransformer(self.text_config)
        width = self.text_config.hidden_size
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_classes))
        self.first_token = first_token

    def forward(
        self, image: torch.Tensor, text: Sequence[str], targets: torch.Tensor | None = None, train: bool = True
    ) -> torch.Tensor:
        """Classify pairs of an image and a text.

        Args:
            image: float (batch, 3, H, W), with a text each.
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
