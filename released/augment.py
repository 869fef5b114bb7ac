"""RandAugment on arrays, by the names of the released transform/randaugment.py."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from data import randaugment

Levels = Callable[[float], tuple]
GREY = (0.299, 0.587, 0.114)  # weights of the three channels in brightness
TRANSLATE, MAX_LEVEL, FILL = 10, 10, (128, 128, 128)


def on_array(operation: Callable, img: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
    """Apply an operation of images to an array, uint8 (H, W, 3)."""
    return np.asarray(operation(Image.fromarray(img), *args, **kwargs))


def by_table(img: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Replace every value by that of a table of 256, cut to 0 to 255."""
    return values.clip(0, 255).astype(np.uint8)[img]


def identity_func(img: np.ndarray) -> np.ndarray:
    """Change nothing."""
    return img


def autocontrast_func(img: np.ndarray, cutoff: float = 0) -> np.ndarray:
    """Stretch each channel to 0 to 255, without `cutoff` per cent at both ends."""
    return on_array(ImageOps.autocontrast, img, cutoff)


def equalize_func(img: np.ndarray) -> np.ndarray:
    """Equalise each channel's histogram."""
    return on_array(ImageOps.equalize, img)


def rotate_func(img: np.ndarray, degree: float, fill: Sequence[int] = (0, 0, 0)) -> np.ndarray:
    """Rotate counter-clockwise."""
    return on_array(randaugment.rotate, img, degree, fill=tuple(fill))


def shear_x_func(img: np.ndarray, factor: float, fill: Sequence[int] = (0, 0, 0)) -> np.ndarray:
    """Move each row by `factor` times its number."""
    return on_array(randaugment.shear_x, img, factor, fill=tuple(fill))


def shear_y_func(img: np.ndarray, factor: float, fill: Sequence[int] = (0, 0, 0)) -> np.ndarray:
    """Move each column by `factor` times its number."""
    return on_array(randaugment.shear_y, img, factor, fill=tuple(fill))


def translate_x_func(img: np.ndarray, offset: float, fill: Sequence[int] = (0, 0, 0)) -> np.ndarray:
    """Move to the left by `offset` pixels."""
    return on_array(randaugment.translate_x, img, offset, fill=tuple(fill))


def translate_y_func(img: np.ndarray, offset: float, fill: Sequence[int] = (0, 0, 0)) -> np.ndarray:
    """Move up by `offset` pixels."""
    return on_array(randaugment.translate_y, img, offset, fill=tuple(fill))


def solarize_func(img: np.ndarray, thresh: int = 128) -> np.ndarray:
    """Invert values from `thresh` on."""
    return on_array(ImageOps.solarize, img, thresh)


def posterize_func(img: np.ndarray, bits: int) -> np.ndarray:
    """Clear the lowest `bits` bits of every value."""
    return img & np.uint8(255 << bits & 255)


