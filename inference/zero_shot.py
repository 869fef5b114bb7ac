"""Classification without training: classes are texts, compared with images by contrast."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from models.blip_itm import BLIP_ITM, MAX_TEXT_TOKENS
from models.losses import similarity, unit_features
from models.tokenizer import tokenize
from utils import UserError


@torch.no_grad()
def class_features(model: BLIP_ITM, classes: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Return a unit feature for each class (classes, embed_dim): the mean over the templates' features.

    Templates are texts with a place {} for the name of the class, such as "a photo of a {}"; UserError for one without.
    """
    if not templates or not all("{}" in template for template in templates):
        raise UserError(f"templates are {list(templates)}; expected texts with a place {{}} for the class")
    device = next(model.parameters()).device
    means = []
    for name in classes:
        texts = [template.replace("{}", name.replace("_", " ")) for template in templates]
        hidden = model.text_encoder(*tokenize(model.tokenizer, texts, "cls", MAX_TEXT_TOKENS, device))
        means.append(unit_features(model.text_proj, hidden[:, 0]).mean(dim=0))
    return F.normalize(torch.stack(means), dim=-1)


@torch.no_grad()
def class_probabilities(
    model: BLIP_ITM, images: torch.Tensor, class_feats: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return probabilities (images, classes): softmax of the cosines over a temperature."""
    feats = unit_features(model.vision_proj, model.visual_encoder(images)[:, 0])
    return (similarity(feats, class_feats) / temperature).softmax(dim=-1)
