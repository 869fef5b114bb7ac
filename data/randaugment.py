"""RandAugment with the ten operations, and the strengths, of the released training.

The geometric operations take pixel (0, 0)'s centre as the origin and rotate about (width / 2, height / 2).
"""

import math
import random

from PIL import Image, ImageEnhance, ImageOps

Fill = tuple[int, int, int]
FILL: Fill = (128, 128, 128)
BLACK: Fill = (0, 0, 0)
MAX_LEVEL = 10


def affine(
    image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float, fill: Fill = BLACK
) -> Image.Image:
    """Take output pixel (x, y) from input (a x + b y + c, d x + e y + f), bilinearly, `fill` outside."""
    # Pillow places a pixel's centre at + 0.5, the released operations at its index. At the frame they mix the outer
    # pixels with the fill: Pillow does too when a pixel of it surrounds the image, which moves it by 1.
    data = (a, b, c + 0.5 * (1 - a - b) + 1, d, e, f + 0.5 * (1 - d - e) + 1)
    framed = ImageOps.expand(image, 1, fill)
    return framed.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=fill)


def shear_x(image: Image.Image, factor: float, fill: Fill = BLACK) -> Image.Image:
    """Move each row by `factor` times its number."""
    return affine(image, 1, -factor, 0, 0, 1, 0, fill)


def shear_y(image: Image.Image, factor: float, fill: Fill = BLACK) -> Image.Image:
    """Move each column by `factor` times its number."""
    return affine(image, 1, 0, 0, -factor, 1, 0, fill)


def translate(image: Image.Image, x: float, y: float, fill: Fill = BLACK) -> Image.Image:
    """Move to the left by `x` and up by `y` pixels."""
    if x % 1 or y % 1:
        return affine(image, 1, 0, x, 0, 1, y, fill)
    moved = Image.new(image.mode, image.size, fill)  # no pixel is mixed with others
    moved.paste(image, (-int(x), -int(y)))
    return moved


def translate_x(image: Image.Image, offset: float, fill: Fill = BLACK) -> Image.Image:
    """Move to the left by `offset` pixels."""
    return translate(image, offset, 0, fill)


def translate_y(image: Image.Image, offset: float, fill: Fill = BLACK) -> Image.Image:
    """Move up by `offset` pixels."""
    return translate(image, 0, offset, fill)


def rotate(image: Image.Image, degree: float, fill: Fill = BLACK) -> Image.Image:
    """Rotate counter-clockwise."""
    cos, sin = math.cos(math.radians(degree)), math.sin(math.radians(degree))
    x, y = image.width / 2, image.height / 2
    return affine(image, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y, fill)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Multiply by `factor`."""
    return ImageEnhance.Brightness(image).enhance(factor)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """Blend with a smoothed copy: 0 is smooth, 1 the image itself."""
    return ImageEnhance.Sharpness(image).enhance(factor)


def identity(image: Image.Image) -> Image.Image:
    """Change nothing."""
    return image


# Operation, and strength at full level; "signed" strengths take either sign.
OPERATIONS = {
    "Identity": (identity, None),
    "AutoContrast": (ImageOps.autocontrast, None),
    "Brightness": (brightness, "enhance"),
    "Sharpness": (sharpness, "enhance"),
    "Equalize": (ImageOps.equalize, None),
    "ShearX": (shear_x, 0.3),
    "ShearY": (shear_y, 0.3),
    "TranslateX": (translate_x, 10.0),
    "TranslateY": (translate_y, 10.0),
    "Rotate": (rotate, 30.0),
}


def apply_operation(image: Image.Image, name: str, level: float, sign: int) -> Image.Image:
    """Apply an operation at a level of 0 to 10; geometric ones to the side that `sign` (1 or -1) gives."""
    operation, strength = OPERATIONS[name]
    if strength is None:
        return operation(image)
    if strength == "enhance":
        factor = level / MAX_LEVEL * 1.8 + 0.1
        return image if factor == 1 else operation(image, factor)  # 1 changes nothing
    return operation(image, sign * strength * level / MAX_LEVEL, FILL)


class RandomAugment:
    """Apply `num_ops` operations drawn at random, with replacement, at a level of 0 to 10, each with a probability."""

    def __init__(self, num_ops: int = 2, level: float = 5, probability: float = 0.5):
        self.num_ops, self.level, self.probability = num_ops, level, probability

    def __call__(self, image: Image.Image) -> Image.Image:
        for name in random.choices(list(OPERATIONS), k=self.num_ops):
            if random.random() < self.probability:
                image = apply_operation(image, name, self.level, random.choice((1, -1)))
        return image
