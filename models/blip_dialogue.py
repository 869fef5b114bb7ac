"""Visual dialogue: judge an answer to a question about an image, given its caption and the dialogue (section 5.5)."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from models.attention import Projection
from models.base import ImageTextModel
from models.med import TextTransformer
from models.med_config import MED_CONFIG, MedSource
from models.pretrained import load_pretrained
from models.tokenizer import tokenize

GROUP = 4  # dialogues of an image that are padded to one length


class BLIP_Dialogue(ImageTextModel):
    """Text encoder of captions and dialogues, and the matching head on a dialogue's first token.

    Dialogues attend to the tokens of the image and of its caption, concatenated. A dialogue that is longer than the
    position table loses its oldest words. Arguments as `ImageTextModel`.
    """

    def __init__(
        self, med_config: MedSource = MED_CONFIG, image_size: int = 384, vit: str | Mapping = "base",
        vit_grad_ckpt: bool = False, vit_ckpt_layer: int = 0, drop_path_rate: float = 0.0,
    ):  # fmt: skip
        super().__init__(med_config, image_size, vit, vit_grad_ckpt, vit_ckpt_layer, drop_path_rate)
        width, image_width = self.text_config.hidden_size, self.text_config.encoder_width
        self.text_encoder = TextTransformer(self.text_config)
        self.caption_proj = nn.Identity() if width == image_width else nn.Linear(width, image_width)
        self.itm_head = nn.Linear(width, 2)
        self.tokenizer.truncation_side = "left"

    def forward(
        self, image: torch.Tensor, caption: Sequence[str], dialogue: Sequence[str],
        targets: torch.Tensor | None = None, train: bool = True,
    ) -> torch.Tensor:  # fmt: skip
        """Judge whether the last answer of a dialogue is right.

        Args:
            image: float (batch, 3, H, W).
            caption: one per image.
            dialogue: texts that end in an answer, as many for each image, those of one image together.
            targets: int64 (dialogues,), 1 where the answer is right, for the loss.
            train: return the matching loss, a scalar; otherwise logits of wrong and right (dialogues, 2).
        """
        logits = self.judge_by_length(self.project(image, caption), dialogue, len(dialogue) // len(image))
        return F.cross_entropy(logits.float(), targets) if train else logits

    def project(self, image: torch.Tensor, caption: Sequence[str]) -> Projection:
        """Encode images and captions, and project them once for all dialogues about them."""
        image_embeds = self.visual_encoder(image)  # (batch, image tokens, image width)
        text = tokenize(self.tokenizer, caption, device=image.device)
        caption_embeds = self.caption_proj(self.text_encoder(*text))  # (batch, caption tokens, image width)
        atts = torch.cat((text.attention_mask.new_ones(image_embeds.shape[:2]), text.attention_mask), dim=1)
        return self.text_encoder.project(torch.cat((image_embeds, caption_embeds), dim=1), mask=atts)

    def judge_by_length(self, projection: Projection, dialogue: Sequence[str], per_image: int) -> torch.Tensor:
        """As `judge`, a few dialogues of each image at a time, the shortest first: padding costs as much as words."""
        firsts = range(0, len(dialogue), per_image)
        order = [sorted(range(first, first + per_image), key=lambda n: len(dialogue[n])) for first in firsts]
        numbers, logits = [], []
        for start in range(0, per_image, GROUP):
            group = [own[start : start + GROUP] for own in order]
            chosen = [number for own in group for number in own]
            logits.append(self.judge(projection.read_by(len(group[0])), [dialogue[number] for number in chosen]))
            numbers += chosen
        places = torch.tensor(numbers).argsort().to(logits[0].device, non_blocking=True)
        return torch.cat(logits)[places]

    def judge(self, projection: Projection, dialogue: Sequence[str]) -> torch.Tensor:
        """Return the logits of wrong and right (dialogues, 2) of dialogues that read a projection."""
        text = tokenize(self.tokenizer, dialogue, "enc", device=self.itm_head.weight.device)
        return self.itm_head(self.text_encoder(*text, projection)[:, 0])


def blip_dialogue(pretrained: str = "", allow_pickle: bool = False, **kwargs) -> BLIP_Dialogue:
    """Build a dialogue model, with weights from `pretrained` (path, URL, `hf:owner/name`, or '' for none)."""
    return load_pretrained(BLIP_Dialogue(**kwargs), pretrained, "dialogue", allow_pickle)
