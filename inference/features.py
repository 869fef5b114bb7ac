"""Features of images, of texts, and of both together, from any checkpoint that has the parts."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inference.options import KINDS
from inference.predictor import Images, Predictor, Row
from models.losses import unit_features
from models.med import TextTransformer
from models.med_config import create_text_config
from models.pretrained import load_pretrained
from models.vit import create_vit
from models.weights import read_source
from utils import UserError


class FeatureModel(nn.Module):
    """The encoders and contrastive projections that a checkpoint has, under the released names.

    `parts` says which of text_encoder, vision_proj and text_proj there are; the others as `models.blip_itm.BLIP_ITM`.
    """

    def __init__(
        self, parts: Collection[str], vit: str | Mapping, image_size: int, med_config: str | Path | Mapping,
        embed_dim: int = 256,
    ):  # fmt: skip
        super().__init__()
        self.visual_encoder, vision_width = create_vit(vit, image_size)
        self.tokenizer, config = create_text_config(med_config, vision_width)
        if "text_encoder" in parts:
            self.text_encoder = TextTransformer(config)
        if "vision_proj" in parts:
            self.vision_proj = nn.Linear(vision_width, embed_dim)
        if "text_proj" in parts:
            self.text_proj = nn.Linear(config.hidden_size, embed_dim)


def feature_model(pretrained: str, allow_pickle: bool = False, **settings: Any) -> FeatureModel:
    """Build the parts that a checkpoint has, with its weights."""
    names = read_source(pretrained, allow_pickle).keys()
    parts = {name.split(".")[0] for name in names}
    if any(name.startswith("text_encoder.") and ".self0." in name for name in names):
        parts.remove("text_encoder")  # NLVR2's reads two images
    return load_pretrained(FeatureModel(parts, **settings), pretrained, "features", allow_pickle)


class Extractor(Predictor):
    """Computes features."""

    def features(self, images: Images, **settings: Any) -> list[Row]:
        """Return features of images; arguments as for `each_features`, which yields them as they come."""
        return list(self.each_features(images, **settings))

    def each_features(
        self, images: Images, kind: str = "cls", texts: Sequence[str] | str = (), **reading: Any
    ) -> Iterator[Row]:
        """Yield {"image", "features"}, float32.

        Args:
            images, reading: as for `Predictor.rows`.
            kind: "cls": the [CLS] token (width,); "tokens": all tokens (1 + patches, width); "image": the unit-length
                contrastive feature (embed_dim,); "multimodal": the [ENC] token of the texts after cross-attention to
                the image (texts, text width), or (text width,) for one text.
            texts: for "multimodal", one or several, each read with every image.

        Raises:
            UserError: another kind, or the checkpoint lacks a part that it needs.
        """
        self.check(kind, ("cls", "tokens", "image", "multimodal"))
        texts = self.checked_texts(texts) if kind == "multimodal" else []

        def predict(image: torch.Tensor, names: list[str]) -> list[Row]:
            tokens = self.model.visual_encoder(image)
            if kind == "image":
                found = unit_features(self.model.vision_proj, tokens[:, 0])
            elif kind == "multimodal":
                found = self.multimodal(tokens, texts)
            else:
                found = tokens if kind == "tokens" else tokens[:, 0]
            return [{"features": row} for row in found.float().cpu().numpy()]

        yield from self.rows(images, predict, **reading)

    @torch.no_grad()
    def each_text(self, texts: Sequence[str] | str, batch_size: int = 16) -> Iterator[Row]:
        """Yield {"text", "features"}, the unit-length contrastive feature of each text, float32 (embed_dim,).

        Raises UserError for an empty text, or a checkpoint that lacks a part.
        """
        self.check("text", KINDS)
        texts = self.checked_texts(texts)
        for start in range(0, len(texts), batch_size):
            part = texts[start : start + batch_size]
            hidden = self.model.text_encoder(*self.tokens_of(part, "cls"))
            feats = unit_features(self.model.text_proj, hidden[:, 0]).cpu().numpy()
            yield from ({"text": text, "features": feat} for text, feat in zip(part, feats, strict=True))

    def multimodal(self, tokens: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """Return the [ENC] states (images, texts, text width), or (images, text width) of one text, of image tokens."""
        ids, mask = (x.repeat(len(tokens), 1) for x in self.tokens_of(texts, "enc"))
        projection = self.model.text_encoder.project(tokens).read_by(len(texts))
        states = self.model.text_encoder(ids, mask, projection)[:, 0]
        return states.view(len(tokens), len(texts), -1) if len(texts) > 1 else states

    def check(self, kind: str, expected: Collection[str]) -> None:
        """Raise a UserError for an unexpected kind, or one for which the checkpoint lacks a part."""
        if kind not in expected:
            raise UserError(f"kind is {kind!r}; expected one of {', '.join(expected)}")
        if lacking := [part for part in KINDS[kind] if not hasattr(self.model, part)]:
            raise UserError(
                f"the checkpoint lacks {' and '.join(lacking)}, which features of kind {kind!r} need; give a "
                "checkpoint of retrieval or pretraining"
            )
