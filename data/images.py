"""Images in any form a user has them, as RGB images and as batches of tensors; no bad image is fatal."""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data.transforms import BAD_IMAGE, Transform, open_image, to_bytes, to_rgb
from download import cached
from utils import UserError, user_message

ImageSource = str | Path | bytes | IO[bytes] | Image.Image | np.ndarray | torch.Tensor
MIN_BYTES = 60  # an encoded image has more; shorter texts are paths, even if they are valid base64
FORMS = "a path, URL, base64 text, encoded bytes, open file, PIL image, array or tensor"


def as_rgb(image: ImageSource) -> Image.Image:
    """Return an image as RGB, upright; UserError if it cannot be read.

    It is a path, a URL (downloaded once, into the cache), base64 text (also as a data: URL), encoded bytes, a file open
    for reading, a PIL image, or an array or tensor of shape (H, W), (H, W, 1 or 3 or 4) or (1 or 3 or 4, H, W) whose
    values reach to 1, 255 or 65535, as for `data.transforms.to_bytes`.
    """
    if isinstance(image, str):
        image = cached(image) if is_url(image) else from_base64(image) or Path(image)
    if isinstance(image, Path):
        if not _exists(image):
            raise UserError(f"image {str(image)[:200]} does not exist; correct its path")
        return open_image(image, upright=True)
    try:
        if isinstance(image, np.ndarray | torch.Tensor):
            return to_rgb(_from_array(image), upright=True)
        if isinstance(image, Image.Image):
            return to_rgb(image, upright=True)
        if not isinstance(image, bytes) and not hasattr(image, "read"):
            raise TypeError(f"a {type(image).__name__}; expected {FORMS}")
        with Image.open(io.BytesIO(image if isinstance(image, bytes) else image.read())) as opened:
            return to_rgb(opened, upright=True)
    except BAD_IMAGE as error:
        reason = str(error).split(" <_io", 1)[0]  # without an address, which differs each time
        kind = "an open image" if isinstance(image, Image.Image | np.ndarray | torch.Tensor) else "an image"
        raise UserError(f"{kind} cannot be read ({reason}); replace it or take it out") from None


def is_url(name: str) -> bool:
    """Return True for an address on the web."""
    return name.startswith(("http://", "https://"))


def from_base64(text: str) -> bytes:
    """Return the bytes of base64 text, or of a data: URL; b"" for any other text, such as a path."""
    is_data = text.startswith("data:")
    if not is_data and (is_url(text) or _exists(Path(text))):
        return b""
    try:
        content = base64.b64decode(text.partition(",")[2] if is_data else text, validate=True)
    except ValueError:
        return b""
    return content if is_data or len(content) > MIN_BYTES else b""


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, or with a zero byte
        return False


def _from_array(image: np.ndarray | torch.Tensor) -> Image.Image:
    array = image.detach().cpu().float().numpy() if isinstance(image, torch.Tensor) else image
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise ValueError(f"an array of shape {image.shape}, not (H, W), (H, W, 3) or (3, H, W)")
    return Image.fromarray(to_bytes(array))


class ImageDataset(Dataset):
    """Images in any form that `as_rgb` takes: {"index", "image" (3, H, W), "error"}; a bad one has no tensor."""

    def __init__(self, images: Sequence[ImageSource], transform: Transform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {"index": index, "image": self.transform(as_rgb(self.images[index])), "error": ""}
        except UserError as error:
            return {"index": index, "image": None, "error": user_message(error)}


def image_batches(
    images: Sequence[ImageSource], transform: Transform, batch_size: int, num_workers: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield batches in order: {"index": all numbers, "image": (good, 3, H, W) or None, "errors": {number: text}}."""
    pin_memory = torch.cuda.is_available()
    data = ImageDataset(images, transform)
    yield from DataLoader(data, batch_size, num_workers=num_workers, collate_fn=_collate, pin_memory=pin_memory)


def _collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [item["image"] for item in items if item["image"] is not None]
    return {
        "index": [item["index"] for item in items],
        "image": torch.stack(good) if good else None,
        "errors": {item["index"]: item["error"] for item in items if item["image"] is None},
    }
