"""The base of all tasks: images of any kind in, a row for each image out, in batches that fit into memory."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.images import FORMS, ImageSource, from_base64, image_batches
from data.text import pre_caption
from data.transforms import test_transform
from models.blip_itm import MAX_TEXT_TOKENS
from models.hub import PIXELS
from models.precision import autocast
from models.tokenizer import TokenBatch, tokenize
from utils import UserError, note

Row = dict[str, Any]
Images = ImageSource | Iterable[ImageSource]
Predict = Callable[[torch.Tensor, list[str]], list[Row]]  # images (batch, 3, H, W), their names -> a row for each
MAX_WORDS = 50
BATCHES_HELD = 8  # batches of a generator's images that are held at once
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # of CUDA and MPS, of CPUs


class Predictor:
    """A model in eval mode, on its device, and how it reads images: as squares of `image_size` pixels.

    `amp` is "bf16", "fp16" or "auto" for mixed precision; `config` the settings that the checkpoint was trained with.
    """

    def __init__(self, model: nn.Module, image_size: int, amp: str = "", config: Mapping[str, Any] | None = None):
        self.model, self.image_size, self.amp, self.config = model, image_size, amp, config or {}
        self.device = next(model.parameters()).device
        self.pixels = {key: self.config[key] for key in PIXELS if key in self.config}
        self.transform = test_transform(image_size, **self.pixels)
        self.largest_batch = sys.maxsize  # found as batches turn out too large

    def rows(
        self,
        images: Images,
        predict: Predict,
        batch_size: int = 16,
        num_workers: int = 0,
        names: Sequence[str] | None = None,
    ) -> Iterator[Row]:
        """Yield a row for each image, in order: {"image", ...}, or {"image", "error"} for one that cannot be read.

        Args:
            images: one or several, in any form that `data.images.as_rgb` takes; a generator is read as needed.
            predict: images (batch, 3, H, W) on the device and their names -> a row for each; without gradients.
            batch_size: images at once; less where they do not fit into memory.
            num_workers: processes that read images.
            names: of the images, for "image" in the rows; None takes their paths.

        Raises:
            UserError: something else than images, or a single image that does not fit into memory.
        """
        held = batch_size * BATCHES_HELD * max(num_workers, 1)
        for start, chunk in _chunks(images, held):
            given = [image_name(image) for image in chunk] if names is None else names[start : start + len(chunk)]
            for batch in image_batches(chunk, self.transform, batch_size, num_workers):
                good = [i for i in batch["index"] if i not in batch["errors"]]
                found: dict[int, Row] = {i: {"error": text} for i, text in batch["errors"].items()}
                if good:
                    rows = self.predict_in_parts(predict, batch["image"], [given[i] for i in good])
                    found |= dict(zip(good, rows, strict=True))
                yield from ({"image": given[i], **found[i]} for i in batch["index"])

    @torch.no_grad()
    def predict_in_parts(
        self, predict: Callable[[torch.Tensor, Sequence[Any]], Iterable[Any]], image: torch.Tensor, names: Sequence[Any]
    ) -> list[Any]:
        """Predict a batch; where it does not fit into memory, halve it and all later ones, down to one image."""
        rows: list[Any] = []
        while len(rows) < len(names):
            size = min(len(names) - len(rows), self.largest_batch)
            part = slice(len(rows), len(rows) + size)
            try:
                with autocast(self.amp, self.device):
                    rows += predict(image[part].to(self.device, non_blocking=True), names[part])
                continue
            except (RuntimeError, MemoryError) as error:
                full = isinstance(error, MemoryError | torch.OutOfMemoryError)
                if not full and not any(text in str(error) for text in NO_MEMORY):
                    raise
            self._halve(size)  # out here, where the error no longer keeps tensors
        return rows

    def _halve(self, size: int) -> None:
        if size == 1:
            raise UserError(
                f"one image of {self.image_size} pixels does not fit into the memory of {self.device}; "
                "use a smaller image_size, amp bf16, fewer captions, or another device"
            )
        self.largest_batch = size // 2
        note(f"{size} images at once do not fit into memory; going on with {self.largest_batch}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def tokens_of(self, texts: Sequence[str], first: str) -> TokenBatch:
        """Tokenize texts as in training; `first` as for `models.tokenizer.tokenize`."""
        return tokenize(self.model.tokenizer, clean(texts), first, MAX_TEXT_TOKENS, self.device)

    def checked_texts(self, texts: Sequence[str] | str) -> list[str]:
        """Return texts as a list, and print how many are longer than the model reads; raises UserError for no text."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(clean(texts)):
            raise UserError("a text is empty; give at least one, such as 'a dog on a beach'")
        note_cut(self.model.tokenizer, texts, MAX_TEXT_TOKENS, "texts")
        return texts

    def fingerprint(self) -> str:
        """Return a hash of the weights and of how images are read: what rows depend on besides settings."""
        read = f"{self.image_size}{self.pixels or ''}"
        digest = hashlib.blake2b(read.encode(), digest_size=16)
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def _chunks(images: Images, size: int) -> Iterator[tuple[int, Sequence[ImageSource]]]:
    """Yield the number of the first image and the images: all of a list at once, of a generator `size` at a time."""
    if isinstance(images, str | Path | bytes) or hasattr(images, "convert") or hasattr(images, "read"):
        images = [images]
    elif isinstance(images, np.ndarray | torch.Tensor):
        images = list(images) if images.ndim == 4 else [images]
    if isinstance(images, Sequence):
        yield 0, images
        return
    if isinstance(images, Mapping) or not isinstance(images, Iterable):
        raise UserError(f"images are a {type(images).__name__}; expected {FORMS}, or a list or generator of these")
    iterator, start = iter(images), 0
    while chunk := list(islice(iterator, size)):
        yield start, chunk
        start += len(chunk)


def image_name(image: ImageSource) -> str:
    """Return an image's path or URL; "" for an encoded image, and for an open one that came from no file."""
    if isinstance(image, str):
        return "" if from_base64(image) else image
    name = image if isinstance(image, Path) else getattr(image, "filename", "") or getattr(image, "name", "")
    return str(name) if isinstance(name, str | Path) else ""


def clean(texts: Sequence[str]) -> list[str]:
    """Return texts as they are in training: lower case, without punctuation."""
    return [pre_caption(text, MAX_WORDS) for text in texts]


def note_cut(tokenizer: Any, texts: Sequence[str], max_tokens: int, kind: str) -> None:
    """Print how many texts are longer than the model reads."""
    lengths = tokenize(tokenizer, texts).attention_mask.sum(dim=1)
    if num_cut := int((lengths > max_tokens).sum()):
        note(f"{num_cut} of {len(texts)} {kind} are longer than {max_tokens} tokens; the rest of them is not read")
