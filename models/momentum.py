"""Base of pretraining and retrieval: momentum encoders, feature queues, ITC and ITM (section 3.2, after ALBEF)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.attention import Projection
from models.base import ImageTextModel
from models.losses import itc_loss, itm_loss, similarity, soft_targets, unit_features
from models.med import TextTransformer
from models.med_config import MedSource
from models.tokenizer import TokenBatch
from models.vit import create_vit
from utils import all_gather, get_rank

MOMENTUM_PARTS = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")
INITIAL_TEMPERATURE = 0.07
TEMPERATURE_RANGE = (0.001, 0.5)


@dataclass(frozen=True)
class Candidates:
    """Momentum features that ITC compares a batch with, besides the queues; they include those of the batch."""

    image: torch.Tensor  # as `text` unit features (pairs, embed_dim), without gradient
    text: torch.Tensor
    idx: torch.Tensor | None  # int64 (pairs,), equal for pairs of the same image; None if unknown
    first_row: int  # of the batch
    is_last_batch: bool  # of a step, after which the features enter the queues


class MomentumModel(ImageTextModel):
    """Image and text encoders, their momentum encoders, queues of momentum features, and a matching head.

    Args:
        embed_dim: width of the contrastive features.
        queue_size: number of past features of each kind that ITC compares with.
        momentum: share of the momentum weights that a step keeps.
        itc_all_ranks: ITC compares with the batches of all ranks instead of the local one. Only the online features
            have gradients and each rank computes the loss of its own rows, so the mean that DDP takes over ranks is the
            gradient of one large batch, without communication in the backward pass.
    """

    max_text_tokens: int

    def __init__(
        self, med_config: MedSource, image_size: int, vit: str | Mapping, vit_grad_ckpt: bool, vit_ckpt_layer: int,
        embed_dim: int, queue_size: int, momentum: float, itc_all_ranks: bool = False,
    ):  # fmt: skip
        super().__init__(med_config, image_size, vit, vit_grad_ckpt, vit_ckpt_layer)
        config, vision_width = self.text_config, self.text_config.encoder_width
        # the released order of parameters, by which the state of an optimizer is saved
        self.text_encoder = TextTransformer(config)
        self.vision_proj = nn.Linear(vision_width, embed_dim)
        self.text_proj = nn.Linear(config.hidden_size, embed_dim)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.visual_encoder_m, _ = create_vit(vit, image_size)
        self.vision_proj_m = nn.Linear(vision_width, embed_dim)
        self.text_encoder_m = TextTransformer(config)
        self.text_proj_m = nn.Linear(config.hidden_size, embed_dim)
        self.temp = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))
        self.queue_size, self.momentum, self.itc_all_ranks = queue_size, momentum, itc_all_ranks
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.forward_begins_step = True  # until `begin_step` is called
        copy_params(self)
        self.register_load_state_dict_pre_hook(rename_pointer)

    def image_feat(self, image_embeds: torch.Tensor, suffix: str = "") -> torch.Tensor:
        """Unit features (batch, embed_dim) of image tokens; suffix "_m" selects the momentum projection."""
        return unit_features(getattr(self, "vision_proj" + suffix), image_embeds[:, 0])

    def text_feat(self, text: TokenBatch, suffix: str = "") -> torch.Tensor:
        """Unit features (batch, embed_dim) of texts that begin with [CLS]."""
        hidden = getattr(self, "text_encoder" + suffix)(*text)
        return unit_features(getattr(self, "text_proj" + suffix), hidden[:, 0])

    @torch.no_grad()
    def begin_step(self, by_loop: bool = True) -> None:
        """Clamp the temperature and move the momentum encoders.

        A training loop calls this once per optimizer step, before the first forward of the step. Loops written for
        the released package never do; until the first call, every forward begins a step.
        """
        self.forward_begins_step &= not by_loop
        self.temp.clamp_(*TEMPERATURE_RANGE)
        momentum_params, params = zip(*momentum_pairs(self), strict=True)
        torch._foreach_lerp_(list(momentum_params), list(params), 1 - self.momentum)

    @torch.no_grad()
    def candidates(self, batches: Iterable[tuple[torch.Tensor, TokenBatch, torch.Tensor | None]]) -> list[Candidates]:
        """Return the momentum features that each batch of a step is compared with, before its first forward.

        The batches are all those of the step, in order: images, texts that begin with [CLS], and idx or None, of
        equally many pairs each.
        """
        rows = [
            (self.image_feat(self.visual_encoder_m(image), "_m"), self.text_feat(text, "_m"), idx)
            for image, text, idx in batches
        ]
        size, parts = len(rows[0][0]), list(zip(*rows, strict=True))
        gather = all_gather if self.itc_all_ranks else torch.Tensor.detach
        image, text, idx = (None if part[0] is None else gather(torch.cat(part)) for part in parts)
        start = get_rank() * size * len(rows) if self.itc_all_ranks else 0
        return [Candidates(image, text, idx, start + i * size, i == len(rows) - 1) for i in range(len(rows))]

    def own_candidates(self, image: torch.Tensor, text: TokenBatch, idx: torch.Tensor | None) -> Candidates:
        """Return the candidates of a step of one batch, within its forward; arguments as a batch of `candidates`.

        Sharding makes a forward of its own of `self.candidates`, which a forward must not contain.
        """
        return MomentumModel.candidates(self, [(image, text, idx)])[0]

    def contrast(
        self, feats: tuple[torch.Tensor, torch.Tensor], candidates: Candidates, hard_targets: torch.Tensor, alpha: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ITC against the momentum features of the candidates and of the queues.

        Args:
            feats: online image and text features, each (batch, embed_dim).
            hard_targets: float (batch, candidates + queue_size), rows sum to 1.
            alpha: weight of the soft targets of the momentum encoders.

        Returns:
            The loss, and the similarities over temperature (batch, candidates + queue_size), image to text and text to
            image.
        """
        image_feat, text_feat = feats
        own = slice(candidates.first_row, candidates.first_row + len(image_feat))
        image_feat_m, text_feat_m = candidates.image[own], candidates.text[own]
        image_all = torch.cat((candidates.image, self.image_queue.T))  # copies, so that the queues may change
        text_all = torch.cat((candidates.text, self.text_queue.T))
        with torch.no_grad():
            targets_i2t = soft_targets(similarity(image_feat_m, text_all) / self.temp, hard_targets, alpha)
            targets_t2i = soft_targets(similarity(text_feat_m, image_all) / self.temp, hard_targets, alpha)
        sim_i2t, sim_t2i = similarity(image_feat, text_all) / self.temp, similarity(text_feat, image_all) / self.temp
        return itc_loss(sim_i2t, sim_t2i, targets_i2t, targets_t2i), sim_i2t, sim_t2i

    def match(
        self, text: TokenBatch, projection: Projection, text_negative: TokenBatch, negative_projection: Projection
    ) -> torch.Tensor:
        """ITM of each pair, of each image with its negative text, and of each text with its negative image.

        The texts begin with [ENC] and have one length (batch, length).
        """
        # both texts of an image are adjacent, so that they share its projection
        ids = torch.stack((text.input_ids, text_negative.input_ids), dim=1).flatten(0, 1)
        mask = torch.stack((text.attention_mask, text_negative.attention_mask), dim=1).flatten(0, 1)
        both = self.text_encoder(ids, mask, projection.read_by(2))[:, 0]
        positive, negative_text = both.unflatten(0, (-1, 2)).unbind(dim=1)
        negative_image = self.text_encoder(*text, negative_projection)[:, 0]
        return itm_loss(self.itm_head(positive), self.itm_head(torch.cat((negative_image, negative_text))))


