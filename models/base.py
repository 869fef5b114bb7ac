"""What every model begins with: the image encoder, the tokenizer and the configuration of the text transformers."""

from collections.abc import Mapping

from torch import nn

from models.med_config import MedSource, create_text_config
from models.vit import create_vit, vit_sizes


class ImageTextModel(nn.Module):
    """Base of the models, which add text transformers and heads.

    Args:
        med_config: configuration of the text transformers, a JSON path or a mapping.
        image_size: side of the square input in pixels.
        vit: "tiny", "small", "base", "large" or a mapping of sizes (see `models.vit.create_vit`).
        vit_grad_ckpt, vit_ckpt_layer: recompute the last `vit_ckpt_layer` ViT blocks in the backward pass.
        drop_path_rate: stochastic depth of the ViT.
    """

    def __init__(
        self, med_config: MedSource, image_size: int, vit: str | Mapping, vit_grad_ckpt: bool, vit_ckpt_layer: int,
        drop_path_rate: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.vit_sizes = vit_sizes(vit)
        self.visual_encoder, vision_width = create_vit(vit, image_size, vit_grad_ckpt, vit_ckpt_layer, drop_path_rate)
        self.tokenizer, self.text_config = create_text_config(med_config, vision_width)
