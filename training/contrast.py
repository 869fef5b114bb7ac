"""Accumulated batches whose contrast is that of one large batch.

ITC compares online features with momentum features, and only the online ones have a gradient. So the loss of a
large batch is a mean over its rows, each of which needs the momentum features of all pairs and its own online
features alone: the momentum features of all batches are computed first, without gradients, and then each batch goes
forward and backward once. Nothing is computed a second time, so there are no random numbers to repeat, and memory is
a single batch's, with the gradients that wait beside it (figures in docs/large_runs.md). Matching and language
modelling are means of the batches' own, with hard negatives from the batch.
"""

from collections.abc import Iterator
from typing import Any

import torch

from models.momentum import MomentumModel
from models.tokenizer import TokenBatch


def add_candidates(model: MomentumModel, batches: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Give each batch of a step the momentum features that ITC compares it with, as "candidates".

    Args:
        model: a model for pretraining or retrieval.
        batches: with "image" and "caption", for retrieval also "idx"; of equally many pairs.
        device: where the model is.
    """

    def inputs() -> Iterator[tuple[torch.Tensor, TokenBatch, torch.Tensor | None]]:
        for batch in batches:  # one at a time on the device
            idx = batch.get("idx")
            text = model.tokenize(batch["caption"], model.max_text_tokens, device)
            yield batch["image"].to(device), text, None if idx is None else idx.to(device)

    found = model.candidates(inputs())
    return [{**batch, "candidates": candidates} for batch, candidates in zip(batches, found, strict=True)]
