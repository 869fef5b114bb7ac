"""Fine-tuning for image-text retrieval: ITC and ITM (section 4.1)."""

from collections.abc import Mapping, Sequence

import torch

from models.losses import draw_negatives, similarity
from models.med_config import MED_CONFIG, MedSource
from models.momentum import Candidates, MomentumModel, enqueue
from models.pretrained import load_pretrained
from models.tokenizer import TokenBatch, tokenize
from released import door
from utils import all_gather, all_gather_with_grad, get_world_size

MAX_TEXT_TOKENS = 35
EMPTY_INDEX = -100  # image index of queue entries that are still random


class BLIP_Retrieval(MomentumModel):
    """Retrieval model; with `negative_all_rank` negatives come from all ranks. More arguments as the base's."""

    max_text_tokens = MAX_TEXT_TOKENS

    def __init__(
        self, med_config: MedSource = MED_CONFIG, image_size: int = 384, vit: str | Mapping = "base",
        vit_grad_ckpt: bool = False, vit_ckpt_layer: int = 0, embed_dim: int = 256, queue_size: int = 57600,
        momentum: float = 0.995, negative_all_rank: bool = False, itc_all_ranks: bool = False,
    ):  # fmt: skip
        super().__init__(
            med_config, image_size, vit, vit_grad_ckpt, vit_ckpt_layer, embed_dim, queue_size, momentum, itc_all_ranks
        )
        self.negative_all_rank = negative_all_rank
        self.register_buffer("idx_queue", torch.full((1, queue_size), EMPTY_INDEX))
        self.register_buffer("ptr_queue", torch.zeros(1, dtype=torch.long))

    def forward(
        self, image: torch.Tensor, caption: Sequence[str], alpha: float, idx: torch.Tensor,
        candidates: Candidates | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Return the losses loss_ita and loss_itm, scalars.

        Args:
            image, alpha, candidates: as for `BLIP_Pretrain`.
            idx: int64 (batch,); equal where pairs have the same image.
        """
        if self.forward_begins_step:
            self.begin_step(by_loop=False)
        idx = idx.to(image.device, non_blocking=True)
        text = tokenize(self.tokenizer, caption, "cls", MAX_TEXT_TOKENS, image.device)
        image_embeds = self.visual_encoder(image)
        feats = self.image_feat(image_embeds), self.text_feat(text)
        candidates = candidates or self.own_candidates(image, text, idx)
        loss_ita, _, _ = self.contrast(feats, candidates, self.hard_targets(idx, candidates.idx), alpha)
        if candidates.is_last_batch:
            rows = (self.image_queue, candidates.image), (self.text_queue, candidates.text)
            enqueue(self.ptr_queue, *rows, (self.idx_queue, candidates.idx[:, None]), gathered=self.itc_all_ranks)
        return loss_ita, self.matching_loss(image_embeds, text, feats, idx)

    def hard_targets(self, idx: torch.Tensor, idx_all: torch.Tensor) -> torch.Tensor:
        """Uniform targets over all entries of the same image (batch, candidates + queue_size)."""
        same = (idx[:, None] == torch.cat((idx_all[None], self.idx_queue), dim=1)).float()
        return same / same.sum(dim=1, keepdim=True)

    def matching_loss(
        self, image_embeds: torch.Tensor, text: TokenBatch, feats: tuple[torch.Tensor, torch.Tensor], idx: torch.Tensor
    ) -> torch.Tensor:
        """ITM with negatives of other images, from the local batch or from all ranks."""
        text = text.with_first(self.tokenizer.enc_token_id)
        projection = self.text_encoder.project(image_embeds)
        if self.negative_all_rank and get_world_size() > 1:
            text = text.padded_to(MAX_TEXT_TOKENS, self.tokenizer.pad_token_id)  # one length on all ranks
            texts = TokenBatch(all_gather(text.input_ids), all_gather(text.attention_mask))
            negative_image, negative_text = self.negatives(feats, idx, gather=True)
            # gradients flow back to the ranks of these images
            negative_projection = self.text_encoder.project(all_gather_with_grad(image_embeds)[negative_image])
        else:
            texts = text
            negative_image, negative_text = self.negatives(feats, idx, gather=False)
            negative_projection = projection.select(negative_image)
        return self.match(text, projection, texts.select(negative_text), negative_projection)

    @torch.no_grad()
    def negatives(
        self, feats: tuple[torch.Tensor, torch.Tensor], idx: torch.Tensor, gather: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw an image for each text and a text for each image, int64 (batch,), from the local rank or from all."""
        image_feat, text_feat = feats
        images, texts, indices = (
            (all_gather(x) for x in (image_feat, text_feat, idx)) if gather else (image_feat, text_feat, idx)
        )
        same = idx[:, None] == indices[None]
        image = draw_negatives(similarity(text_feat, images) / self.temp, same)
        return image, draw_negatives(similarity(image_feat, texts) / self.temp, same)


def blip_retrieval(pretrained: str = "", allow_pickle: bool = False, **kwargs) -> BLIP_Retrieval:
    """Build a retrieval model, with weights from `pretrained` (path, URL, `hf:owner/name`, or '' for none)."""
    return load_pretrained(BLIP_Retrieval(**kwargs), pretrained, "retrieval", allow_pickle)


__getattr__ = door(__name__)
