"""From an image file to a normalised tensor."""

import math
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from data.randaugment import RandomAugment
from utils import UserError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# What Pillow's decoders raise, besides OSError, at damaged files of one format or another.
BAD_IMAGE = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, ArithmeticError, TypeError, AttributeError, RuntimeError,
    AssertionError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
# Files that Pillow reads, itself or through a plugin (HEIC); in a sample of several, the first counts.
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe",
    ".j2k", ".pbm", ".pgm", ".pnm", ".ppm", ".tga", ".tif", ".tiff",
)  # fmt: skip
NARROWEST = 3 / 4  # width over height of a crop, or height over width


class Transform(T.Compose):
    """RGB image -> float tensor (3, H, W), normalised.

    JPEG files are decoded at 1/2, 1/4 or 1/8 of their size if neither side is then shorter than `smallest`; 0 decodes
    whole images. `upright` is as for `open_image`.
    """

    def __init__(self, transforms: Sequence[Callable], smallest: int = 0, upright: bool = False):
        super().__init__(transforms)
        self.smallest, self.upright = smallest, upright

    def read(self, path: Path) -> torch.Tensor:
        """Open an image and transform it; errors as `open_image`."""
        return self(open_image(path, self.upright, self.smallest))


def train_transform(
    image_size: int, min_scale: float = 0.5, augment: bool = True, reduced_jpeg: bool = False, upright: bool = False
) -> Transform:
    """Random crop of `min_scale` to 1 of the area, flip, RandAugment; without `augment` as in evaluation.

    With `reduced_jpeg` large JPEGs are decoded at a lower scale, at which no crop is smaller than the result; `upright`
    as `open_image`.
    """
    if not augment:
        return Transform(test_transform(image_size).transforms, image_size if reduced_jpeg else 0, upright)
    crop = T.RandomResizedCrop(image_size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BICUBIC)
    steps = [crop, T.RandomHorizontalFlip(), RandomAugment(), to_tensor]
    smallest = math.ceil(image_size / math.sqrt(min_scale * NARROWEST)) if reduced_jpeg else 0
    return Transform(steps, smallest, upright)


def test_transform(
    image_size: int, upright: bool = False, image_mean: Sequence[float] = MEAN, image_std: Sequence[float] = STD,
    resample: str = "bicubic",
) -> Transform:  # fmt: skip
    """Resize to the square; `upright` as `open_image`, `resample` a value of torchvision's InterpolationMode."""
    resize = T.Resize((image_size, image_size), interpolation=InterpolationMode(resample))
    return Transform([resize, partial(to_tensor, mean=image_mean, std=image_std)], upright=upright)


def to_tensor(image: Image.Image, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> torch.Tensor:
    """Turn an RGB image to a float32 tensor (3, H, W): values / 255, less the mean, by the deviation."""
    planes = np.empty((3, image.height, image.width), np.uint8)
    for plane, band in zip(planes, image.split(), strict=True):  # faster than to transpose (H, W, 3)
        plane[...] = band
    centre, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return torch.from_numpy(planes).float().div_(255).sub_(centre).div_(scale)


def open_image(path: Path, upright: bool = False, smallest: int = 0) -> Image.Image:
    """Read an image as RGB: its first frame, whatever its name ends in, without its transparency.

    `upright` turns it as its EXIF data say, and scales other values than bytes by `to_bytes`. Otherwise EXIF is ignored
    and larger values are clipped, as in the released code. `smallest` is that of `Transform`. UserError if it is
    missing, truncated, no image, or of more than 179 megapixels, Pillow's limit.
    """
    try:
        with Image.open(path) as image:
            if smallest:
                image.draft(None, (smallest, smallest))
            return to_rgb(image, upright)
    except FileNotFoundError:
        raise UserError(f"image {path} does not exist; correct its path, or image_root") from None
    except BAD_IMAGE as error:
        raise UserError(f"image {path} cannot be read ({error}); replace it or take it out") from None


def to_rgb(image: Image.Image, upright: bool = False) -> Image.Image:
    """Turn an open image to RGB, as `open_image`."""
    if upright:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            image = Image.fromarray(to_bytes(np.asarray(image)))
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()  # `convert` would copy it as well
    return image


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Scale an image's values, of any shape, to 0 to 255 (uint8) by what they hold.

    Floats that reach to 1 at most are taken as 0 to 1, numbers that reach to 255 at most as they are, larger ones as 16
    bits, 0 to 65535. Booleans are black and white. ValueError for values that are negative, larger, or not finite.
    """
    if values.dtype == np.uint8:
        return values
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"values from {low:g} to {high:g}; expected 0 to 1, to 255 or to 65535")
    if values.dtype == bool or (values.dtype.kind == "f" and high <= 1):
        values = values * 255.0
    return (values.round() if high <= 255 else values // 257).astype(np.uint8)
