"""Pretraining with ITC, ITM and LM (section 3.2)."""

from collections.abc import Mapping, Sequence

import torch

from models.attention import Projection
from models.losses import draw_negatives
from models.med import TextDecoder
from models.med_config import BERT_CONFIG, MedSource
from models.momentum import Candidates, MomentumModel, enqueue
from models.pretrained import load_pretrained
from models.tokenizer import TokenBatch, tokenize
from released import door

MAX_TEXT_TOKENS = 30
NEGATIVE_FLOOR = 1e-4  # added to the probability of each negative


class BLIP_Pretrain(MomentumModel):
    """Pretraining model; more arguments as the base's.

    The decoder shares embeddings, cross-attention and feed-forward with the text encoder, so that ITM and LM use one
    projection of each image. With `smooth_padding` label smoothing includes padding, with all texts padded to 30
    tokens, as in the released training.
    """

    max_text_tokens = MAX_TEXT_TOKENS

    def __init__(
        self, med_config: MedSource = BERT_CONFIG, image_size: int = 224, vit: str | Mapping = "base",
        vit_grad_ckpt: bool = False, vit_ckpt_layer: int = 0, embed_dim: int = 256, queue_size: int = 57600,
        momentum: float = 0.995, smooth_padding: bool = True, itc_all_ranks: bool = False,
    ):  # fmt: skip
        super().__init__(
            med_config, image_size, vit, vit_grad_ckpt, vit_ckpt_layer, embed_dim, queue_size, momentum, itc_all_ranks
        )
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.text_decoder = TextDecoder(self.text_config, shared_with=self.text_encoder)
        self.smooth_padding = smooth_padding

    def forward(
        self, image: torch.Tensor, caption: Sequence[str], alpha: float, candidates: Candidates | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the losses loss_ita, loss_itm and loss_lm, scalars.

        Args:
            image: float (batch, 3, H, W), with a caption each.
            alpha: weight of the soft targets of the momentum encoders.
            candidates: from `MomentumModel.candidates`, in a step of several batches; None in a step of one.
        """
        if self.forward_begins_step:
            self.begin_step(by_loop=False)
        tokens = tokenize(self.tokenizer, caption, "cls", MAX_TEXT_TOKENS)
        text = tokens.to(image.device)
        image_embeds = self.visual_encoder(image)
        feats = self.image_feat(image_embeds), self.text_feat(text)
        candidates = candidates or self.own_candidates(image, text, None)
        own = torch.arange(candidates.first_row, candidates.first_row + len(image), device=image.device)
        columns = torch.arange(len(candidates.image) + self.queue_size, device=image.device)
        hard_targets = (own[:, None] == columns).float()
        loss_ita, sim_i2t, sim_t2i = self.contrast(feats, candidates, hard_targets, alpha)
        if candidates.is_last_batch:
            rows = (self.image_queue, candidates.image), (self.text_queue, candidates.text)
            enqueue(self.queue_ptr, *rows, gathered=self.itc_all_ranks)

        projection = self.text_encoder.project(image_embeds)
        batch = slice(candidates.first_row, candidates.first_row + len(image))
        loss_itm = self.matching_loss(text, projection, sim_i2t[:, batch], sim_t2i[:, batch])
        return loss_ita, loss_itm, self.language_loss(tokens, projection)

    def matching_loss(
        self, text: TokenBatch, projection: Projection, sim_i2t: torch.Tensor, sim_t2i: torch.Tensor
    ) -> torch.Tensor:
        """ITM with negatives of the local batch, drawn by similarity to its momentum features (batch, batch)."""
        batch = len(sim_i2t)
        text = text.with_first(self.tokenizer.enc_token_id)
        own = torch.eye(batch, dtype=torch.bool, device=sim_i2t.device)
        negative_image = draw_negatives(sim_t2i.detach(), own, NEGATIVE_FLOOR)
        negative_text = draw_negatives(sim_i2t.detach(), own, NEGATIVE_FLOOR)
        return self.match(text, projection, text.select(negative_text), projection.select(negative_image))

    def language_loss(self, text: TokenBatch, projection: Projection) -> torch.Tensor:
        """LM of texts on the CPU."""
        text = text.with_first(self.tokenizer.bos_token_id)
        if self.smooth_padding:
            text = text.padded_to(MAX_TEXT_TOKENS, self.tokenizer.pad_token_id)
        return self.text_decoder.next_token_loss(text, projection, self.smooth_padding)


def blip_pretrain(pretrained: str = "", allow_pickle: bool = False, **kwargs) -> BLIP_Pretrain:
    """Build a pretraining model, with weights from `pretrained` (path, URL, or '' for none)."""
    return load_pretrained(BLIP_Pretrain(**kwargs), pretrained, "pretrain", allow_pickle)


__getattr__ = door(__name__)
