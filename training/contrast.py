"""The contrast of several accumulated batches as that of one large batch (`itc_cached`).

Image-text contrast compares online features with momentum features, and only the online features have a gradient. The
loss of a large batch is a mean over its rows, and a row needs its own online features and the momentum features of all
pairs. The momentum features of all batches are therefore computed first, without gradients; each batch then runs
forward and backward once, so nothing is computed twice and memory is that of one batch. Matching and language modelling
stay means over the batches, with hard negatives from the same batch.
"""

from typing import Any

from models.momentum import Candidates, MomentumModel
from models.tokenizer import tokenize


def compute_candidates(model: MomentumModel, batches: list[dict[str, Any]]) -> list[Candidates]:
    """Return what each batch of a step, on the model's device and of one size, is contrasted with."""
    device, length = batches[0]["image"].device, model.max_text_tokens
    texts = [tokenize(model.tokenizer, batch["caption"], "cls", length, device) for batch in batches]
    return model.candidates((b["image"], text, b.get("idx")) for b, text in zip(batches, texts, strict=True))
