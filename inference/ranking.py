"""Two-stage ranking of images, or videos, and texts: contrast finds candidates, matching re-ranks them (section 5.1).

Every process keeps the tokens of its own images only and scores all pairs, of both directions, that those images
belong to: an image is projected once, and a pair that both directions ask for is scored once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from models.blip_retrieval import MAX_TEXT_TOKENS
from models.losses import similarity, unit_features
from models.tokenizer import TokenBatch, encodable, tokenize
from utils import UserError, all_gather_object, get_rank, get_world_size, is_main_process, track

NOT_SCORED = -100.0
Encode = Callable[[dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Scores:
    """Score matrices of both directions, empty except on the main process.

    A score is the ITM logit plus cosine similarity of a candidate, and -100 elsewhere.
    """

    i2t: np.ndarray  # float32 (images, texts)
    t2i: np.ndarray  # float32 (texts, images)


@torch.no_grad()
def two_stage_scores(
    model: nn.Module,
    encode: Encode,
    loader: Iterable[dict[str, Any]],
    texts: Sequence[str],
    k_test: int,
    batch_size: int,
    keep_images: str = "auto",
    left_out: Callable[[], tuple[list[int], list[int]]] = lambda: ([], []),
) -> Scores:
    """Score images against texts.

    Args:
        model: a `BLIP_Retrieval` or `BLIP_ITM` in eval mode.
        encode: batch -> image tokens (batch, length, width) and normalised features (batch, embed_dim).
        loader: this process's share of the images: numbers rank, rank + world size, ...
        texts: all texts, the same on every process.
        k_test: candidates per image, and per text; at most as many as there are.
        batch_size: texts at once.
        keep_images: where image tokens wait, see `store_tokens`.
        left_out: asked once all images are encoded: the images, and the texts, that are no candidates.
    """
    device = next(model.parameters()).device
    settings = {"truncation": True, "max_length": MAX_TEXT_TOKENS}
    tokens = [model.tokenizer(encodable(text), **settings).input_ids for text in texts]
    text_feat = encode_texts(model, texts, batch_size, device)
    embeds, feats = encode_images(encode, loader, keep_images)
    image_feat = gather_rows(feats).to(device)
    images = range(get_rank(), len(image_feat), get_world_size())
    own = torch.tensor(images, dtype=torch.long)
    to_texts, to_images = candidates(image_feat, text_feat, own, k_test, *left_out())
    asked, found = wanted_pairs(to_texts, to_images, own), []
    for image, wanted, image_embeds in zip(images, asked, track(embeds, "matching"), strict=True):
        itm = match_image(model, image_embeds.to(device, non_blocking=True), [tokens[t] for t in wanted], batch_size)
        wanted_feat = text_feat[torch.tensor(wanted, dtype=torch.long).to(device, non_blocking=True)]
        found.append(itm + similarity(image_feat[image : image + 1], wanted_feat)[0])
    scores = [row.numpy() for row in torch.cat(found).cpu().split([len(wanted) for wanted in asked])] if found else []
    pairs = [(image, np.array(wanted, np.int64), row) for image, wanted, row in zip(images, asked, scores, strict=True)]
    return fill_matrices(pairs, to_texts, to_images, own, (len(image_feat), len(texts)))


def encode_texts(model: nn.Module, texts: Sequence[str], batch_size: int, device: torch.device) -> torch.Tensor:
    """Return features of all texts (texts, embed_dim), each process encoding its share."""
    share = list(texts[get_rank() :: get_world_size()])
    feats = []
    for start in track(range(0, len(share), batch_size), "texts"):
        text = tokenize(model.tokenizer, share[start : start + batch_size], "cls", MAX_TEXT_TOKENS, device)
        hidden = model.text_encoder(*text)
        feats.append(unit_features(model.text_proj, hidden[:, 0]))
    return gather_rows(torch.cat(feats) if feats else None).to(device)


def store_tokens(image_embeds: torch.Tensor, keep_images: str) -> torch.Tensor:
    """Return image tokens (batch, length, width) as they wait for matching: in the precision of autocast.

    `keep_images` is "device", "host", or "auto": on the host once the device is half full.
    """
    if keep_images not in ("auto", "device", "host"):
        raise UserError(f"keep_images is {keep_images!r}; expected 'auto', 'device' or 'host'")
    kind = image_embeds.device.type
    if torch.is_autocast_enabled(kind):  # the projections round to it anyway
        image_embeds = image_embeds.to(torch.get_autocast_dtype(kind))
    if keep_images == "auto" and kind == "cuda":
        free, total = torch.cuda.mem_get_info(image_embeds.device)
        keep_images = "host" if free < total / 2 else "device"
    return image_embeds.cpu() if keep_images == "host" else image_embeds


def encode_images(
    encode: Encode, loader: Iterable[dict[str, Any]], keep_images: str
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Return the tokens of each own image, and the features of all own images."""
    embeds: list[torch.Tensor] = []
    feats = []
    for batch in track(loader, "images"):
        image_embeds, image_feat = encode(batch)
        embeds += store_tokens(image_embeds, keep_images).split(1)
        feats.append(image_feat)
    return embeds, torch.cat(feats) if feats else None


