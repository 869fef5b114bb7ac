"""The image encoder: timm's Vision Transformer in BLIP's sizes, with gradient checkpointing (paper section 3.1)."""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import vision_transformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.med_config import activation
from released import door
from utils import UserError

VARIANTS = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3, patch_size=16),
    "small": dict(embed_dim=384, depth=12, num_heads=6, patch_size=16),
    "base": dict(embed_dim=768, depth=12, num_heads=12, patch_size=16),
    "large": dict(embed_dim=1024, depth=24, num_heads=16, patch_size=16),
}
OPTIONAL_SIZES = ("mlp_width", "layer_norm_eps", "hidden_act")  # 4 * embed_dim, 1e-6 and "gelu" if not given
LARGE_DROP_PATH_RATE = 0.1  # the released large ViT has stochastic depth in every task


class VisionTransformer(vision_transformer.VisionTransformer):
    """timm's Vision Transformer, which can recompute its last blocks in the backward pass to save memory.

    Args:
        img_size, patch_size: sides of the square input and of a patch in pixels.
        ckpt_layer: number of final blocks to checkpoint, with `use_grad_checkpointing`.
        settings: as for timm's class; there is no classifier, whatever `num_classes` says.
    """

    def __init__(
        self, img_size: int = 224, patch_size: int = 16, use_grad_checkpointing: bool = False, ckpt_layer: int = 0,
        **settings: Any,
    ):  # fmt: skip
        settings |= {"num_classes": 0, "global_pool": ""}
        settings["norm_layer"] = settings.get("norm_layer") or partial(nn.LayerNorm, eps=1e-6)
        super().__init__(img_size, patch_size, **settings)
        self.num_checkpointed = min(ckpt_layer, len(self.blocks)) if use_grad_checkpointing else 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Encode images (batch, 3, H, W) to tokens (batch, 1 + patches, width)."""
        x = self.norm_pre(self._pos_embed(self.patch_embed(image)))
        first = len(self.blocks) - (self.num_checkpointed if torch.is_grad_enabled() else 0)
        for index, block in enumerate(self.blocks):
            x = block(x) if index < first else checkpoint(block, x, use_reentrant=False)
        return self.norm(x)

    def use_fairscale(self) -> None:
        """Recompute the checkpointed blocks by fairscale's wrapper instead of PyTorch's, as the released code does."""
        try:
            from fairscale.nn.checkpoint import checkpoint_wrapper
        except ImportError:
            raise UserError("grad_ckpt: fairscale needs the package; pip install fairscale, or use torch") from None
        for block in self.blocks[len(self.blocks) - self.num_checkpointed :]:
            checkpoint_wrapper(block)
        self.num_checkpointed = 0


def create_vit(
    vit: str | Mapping, image_size: int, use_grad_checkpointing: bool = False, ckpt_layer: int = 0,
    drop_path_rate: float = 0.0,
) -> tuple[nn.Module, int]:  # fmt: skip
    """Build the image encoder; return it and its width. UserError for an unknown variant or impossible sizes.

    Args:
        vit: "tiny", "small", "base", "large", or a mapping with embed_dim, depth, num_heads, patch_size, and perhaps
            OPTIONAL_SIZES.
        image_size: side of the square input in pixels; a multiple of the patch size.
        use_grad_checkpointing, ckpt_layer: as `VisionTransformer`.
        drop_path_rate: stochastic depth of the last block (0 to 1), growing linearly from 0 at the first block.
    """
    sizes = vit_sizes(vit)
    if image_size % sizes["patch_size"]:
        raise UserError(
            f"image_size {image_size} is not a multiple of the ViT's patch size {sizes['patch_size']}; "
            f"use {image_size - image_size % sizes['patch_size']} instead"
        )
    sizes["drop_path_rate"] = drop_path_rate or (LARGE_DROP_PATH_RATE if vit == "large" else 0.0)
    sizes |= {"use_grad_checkpointing": use_grad_checkpointing, "ckpt_layer": ckpt_layer}
    if "mlp_width" in sizes:  # half a unit more, because timm rounds down
        sizes["mlp_ratio"] = (sizes.pop("mlp_width") + 0.5) / sizes["embed_dim"]
    if "layer_norm_eps" in sizes:
        sizes["norm_layer"] = partial(nn.LayerNorm, eps=sizes.pop("layer_norm_eps"))
    if "hidden_act" in sizes:
        sizes["act_layer"] = partial(activation, sizes.pop("hidden_act"))
    return VisionTransformer(image_size, **sizes), sizes["embed_dim"]


def vit_sizes(vit: str | Mapping) -> dict[str, Any]:
    """Return embed_dim, depth, num_heads and patch_size of a named variant, or what a mapping has."""
    if isinstance(vit, str) and vit in VARIANTS:
        return dict(VARIANTS[vit])
    if isinstance(vit, Mapping) and set(vit) - {*OPTIONAL_SIZES} == set(VARIANTS["base"]):
        with suppress(TypeError, ValueError, OverflowError):
            sizes = {key: int(vit[key]) for key in VARIANTS["base"]}
            numbers = *sizes.values(), vit.get("mlp_width", 1), vit.get("layer_norm_eps", 1)
            if min(numbers) > 0 and not sizes["embed_dim"] % sizes["num_heads"]:
                return {**vit, **sizes}
    raise UserError(
        f"vit is {vit!r}; expected one of {', '.join(VARIANTS)}, or a mapping with exactly the keys "
        f"{', '.join(VARIANTS['base'])}: whole numbers above 0, and num_heads divides embed_dim"
    )


def interpolate_pos_embed(pos_embed_checkpoint: torch.Tensor, visual_encoder: nn.Module) -> torch.Tensor:
    """Resize position embeddings (1, 1 + grid * grid, width) to the encoder's grid, bicubically; [CLS] is kept."""
    num_patches = visual_encoder.patch_embed.num_patches
    num_extra = visual_encoder.pos_embed.shape[-2] - num_patches
    old_grid = int((pos_embed_checkpoint.shape[-2] - num_extra) ** 0.5)
    new_grid = int(num_patches**0.5)
    if old_grid == new_grid:
        return pos_embed_checkpoint
    extra, grid = pos_embed_checkpoint.split([num_extra, old_grid**2], dim=1)
    grid = grid.reshape(1, old_grid, old_grid, -1).permute(0, 3, 1, 2)  # (1, width, grid, grid)
    grid = F.interpolate(grid.float(), size=(new_grid, new_grid), mode="bicubic", align_corners=False)
    return torch.cat((extra, grid.flatten(2).transpose(1, 2).to(extra.dtype)), dim=1)


__getattr__ = door(__name__)
