"""Images in any form a user has them, as RGB images and as batches of tensors; no bad image is fatal."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data.transforms import BAD_IMAGE, Transform, open_image, to_bytes, to_rgb
from utils import UserError, user_message

ImageSource = str | Path | bytes | Image.Image | np.ndarray | torch.Tensor


def as_rgb(image: ImageSource) -> Image.Image:
    """Return an image as RGB, upright.

    Args:
        image: a path, encoded bytes, a PIL image, or an array or tensor of shape (H, W), (H, W, 1 or 3 or 4) or
            (1 or 3 or 4, H, W) whose values reach to 1, 255 or 65535, as `data.transforms.to_bytes` finds.

    Raises:
        UserError: it cannot be read.
    """
    if isinstance(image, str | Path):
        return open_image(Path(image), upright=True)
    try:
        if isinstance(image, bytes):
            with Image.open(io.BytesIO(image)) as opened:
                return to_rgb(opened, upright=True)
        if isinstance(image, np.ndarray | torch.Tensor):
            image = _from_array(image)
        return to_rgb(image, upright=True)
    except BAD_IMAGE as error:
        reason = str(error).split(" <_io", 1)[0]  # without an address, which is another one each time
        kind = "an image" if isinstance(image, bytes) else "an open image"
        raise UserError(f"{kind} cannot be read ({reason}); replace it or take it out") from None


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
    """Images as tensors: {"index", "image" (3, H, W), "error"}; a bad one has an error and no tensor.

    Args:
        images: in any form that `as_rgb` takes.
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
