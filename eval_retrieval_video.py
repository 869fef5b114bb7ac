"""Zero-shot text-to-video retrieval with an image-text model, MSRVTT (paper section 5.6)."""


import torch
from torch.nn import functional as F

from models.blip_retrieval import BLIP_Retrieval

EXAMPLES = (
    "python eval_retrieval_video.py --config configs/miniature/retrieval_video.yaml",
    "python -m torch.distributed.run --nproc_per_node=8 eval_retrieval_video.py --config configs/retrieval_msrvtt.yaml",
)


def encode_video(model: BLIP_Retrieval, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of all frames, one after the other, and the mean of the frames' features.

    Args:
        video: float (batch, frames, 3, H, W).
    """
    batch, frames = video.shape[:2]
    embeds = model.visual_encoder(video.flatten(0, 1))  # (batch * frames, tokens, width)
    feats = model.image_feat(embeds).unflatten(0, (batch, frames)).mean(dim=1)
    return embeds.reshape(batch, -1, embeds.shape[-1]), F.normalize(feats, dim=-1)
