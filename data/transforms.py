"""From a picture file to a normalised tensor."""

from collections.abc import Callable
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
BAD_PICTURE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
Transform = Callable[[Image.Image], torch.Tensor]


def train_transform(image_size: int, min_scale: float = 0.5, augment: bool = True) -> Transform:
    """Random crop of `min_scale` to 1 of the area, flip, RandAugment; without `augment` as in evaluation.

    Returns:
        RGB picture -> float tensor (3, image_size, image_size), normalised.
    """
    if not augment:
        return test_transform(image_size)
    crop = T.RandomResizedCrop(image_size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(), RandomAugment(), T.ToTensor(), T.Normalize(MEAN, STD)])


def test_transform(image_size: int) -> Transform:
    """Resize to the square, bicubically; returns as `train_transform`."""
    resize = T.Resize((image_size, image_size), interpolation=InterpolationMode.BICUBIC)
    return T.Compose([resize, T.ToTensor(), T.Normalize(MEAN, STD)])


def open_image(path: Path, upright: bool = False) -> Image.Image:
    """Read a picture as RGB.

    Args:
        path: of the picture.
        upright: turn it as its EXIF data say, and scale 16 bits to 8; without, both are as in the released code,
            which leaves EXIF aside and clips.

    Raises:
        UserError: it is missing, truncated or no picture.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image, upright)
    except FileNotFoundError:
        raise UserError(f"picture {path} does not exist; correct its path, or image_root") from None
    except BAD_PICTURE as error:
        raise UserError(f"picture {path} cannot be read ({error}); replace it or take it out") from None


def to_rgb(image: Image.Image, upright: bool = False) -> Image.Image:
    """Turn an open picture to RGB, as `open_image`."""
    if upright:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode == "I":
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")
