"""Image-text matching."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from models.base import ImageTextModel
from models.losses import similarity, unit_features
from models.med import TextTransformer
from models.med_config import MED_CONFIG, MedSource
from models.pretrained import load_pretrained
from models.tokenizer import tokenize
from utils import UserError

MAX_TEXT_TOKENS = 35


class BLIP_ITM(ImageTextModel):
    """Matching head and contrastive projections over the two encoders; more arguments as the base's.

    Args:
        embed_dim: width of the contrastive features.
        first_token: first token of a text for the matching head: "cls" as in the released model, or "enc" as in
            training, which gives better scores.
    """

    def __init__(
        self, med_config: MedSource = MED_CONFIG, image_size: int = 384, vit: str | Mapping = "base",
        vit_grad_ckpt: bool = False, vit_ckpt_layer: int = 0, embed_dim: int = 256,
        first_token: str = "cls",
    ):  # fmt: skip
        if first_token not in ("cls", "enc"):
            raise UserError(f"first_token is {first_token!r}; expected 'cls' (as released) or 'enc' (as trained)")
        super().__init__(med_config, image_size, vit, vit_grad_ckpt, vit_ckpt_layer)
        config = self.text_config
        self.text_encoder = TextTransformer(config)
        self.vision_proj = nn.Linear(config.encoder_width, embed_dim)
        self.text_proj = nn.Linear(config.hidden_size, embed_dim)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.first_token = first_token

    def forward(self, image: torch.Tensor, caption: Sequence[str], match_head: str = "itm") -> torch.Tensor:
        """Score texts against images.

        Args:
            image: float (batch, 3, H, W).
            caption: texts; one per image for "itm".
            match_head: "itm": logits of "no match" and "match" for each pair (batch, 2); "itc": cosine similarity of
                every image with every text (images, texts).
        """
        if match_head not in ("itm", "itc"):
            raise UserError(f"match_head is {match_head!r}; expected 'itm' or 'itc'")
        image_embeds = self.visual_encoder(image)
        first = self.first_token if match_head == "itm" else "cls"
        text = tokenize(self.tokenizer, caption, first, MAX_TEXT_TOKENS, image.device)
        if match_head == "itm":
            hidden = self.text_encoder(*text, self.text_encoder.project(image_embeds))
            return self.itm_head(hidden[:, 0])
        hidden = self.text_encoder(*text)
        image_feat = unit_features(self.vision_proj, image_embeds[:, 0])
        return similarity(image_feat, unit_features(self.text_proj, hidden[:, 0]))


def blip_itm(pretrained: str = "", allow_pickle: bool = False, **kwargs) -> BLIP_ITM:
    """Build a matching model, with weights from `pretrained` (path, URL, `hf:owner/name`, or '' for none)."""
    return load_pretrained(BLIP_ITM(**kwargs), pretrained, "itm", allow_pickle)
