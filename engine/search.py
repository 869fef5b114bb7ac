"""Search one's own pictures: contrast over a saved index finds candidates, matching re-ranks them (section 5.1)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.pictures import picture_batches
from engine.predictor import Matcher, Row
from utils import ProgressLine, UserError


class Index:
    """Features of pictures: `names`, `stamps` (size and time of each file) and `feats` (pictures, embed_dim)."""

    def __init__(self, names: list[str], stamps: list[str], feats: torch.Tensor):
        self.names, self.stamps, self.feats = names, stamps, feats

    def save(self, path: Path, model: str) -> None:
        """Write the index, whole or not at all; `model` tells whose features it holds.

        Raises:
            UserError: it could not be written.
        """
        temporary = path.with_name(path.name + ".part")
        metadata = {"names": json.dumps(self.names), "stamps": json.dumps(self.stamps), "model": model}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"image_feat": self.feats.contiguous()}, temporary, metadata)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"index {path} could not be written ({error}); free space, or choose another --index"
            ) from None


def read_index(path: Path, model: str) -> Index:
    """Read an index; an absent one, or one of another model, is empty.

    Raises:
        UserError: it is no index.
    """
    if not path.is_file():
        return Index([], [], torch.empty(0))
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("model") != model:
                return Index([], [], torch.empty(0))
            names, stamps = json.loads(metadata["names"]), json.loads(metadata["stamps"])
            return Index(names, stamps, file.get_tensor("image_feat"))
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no index of pictures ({error}); delete it, or choose another --index") from None


def build_index(
    matcher: Matcher, pictures: Sequence[Path], old: Index | None = None, batch_size: int = 16, num_workers: int = 0
) -> tuple[Index, list[Row]]:
    """Index pictures; those that an old index has unchanged are taken from it.

    Returns:
        The index, and {"image", "error"} of pictures that cannot be read.
    """
    known = {} if old is None else dict(zip(zip(old.names, old.stamps, strict=True), old.feats, strict=True))
    stamped = [(str(path), stamp(path)) for path in pictures]
    fresh = [key for key in stamped if key not in known]
    errors = []
    line = ProgressLine(len(fresh), "indexing pictures")
    names = [name for name, _ in fresh]
    for batch in picture_batches(names, matcher.transform, batch_size, num_workers):
        good = [fresh[i] for i in batch["index"] if i not in batch["errors"]]
        if good:
            known |= dict(zip(good, encode(matcher, batch["image"])[1].cpu(), strict=True))
        errors += [{"image": names[i], "error": text} for i, text in batch["errors"].items()]
        line.update(batch["index"][-1] + 1)
    line.close()
    kept = [key for key in stamped if key in known]
    feats = torch.stack([known[key] for key in kept]) if kept else torch.empty(0)
    return Index([name for name, _ in kept], [mark for _, mark in kept], feats), errors


def stamp(path: Path) -> str:
    """Return what changes when a file does."""
    try:
        stat = path.stat()
    except OSError:
        return "absent"
    return f"{stat.st_size:x}-{stat.st_mtime_ns:x}"


@torch.no_grad()
def encode(matcher: Matcher, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images' tokens (images, length, width) and unit features (images, embed_dim)."""
    tokens = matcher.model.visual_encoder(image.to(matcher.device))
    return tokens, matcher.image_feat(tokens).float()


@torch.no_grad()
def find_pictures_by_text(
    matcher: Matcher, index: Index, texts: Sequence[str], k_test: int = 16, top: int = 5, batch_size: int = 16
) -> list[Row]:
    """Find the pictures that texts describe best.

    Args:
        matcher: from `engine.predictor.load("match", ...)`.
        index: of the pictures.
        texts: what to look for.
        k_test: most similar pictures that the matching head re-ranks.
        top: pictures to return.
        batch_size: pictures at once.

    Returns:
        For each text {"text", "images": [{"image", "probability", "cosine"}, ...]}, best first, ordered by the
        matching logit plus cosine.
    """
    similarity = matcher.text_feat(texts) @ index.feats.to(matcher.device).T
    nearest = similarity.topk(min(k_test, len(index.names)), dim=1).indices.tolist()
    wanted = sorted({image for row in nearest for image in row})  # each read once, however many texts want it
    found: list[list[tuple[float, Row]]] = [[] for _ in texts]
    names = [index.names[i] for i in wanted]
    for batch in picture_batches(names, matcher.transform, batch_size):
        good = [wanted[i] for i in batch["index"] if i not in batch["errors"]]
        if not good:
            continue
        tokens, _ = encode(matcher, batch["image"])
        for number, (text, row) in enumerate(zip(texts, nearest, strict=True)):
            here = [i for i, image in enumerate(good) if image in set(row)]
            if here:
                logits = matcher.match_logits(tokens[here], [text])[:, 0]
                found[number] += scored(logits, similarity[number, [good[i] for i in here]],
                                        [{"image": index.names[good[i]]} for i in here])  # fmt: skip
    return [{"text": text, "images": best(rows, top)} for text, rows in zip(texts, found, strict=True)]


@torch.no_grad()
def find_texts_by_picture(
    matcher: Matcher,
    pictures: Sequence[Any],
    texts: Sequence[str],
    k_test: int = 32,
    top: int = 5,
    batch_size: int = 16,
) -> list[Row]:
    """Find the texts that describe pictures best.

    Args:
        matcher, k_test, top, batch_size: as `find_pictures_by_text`, with texts re-ranked.
        pictures: paths or open pictures.
        texts: all that may be found.

    Returns:
        For each picture {"image", "texts": [{"text", "probability", "cosine"}, ...]}, best first, or an "error".
    """
    text_feat = matcher.text_feat(texts)

    def predict(image: torch.Tensor, names: list[str]) -> list[Row]:
        tokens, feats = encode(matcher, image)
        similarity = feats @ text_feat.T
        rows = []
        for i, near in enumerate(similarity.topk(min(k_test, len(texts)), dim=1).indices.tolist()):
            logits = matcher.match_logits(tokens[i : i + 1], [texts[t] for t in near])[0]
            rows.append({"texts": best(scored(logits, similarity[i, near], [{"text": texts[t]} for t in near]), top)})
        return rows

    return list(matcher.rows(pictures, predict, batch_size))


def scored(logits: torch.Tensor, cosine: torch.Tensor, rows: list[Row]) -> list[tuple[float, Row]]:
    """Return (score, row) of candidates with logits (candidates, 2): the logit of "match" plus cosine, as evaluated."""
    shown = zip(logits.softmax(dim=1)[:, 1].tolist(), cosine.tolist(), rows, strict=True)
    filled = [{**row, "probability": round(p, 4), "cosine": round(c, 4)} for p, c, row in shown]
    return list(zip((logits[:, 1] + cosine).tolist(), filled, strict=True))


def best(rows: list[tuple[float, Row]], top: int) -> list[Row]:
    """Return the rows of the highest scores."""
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])[:top]]
