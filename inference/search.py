"""Search one's own images: contrast over a saved index finds candidates, matching re-ranks them (section 5.1)."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from data.images import image_batches
from inference.predictor import Matcher, Row
from models.precision import autocast
from utils import ProgressLine, UserError

SAVE_EVERY = 1000  # new images between two savings of an index


class Index:
    """Features of images, kept in a file.

    Args:
        path: of the file; None keeps the index in memory only.
        model: tells whose features they are.

    Raises:
        UserError: the file is no index, or of another model.
    """

    def __init__(self, path: Path | None, model: str):
        self.path, self.model = path, model
        self.known: dict[str, tuple[str, torch.Tensor]] = {}  # absolute path -> stamp (size and time), feature
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                names, stamps = json.loads(metadata["names"]), json.loads(metadata["stamps"])
                feats, model = file.get_tensor("image_feat"), metadata["model"]
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise UserError(f"{path} is no index of images ({error}); choose another --index") from None
        if model != self.model:
            raise UserError(f"index {path} was made with another checkpoint; delete it, or choose another --index")
        self.known = {name: (mark, feat) for name, mark, feat in zip(names, stamps, feats, strict=True)}

    def save(self) -> None:
        """Write the index, whole or not at all.

        Raises:
            UserError: it could not be written.
        """
        if self.path is None or not self.known:
            return
        stamps, feats = zip(*self.known.values(), strict=True)
        metadata = {"names": json.dumps(list(self.known)), "stamps": json.dumps(stamps), "model": self.model}
        temporary = self.path.with_name(self.path.name + ".part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(to_bytes({"image_feat": torch.stack(feats)}, metadata))
            temporary.replace(self.path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"index {self.path} could not be written ({error}); free space or choose --index") from None

    def add(self, matcher: Matcher, images: Sequence[Path], batch_size: int = 16, num_workers: int = 0) -> list[Row]:
        """Add images, reading those that are new or have changed; what was read is saved whatever happens.

        Returns:
            {"image", "error"} of the images that cannot be read.
        """
        stamped = {str(path.absolute()): stamp(path) for path in images}
        fresh = [name for name, mark in stamped.items() if self.known.get(name, ("",))[0] != mark]
        errors: list[Row] = []
        line, saved = ProgressLine(len(fresh), "indexing images"), 0
        try:
            for batch in image_batches(fresh, matcher.transform, batch_size, num_workers):
                good = [fresh[i] for i in batch["index"] if i not in batch["errors"]]
                feats = encode(matcher, batch["image"])[1].cpu() if good else ()
                self.known |= {name: (stamped[name], feat) for name, feat in zip(good, feats, strict=True)}
                errors += [{"image": fresh[i], "error": text} for i, text in batch["errors"].items()]
                line.update(done := batch["index"][-1] + 1)
                if done - saved >= SAVE_EVERY:
                    self.save()
                    saved = done
        finally:
            if fresh:
                self.save()
        line.close()
        return errors

    def part(self, images: Sequence[Path] = ()) -> tuple[list[str], torch.Tensor]:
        """Return names and features (images, embed_dim) of some images, or of all."""
        names = [str(path.absolute()) for path in images] if images else list(self.known)
        names = [name for name in names if name in self.known]
        return names, torch.stack([self.known[name][1] for name in names]) if names else torch.empty(0)


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
    with autocast(matcher.amp, matcher.device):
        tokens = matcher.model.visual_encoder(image.to(matcher.device))
        return tokens, matcher.image_feat(tokens).float()


@torch.no_grad()
def find_images_by_text(
    matcher: Matcher,
    collection: tuple[list[str], torch.Tensor],
    texts: Sequence[str],
    k_test: int = 16,
    top: int = 5,
    batch_size: int = 16,
) -> list[Row]:
    """Find the images that texts describe best.

    Args:
        matcher: from `inference.predictor.load("match", ...)`.
        collection: names and features of the images, from `Index.part`.
        texts: what to look for.
        k_test: most similar images that the matching head re-ranks; at least `top`.
        top: images to return.
        batch_size: images at once.

    Returns:
        For each text {"text", "images": [{"image", "probability", "cosine"}, ...]}, best first, ordered by the
        matching logit plus cosine; and {"image", "error"} for each candidate that cannot be read any more.
    """
    all_names, feats = collection
    similarity = matcher.text_feat(texts) @ feats.to(matcher.device).T
    nearest = similarity.topk(min(max(k_test, top), len(all_names)), dim=1).indices.tolist()
    wanted = sorted({image for row in nearest for image in row})  # each read once, however many texts want it
    found: list[list[tuple[float, Row]]] = [[] for _ in texts]
    errors: list[Row] = []
    names = [all_names[i] for i in wanted]
    for batch in image_batches(names, matcher.transform, batch_size):
        errors += [{"image": names[i], "error": text} for i, text in batch["errors"].items()]
        good = [wanted[i] for i in batch["index"] if i not in batch["errors"]]
        if not good:
            continue
        tokens, _ = encode(matcher, batch["image"])
        for number, (text, row) in enumerate(zip(texts, nearest, strict=True)):
            here = [i for i, image in enumerate(good) if image in set(row)]
            if here:
                with autocast(matcher.amp, matcher.device):
                    logits = matcher.match_logits(tokens[here], [text])[:, 0]
                rows = [{"image": all_names[good[i]]} for i in here]
                found[number] += scored(logits, similarity[number, [good[i] for i in here]], rows)
    return [{"text": text, "images": best(rows, top)} for text, rows in zip(texts, found, strict=True)] + errors


def find_texts_by_image(
    matcher: Matcher,
    images: Sequence[Any],
    texts: Sequence[str],
    k_test: int = 32,
    top: int = 5,
    batch_size: int = 16,
    num_workers: int = 0,
) -> Iterator[Row]:
    """Find the texts that describe images best.

    Args:
        matcher, k_test, top, batch_size: as `find_images_by_text`, with texts re-ranked.
        images: paths or open images.
        texts: all that may be found.
        num_workers: processes that read images.

    Yields:
        For each image {"image", "texts": [{"text", "probability", "cosine"}, ...]}, best first, or an "error".
    """
    with torch.no_grad():
        text_feat = matcher.text_feat(texts)

    def predict(image: torch.Tensor, names: list[str]) -> list[Row]:
        tokens, feats = encode(matcher, image)
        similarity = feats @ text_feat.T
        rows = []
        for i, near in enumerate(similarity.topk(min(max(k_test, top), len(texts)), dim=1).indices.tolist()):
            logits = matcher.match_logits(tokens[i : i + 1], [texts[t] for t in near])[0]
            rows.append({"texts": best(scored(logits, similarity[i, near], [{"text": texts[t]} for t in near]), top)})
        return rows

    yield from matcher.rows(images, predict, batch_size, num_workers)


def scored(logits: torch.Tensor, cosine: torch.Tensor, rows: list[Row]) -> list[tuple[float, Row]]:
    """Return (score, row) of candidates with logits (candidates, 2): the logit of "match" plus cosine, as evaluated."""
    shown = zip(logits.softmax(dim=1)[:, 1].tolist(), cosine.tolist(), rows, strict=True)
    filled = [{**row, "probability": round(p, 4), "cosine": round(c, 4)} for p, c, row in shown]
    return list(zip((logits[:, 1] + cosine).tolist(), filled, strict=True))


def best(rows: list[tuple[float, Row]], top: int) -> list[Row]:
    """Return the rows of the highest scores."""
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])[:top]]