def rename_pointer(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Accept either name of the queue's pointer: checkpoints of other tasks, and of LAVIS, have the other one."""
    for name, other in (("ptr_queue", "queue_ptr"), ("queue_ptr", "ptr_queue")):
        if hasattr(model, name) and prefix + name not in state and prefix + other in state:
            state[prefix + name] = state.pop(prefix + other)


def momentum_pairs(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Yield (momentum, online) pairs of parameters of a model with `<name>_m` beside each of MOMENTUM_PARTS."""
    for name in MOMENTUM_PARTS:
        yield from zip(getattr(model, name + "_m").parameters(), getattr(model, name).parameters(), strict=True)


@torch.no_grad()
def copy_params(model: nn.Module) -> None:
    """Copy the online encoders to the momentum encoders, which take no gradient."""
    for momentum_parameter, parameter in momentum_pairs(model):
        momentum_parameter.copy_(parameter)
        momentum_parameter.requires_grad_(False)


@torch.no_grad()
def enqueue(pointer: torch.Tensor, *queues_and_rows: tuple[torch.Tensor, torch.Tensor], gathered: bool = False) -> None:
    """Replace the oldest entries of queues (width, queue_size) with new rows (batch, width) of all ranks.

    The pointer, int64 (1,), is the next entry to overwrite, wraps around and is updated in place. Of a global batch
    larger than the queue the last rows are kept. `gathered` rows are those of all ranks already.
    """
    for queue, rows in queues_and_rows:
        rows, size = rows if gathered else all_gather(rows), queue.shape[1]
        positions = (pointer + torch.arange(len(rows), device=rows.device)) % size
        queue[:, positions[-size:]] = rows[-size:].T.to(queue.dtype)
    pointer[:] = (pointer + len(rows)) % size
