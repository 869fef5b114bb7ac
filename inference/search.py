"""Search one's own images: contrast over a saved index finds candidates, matching re-ranks them (section 5.1)."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from data.images import image_batches, is_url
from files import write_whole
from inference.neighbours import LARGE, Collection, approximate
from inference.predictor import Images, Row
from inference.tasks import Matcher
from models.losses import similarity
from utils import ProgressLine, UserError, note

SAVE_EVERY = 1000  # new images between two savings of an index
CHUNK = 1 << 20


class Index:
    """Features of images, kept in a file, or without `path` in memory. Images that no longer exist are left out.

    `model` is the fingerprint of the model. Raises UserError for a file that is not an index, or is of another model.
    """

    def __init__(self, path: Path | None, model: str):
        self.path, self.model = path, model
        self.known: dict[str, tuple[str, str, torch.Tensor]] = {}  # name -> stamp, hash of the content, feature
        self.by_hash: dict[str, torch.Tensor] = {}  # of images that no longer exist too: they may have been moved
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if "lists" in file.keys():  # noqa: SIM118
                    lists = json.loads(file.get_tensor("lists").numpy().tobytes())
                else:  # an earlier version kept them in the metadata, which readers limit to 100 MB
                    lists = {key: json.loads(metadata[key]) for key in ("names", "stamps", "hashes")}
                names, stamps, hashes = lists["names"], lists["stamps"], lists["hashes"]
                feats, model = file.get_tensor("image_feat"), metadata["model"]
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise UserError(f"{path} is no index of images ({error}); choose another --index") from None
        if model != self.model:
            raise UserError(f"index {path} was made with another checkpoint; delete it, or choose another --index")
        entries = zip(names, stamps, hashes, feats, strict=True)
        self.known = {name: entry for name, *entry in entries if is_url(name) or os.path.exists(name)}  # type: ignore
        self.by_hash = dict(zip(hashes, feats, strict=True))
        if gone := len(names) - len(self.known):
            note(f"{gone} images of index {path} no longer exist and are left out")

    def save(self) -> None:
        """Write the index, whole or not at all, as `files.write_whole`."""
        if self.path is None or not self.known:
            return
        stamps, hashes, feats = zip(*self.known.values(), strict=True)
        lists = json.dumps({"names": list(self.known), "stamps": stamps, "hashes": hashes}).encode()
        tensors = {"image_feat": torch.stack(feats), "lists": torch.frombuffer(bytearray(lists), dtype=torch.uint8)}
        with write_whole(self.path, "wb") as file:
            file.write(to_safetensors(tensors, {"model": self.model}))

    def add(
        self, matcher: Matcher, images: Sequence[Path | str], batch_size: int = 16, num_workers: int = 0
    ) -> list[Row]:
        """Add images, paths or URLs, and return {"image", "error"} of those that cannot be read.

        Only content that is new is encoded, and what is encoded is saved whatever happens.
        """
        errors: list[Row] = []
        fresh = self._take_known({name_of(image): stamp(image) for image in images})
        line, saved = ProgressLine(len(fresh), "indexing images"), 0
        names = list(fresh)

        def features(image: torch.Tensor, _: Sequence[str]) -> Iterable[torch.Tensor]:
            return encode(matcher, image)[1].cpu()

        try:
            for batch in image_batches(names, matcher.transform, batch_size, num_workers):
                good = [names[i] for i in batch["index"] if i not in batch["errors"]]
                feats = matcher.predict_in_parts(features, batch["image"], good)
                self.known |= {name: (*fresh[name], feat) for name, feat in zip(good, feats, strict=True)}
                for i, text in batch["errors"].items():
                    self.known.pop(names[i], None)  # of its earlier content
                    errors.append({"image": names[i], "error": text})
                line.update(done := batch["index"][-1] + 1)
                if done - saved >= SAVE_EVERY:
                    self.save()
                    saved = done
        finally:
            if fresh:
                self.save()
        line.close()
        return errors

    def _take_known(self, stamps: dict[str, str]) -> dict[str, tuple[str, str]]:
        """Return stamp and hash of the images whose content is new; take the features of copies of known images."""
        self.by_hash |= {digest: feat for _, digest, feat in self.known.values()}
        fresh = {}
        for name, mark in stamps.items():
            if name in self.known and self.known[name][0] == mark:
                continue
            digest = hash_of(name)
            if digest in self.by_hash:
                self.known[name] = (mark, digest, self.by_hash[digest])
            else:
                fresh[name] = (mark, digest)
        return fresh

    def part(self, images: Sequence[Path | str] = (), exact: bool = False) -> Collection:
        """Return some of the images, or all, which are searched approximately if they are many, unless `exact`."""
        wanted = {name_of(image) for image in images} if images else self.known.keys()
        names = [name for name in self.known if name in wanted]
        feats = torch.stack([self.known[name][2] for name in names]) if names else torch.empty(0)
        large = len(names) > LARGE and len(names) == len(self.known)
        index = approximate(feats, self.path) if large and self.path is not None and not exact else None
        return Collection(names, feats, index)


def name_of(image: Path | str) -> str:
    """Return the name of an image in an index: a URL, or an absolute path."""
    return str(image) if is_url(str(image)) else os.path.abspath(image)


def stamp(image: Path | str) -> str:
    """Return size and times of a file; while they are the same, so is its content."""
    with suppress(OSError):
        stat = os.stat(image)
        return f"{stat.st_size:x}-{stat.st_mtime_ns:x}-{stat.st_ctime_ns:x}"
    return ""


def hash_of(image: str) -> str:
    """Return a hash of a file's content; of a URL or a file that cannot be read, of its name."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(image, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError:
        digest.update(image.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def encode(matcher: Matcher, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens (images, length, width) and unit features (images, embed_dim) of images."""
    tokens = matcher.model.visual_encoder(image)
    return tokens, matcher.image_feat(tokens)


def find_images_by_text(
    matcher: Matcher, collection: Collection, texts: Sequence[str], k_test: int = 16, top: int = 5, batch_size: int = 16
) -> list[Row]:
    """Find the `top` images that texts describe best.

    The matching head re-ranks the `k_test` most similar images of the collection, at least `top`, `batch_size` at once.

    Returns:
        For each text {"text", "images": [{"image", "probability", "cosine"}, ...]}, best first, ordered by the
        matching logit plus cosine; and {"image", "error"} for each candidate that cannot be read any more. The next
        most similar image replaces it.
    """
    names, queries = collection.names, matcher.text_feat(texts)
    found: list[dict[int, tuple[float, Row]]] = [{} for _ in texts]
    errors: dict[int, Row] = {}
    usable: list[dict[int, float]] = []

    def match(image: torch.Tensor, numbers: Sequence[int]) -> Sequence[int]:
        """Score images, by their numbers in the collection, with the texts that they are candidates of."""
        tokens, _ = encode(matcher, image)
        for text, cosines, scores in zip(texts, usable, found, strict=True):
            here = [i for i, number in enumerate(numbers) if number in cosines.keys() - scores.keys()]
            if here:
                images = [numbers[i] for i in here]
                logits = matcher.match_logits(tokens[here], [text])[:, 0].cpu()
                cosine, rows = torch.tensor([cosines[i] for i in images]), [{"image": names[i]} for i in images]
                scores |= zip(images, scored(logits, cosine, rows), strict=True)
        return numbers

    while True:
        nearest = (x.tolist() for x in collection.nearest(queries, max(k_test, top) + len(errors)))
        usable = [
            dict([(i, cosine) for cosine, i in zip(*row, strict=True) if i not in errors][: max(k_test, top)])
            for row in zip(*nearest, strict=True)
        ]
        missing = sorted({i for row, scores in zip(usable, found, strict=True) for i in row if i not in scores})
        if not missing:
            break
        for batch in image_batches([names[i] for i in missing], matcher.transform, batch_size):
            errors |= {missing[i]: {"image": names[missing[i]], "error": e} for i, e in batch["errors"].items()}
            good = [missing[i] for i in batch["index"] if i not in batch["errors"]]
            matcher.predict_in_parts(match, batch["image"], good)
    rows = [{"text": text, "images": best([*scores.values()], top)} for text, scores in zip(texts, found, strict=True)]
    return [*rows, *errors.values()]


def find_texts_by_image(
    matcher: Matcher, images: Images, texts: Sequence[str], k_test: int = 32, top: int = 5, **reading: Any
) -> Iterator[Row]:
    """Find the `top` of the texts that describe images best; the matching head re-ranks the `k_test` most similar.

    `reading` is batch_size, num_workers and names, as for `Predictor.rows`.

    Yields:
        For each image {"image", "texts": [{"text", "probability", "cosine"}, ...]}, best first, or an "error".
    """
    text_feat = matcher.text_feat(texts)

    def predict(image: torch.Tensor, names: list[str]) -> list[Row]:
        tokens, feats = encode(matcher, image)
        cosine = similarity(feats, text_feat)
        rows = []
        for i, near in enumerate(cosine.topk(min(max(k_test, top), len(texts)), dim=1).indices.tolist()):
            logits = matcher.match_logits(tokens[i : i + 1], [texts[t] for t in near])[0]
            rows.append({"texts": best(scored(logits, cosine[i, near], [{"text": texts[t]} for t in near]), top)})
        return rows

    yield from matcher.rows(images, predict, **reading)


def find_images_by_image(
    matcher: Matcher, collection: Collection, images: Images, top: int = 5, **reading: Any
) -> Iterator[Row]:
    """Yield for each image {"image", "images": [{"image", "cosine"}, ...]}, the most similar others, or an "error"."""

    def predict(image: torch.Tensor, names: list[str]) -> list[Row]:
        nearest = (x.tolist() for x in collection.nearest(encode(matcher, image)[1], top + 1))
        rows = []
        for name, cosines, numbers in zip(names, *nearest, strict=True):
            pairs = [(collection.names[i], cosine) for cosine, i in zip(cosines, numbers, strict=True)]
            others = [{"image": other, "cosine": round(c, 4)} for other, c in pairs if other != name_of(name)]
            rows.append({"images": others[:top]})
        return rows

    yield from matcher.rows(images, predict, **reading)


def scored(logits: torch.Tensor, cosine: torch.Tensor, rows: list[Row]) -> list[tuple[float, Row]]:
    """Return (score, row) of candidates with logits (candidates, 2): the logit of "match" plus cosine, as evaluated."""
    shown = zip(logits.softmax(dim=1)[:, 1].tolist(), cosine.tolist(), rows, strict=True)
    filled = [{**row, "probability": round(p, 4), "cosine": round(c, 4)} for p, c, row in shown]
    return list(zip((logits[:, 1] + cosine).tolist(), filled, strict=True))


def best(rows: list[tuple[float, Row]], top: int) -> list[Row]:
    """Return the rows of the highest scores."""
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])[:top]]
