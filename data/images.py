"""Images of one's own: files, folders and lists, read one by one, with no bad one fatal."""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data.transforms import BAD_IMAGE, Transform, open_image, to_rgb
from utils import UserError, user_message

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
LISTS = {".txt", ".json", ".jsonl"}
ImageSource = str | Path | bytes | Image.Image


def find_images(names: Iterable[str | Path]) -> list[Path]:
    """Return the images that files, folders and lists name, in order, each once.

    Args:
        names: an image; a folder, searched with its subfolders; or a list: .txt with a path a line, .json or
            .jsonl with paths or {"image": path}. A list's relative paths start from its own folder.

    Raises:
        UserError: something does not exist, or there is no image at all.
    """
    found: dict[Path, None] = {}
    for name in map(Path, names):
        if not _exists(name):
            raise UserError(
                f"{name} does not exist; give images, folders of images, or lists (.txt, .json, .jsonl)"
            )
        found |= dict.fromkeys(_expand(name))
    if not found:
        raise UserError(
            f"no image in {', '.join(map(str, names))}; expected files ending in {' '.join(sorted(ENDINGS))}"
        )
    return list(found)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for the file system
        return False


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(child for child in path.rglob("*") if child.suffix.lower() in ENDINGS and child.is_file())
    if path.suffix.lower() in LISTS:
        return [path.parent / name for name in read_list(path, "image")]
    return [path]


def read_list(path: Path, key: str) -> list[str]:
    """Return the texts of a file: a line each (.txt), a JSON list (.json), or JSON lines of texts or {key: text}.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    expected = f"expected a text a line (.txt), or JSON texts or entries with {key!r} (.json, .jsonl)"
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            rows = json.loads(text)
        elif path.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = [line.strip() for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"list {path} cannot be read ({error}); {expected}") from None
    found = [row.get(key) if isinstance(row, dict) else row for row in rows] if isinstance(rows, list) else [None]
    if not all(isinstance(item, str) and item for item in found):
        raise UserError(f"list {path} holds something else; {expected}")
    return found


class ImageDataset(Dataset):
    """Images as tensors: {"index", "image" (3, H, W), "error"}; a bad one has an error and no tensor.

    Args:
        images: paths, encoded images, or images already open.
        transform: RGB image -> tensor.
    """

    def __init__(self, images: Sequence[ImageSource], transform: Transform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {"index": index, "image": self.transform(as_rgb(self.images[index])), "error": ""}
        except UserError as error:
            return {"index": index, "image": None, "error": user_message(error)}


def as_rgb(image: ImageSource) -> Image.Image:
    """Return an image given as a path, encoded or open, as RGB, upright.

    Raises:
        UserError: it cannot be read.
    """
    if isinstance(image, str | Path):
        return open_image(Path(image), upright=True)
    try:
        if isinstance(image, bytes):
            with Image.open(io.BytesIO(image)) as opened:
                return to_rgb(opened, upright=True)
        return to_rgb(image, upright=True)
    except BAD_IMAGE as error:
        reason = str(error).split(" <_io", 1)[0]  # without an address, which is another one each time
        kind = "a picture" if isinstance(image, bytes) else "an open image"
        raise UserError(f"{kind} cannot be read ({reason}); replace it or take it out") from None


def image_batches(
    images: Sequence[ImageSource], transform: Transform, batch_size: int, num_workers: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield batches in order: {"index": all numbers, "image": (good, 3, H, W) or None, "errors": {number: text}}."""
    loader = DataLoader(
        ImageDataset(images, transform), batch_size=batch_size, num_workers=num_workers, collate_fn=_collate
    )
    yield from loader


def _collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [item["image"] for item in items if item["image"] is not None]
    return {
        "index": [item["index"] for item in items],
        "image": torch.stack(good) if good else None,
        "errors": {item["index"]: item["error"] for item in items if item["image"] is None},
    }
