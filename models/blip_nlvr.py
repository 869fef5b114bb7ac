"""NLVR2: classify a statement about two images as true or false (section 4.4)."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from models.base import ImageTextModel
from models.med import TextTransformer
from models.med_config import MED_CONFIG, MedSource
from models.pretrained import load_pretrained
from models.tokenizer import tokenize
from released import door


class BLIP_NLVR(ImageTextModel):
    """A text encoder that attends to two images in each layer, and a two-way classifier; arguments as the base's."""

    def __init__(
        self, med_config: MedSource = MED_CONFIG, image_size: int = 480, vit: str | Mapping = "base",
        vit_grad_ckpt: bool = False, vit_ckpt_layer: int = 0, drop_path_rate: float = 0.1,
    ):  # fmt: skip
        super().__init__(med_config, image_size, vit, vit_grad_ckpt, vit_ckpt_layer, drop_path_rate)
        self.text_encoder = TextTransformer(self.text_config, two_images=True)
        width = self.text_config.hidden_size
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(
        self, image: torch.Tensor, text: Sequence[str], targets: torch.Tensor, train: bool = True
    ) -> torch.Tensor:
        """Classify statements.

        Args:
            image: float (2 * batch, 3, H, W): all left images, then all right ones, with a text for each pair.
            targets: int64 (batch,), 1 where the statement is true.
            train: return the cross-entropy, a scalar; otherwise the logits of false and true (batch, 2).
        """
        left, right = self.visual_encoder(image).chunk(2)
        tokens = tokenize(self.tokenizer, text, "enc", device=image.device)
        hidden = self.text_encoder(*tokens, self.text_encoder.project(left, right))
        logits = self.cls_head(hidden[:, 0])
        return F.cross_entropy(logits.float(), targets) if train else logits


def blip_nlvr(pretrained: str = "", allow_pickle: bool = False, **kwargs) -> BLIP_NLVR:
    """Build an NLVR2 model; from a pretrained checkpoint both cross-attentions start from its one."""
    return load_pretrained(BLIP_NLVR(**kwargs), pretrained, "nlvr", allow_pickle)


__getattr__ = door(__name__)