def color_func(img: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grey image: 0 is grey, 1 the image itself; the first channel counts as blue, as released."""
    grey = img @ np.array(GREY[::-1])
    return (grey[..., None] + factor * (img - grey[..., None])).clip(0, 255).astype(np.uint8)


def contrast_func(img: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean brightness; the first channel counts as blue, as released."""
    mean = (img.mean(axis=(0, 1)) * GREY[::-1]).sum()
    return by_table(img, (np.arange(256) - mean) * factor + mean)


def brightness_func(img: np.ndarray, factor: float) -> np.ndarray:
    """Multiply by `factor`."""
    return by_table(img, np.arange(256) * factor)


def sharpness_func(img: np.ndarray, factor: float) -> np.ndarray:
    """Blend with a smoothed copy: 0 is smooth, 1 the image itself."""
    return on_array(randaugment.sharpness, img, factor)


def cutout_func(img: np.ndarray, pad_size: int, replace: Sequence[int] = (0, 0, 0)) -> np.ndarray:
    """Fill a square of `pad_size` pixels about a random place."""
    (height, width), half = img.shape[:2], pad_size // 2
    y, x = int(random.random() * height), int(random.random() * width)
    out = img.copy()
    out[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = replace
    return out


def signed(value: float) -> float:
    """Return a value with a random sign."""
    return random.choice((value, -value))


def enhance_level_to_args(MAX_LEVEL: float) -> Levels:
    """Return the factor of an enhancement, 0.1 to 1.9."""
    return lambda level: (level / MAX_LEVEL * 1.8 + 0.1,)


def shear_level_to_args(MAX_LEVEL: float, replace_value: Any) -> Levels:
    """Return the factor of a shear, up to 0.3 either way, and the fill."""
    return lambda level: (signed(level / MAX_LEVEL * 0.3), replace_value)


def translate_level_to_args(translate_const: float, MAX_LEVEL: float, replace_value: Any) -> Levels:
    """Return the pixels of a translation, up to `translate_const` either way, and the fill."""
    return lambda level: (signed(level / MAX_LEVEL * float(translate_const)), replace_value)


def rotate_level_to_args(MAX_LEVEL: float, replace_value: Any) -> Levels:
    """Return the degrees of a rotation, up to 30 either way, and the fill."""
    return lambda level: (signed(level / MAX_LEVEL * 30), replace_value)


def cutout_level_to_args(cutout_const: float, MAX_LEVEL: float, replace_value: Any) -> Levels:
    """Return the side of a square, up to `cutout_const` pixels, and the fill."""
    return lambda level: (int(level / MAX_LEVEL * cutout_const), replace_value)


def solarize_level_to_args(MAX_LEVEL: float) -> Levels:
    """Return the threshold of a solarization, up to 256."""
    return lambda level: (int(level / MAX_LEVEL * 256),)


def posterize_level_to_args(MAX_LEVEL: float) -> Levels:
    """Return the number of bits to clear, up to 4."""
    return lambda level: (int(level / MAX_LEVEL * 4),)


def none_level_to_args(level: float) -> tuple:
    """Return nothing."""
    return ()


enhance, shear = enhance_level_to_args(MAX_LEVEL), shear_level_to_args(MAX_LEVEL, FILL)
translate = translate_level_to_args(TRANSLATE, MAX_LEVEL, FILL)
OPERATIONS: dict[str, tuple[Callable, Levels]] = {
    "Identity": (identity_func, none_level_to_args),
    "AutoContrast": (autocontrast_func, none_level_to_args),
    "Equalize": (equalize_func, none_level_to_args),
    "Rotate": (rotate_func, rotate_level_to_args(MAX_LEVEL, FILL)),
    "Solarize": (solarize_func, solarize_level_to_args(MAX_LEVEL)),
    "Color": (color_func, enhance),
    "Contrast": (contrast_func, enhance),
    "Brightness": (brightness_func, enhance),
    "Sharpness": (sharpness_func, enhance),
    "ShearX": (shear_x_func, shear),
    "TranslateX": (translate_x_func, translate),
    "TranslateY": (translate_y_func, translate),
    "Posterize": (posterize_func, posterize_level_to_args(MAX_LEVEL)),
    "ShearY": (shear_y_func, shear),
}
func_dict = {name: function for name, (function, _) in OPERATIONS.items()}
arg_dict = {name: levels for name, (_, levels) in OPERATIONS.items()}


class RandomAugment:
    """Apply `N` operations drawn with replacement, each with probability 0.5, at level `M` of 10.

    Args:
        N, M: number and level.
        isPIL: images are PIL's; otherwise arrays. Arrays are returned.
        augs: names of operations; all by default.
    """

    def __init__(self, N: int = 2, M: float = 10, isPIL: bool = False, augs: Sequence[str] = ()):
        self.N, self.M, self.isPIL = N, M, isPIL
        self.augs = list(augs) or list(OPERATIONS)

    def get_random_ops(self) -> list[tuple[str, float, float]]:
        """Draw names, each with its probability and level."""
        return [(name, 0.5, self.M) for name in random.choices(self.augs, k=self.N)]

    def __call__(self, img: Any) -> np.ndarray:
        img = np.asarray(img)
        for name, probability, level in self.get_random_ops():
            if random.random() < probability:
                function, levels = OPERATIONS[name]
                img = function(img, *levels(level))
        return img