def gather_rows(own: torch.Tensor | None) -> torch.Tensor:
    """Join the processes' rows (rows, width) on the CPU: row i comes from process i % world size."""
    shards = [shard for shard in all_gather_object(None if own is None else own.cpu()) if shard is not None]
    joined = shards[0].new_empty(sum(map(len, shards)), shards[0].shape[1])
    for rank, shard in enumerate(shards):
        joined[rank :: get_world_size()] = shard
    return joined


def candidates(
    image_feat: torch.Tensor, text_feat: torch.Tensor, own: torch.Tensor, k_test: int,
    without_images: Sequence[int], without_texts: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the k most similar texts of each own image, and the k most similar images of every text."""

    def nearest(similarities: torch.Tensor, without: Sequence[int]) -> torch.Tensor:
        for column in without:
            similarities[:, column] = -torch.inf
        return similarities.topk(min(k_test, similarities.shape[1] - len(without)), dim=1).indices.int()

    own = own.to(image_feat.device, non_blocking=True)
    to_texts = nearest(similarity(image_feat[own], text_feat), without_texts).cpu()
    mine = text_feat[get_rank() :: get_world_size()]
    return to_texts, gather_rows(nearest(similarity(mine, image_feat), without_images))


def wanted_pairs(to_texts: torch.Tensor, to_images: torch.Tensor, own: torch.Tensor) -> list[list[int]]:
    """Return for each own image the texts, sorted, that it is to be scored with in either direction."""
    row_of = {int(image): row for row, image in enumerate(own)}
    asked: list[set[int]] = [set(row) for row in to_texts.tolist()]
    for text, images in enumerate(to_images.tolist()):
        for image in images:
            if image in row_of:
                asked[row_of[image]].add(text)
    return [sorted(wanted) for wanted in asked]


def match_image(
    model: nn.Module, image_embeds: torch.Tensor, token_ids: Sequence[Sequence[int]], batch_size: int
) -> torch.Tensor:
    """Return the ITM logit of "match" of one image's tokens (1, length, width) with many texts (texts,)."""
    projection = model.text_encoder.project(image_embeds)
    order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
    logits = image_embeds.new_empty(len(token_ids), dtype=torch.float32)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]  # texts of like length, so little padding
        text = pad([token_ids[i] for i in part], model.tokenizer, image_embeds.device)
        hidden = model.text_encoder(*text, projection.read_by(len(part)))
        rows = torch.tensor(part).to(logits.device, non_blocking=True)
        logits[rows] = model.itm_head(hidden[:, 0])[:, 1].float()
    return logits


def pad(rows: Sequence[Sequence[int]], tokenizer: Any, device: torch.device) -> TokenBatch:
    """Make a batch of token ids, padded to the longest, with [ENC] in front."""
    input_ids = pad_sequence([torch.tensor(row) for row in rows], True, tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True)
    return TokenBatch(input_ids, mask).with_first(tokenizer.enc_token_id).to(device)


def fill_matrices(
    pairs: list[tuple[int, np.ndarray, np.ndarray]], to_texts: torch.Tensor, to_images: torch.Tensor, own: torch.Tensor,
    shape: tuple[int, int],
) -> Scores:  # fmt: skip
    """Gather all pairs on the main process and lay them out; each direction shows its own candidates only."""
    shards = all_gather_object((own.numpy(), to_texts.numpy(), pairs))
    if not is_main_process():
        return Scores(np.empty((0, 0), np.float32), np.empty((0, 0), np.float32))
    scored = np.full(shape, NOT_SCORED, np.float32)
    for _, _, shard in shards:
        for image, texts, scores in shard:
            scored[image, texts] = scores
    i2t, t2i = np.full(shape, NOT_SCORED, np.float32), np.full(shape[::-1], NOT_SCORED, np.float32)
    for images, texts, _ in shards:
        i2t[images[:, None], texts] = scored[images[:, None], texts]
    rows = np.arange(shape[1])[:, None]
    t2i[rows, to_images.numpy()] = scored[to_images.numpy(), rows]
    return Scores(i2t, t2i)
