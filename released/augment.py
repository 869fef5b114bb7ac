"""RandAugment on arrays, by the names of the released transform/randaugment.py."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from data import randaugment
from data.randaugment import BLACK, FILL, MAX_LEVEL

Levels = Callable[[float], tuple]
BLUE_FIRST = np.array((0.114, 0.587, 0.299))  # brightness of the channels; the first counts as blue, as released

# Operations on arrays, uint8 (H, W, 3).


def on_arrays(operation: Callable) -> Callable[..., np.ndarray]:
    """Return an operation of images as one of arrays."""
    return lambda img, *args, **kwargs: np.asarray(operation(Image.fromarray(img), *args, **kwargs))


identity_func, autocontrast_func = on_arrays(randaugment.identity), on_arrays(ImageOps.autocontrast)
equalize_func, solarize_func = on_arrays(ImageOps.equalize), on_arrays(ImageOps.solarize)
brightness_func, sharpness_func = on_arrays(randaugment.brightness), on_arrays(randaugment.sharpness)
shear_x_func, shear_y_func = on_arrays(randaugment.shear_x), on_arrays(randaugment.shear_y)
translate_x_func, translate_y_func = on_arrays(randaugment.translate_x), on_arrays(randaugment.translate_y)
rotate_func, posterize_func = on_arrays(randaugment.rotate), on_arrays(ImageOps.posterize)


def blend(img: np.ndarray, other: np.ndarray, factor: float) -> np.ndarray:
    """Return `other` for factor 0, `img` for 1."""
    return (other + factor * (img - other)).clip(0, 255).astype(np.uint8)


def color_func(img: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grey image."""
    return blend(img, (img @ BLUE_FIRST)[..., None], factor)


def contrast_func(img: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean brightness."""
    return blend(img, img.mean(axis=(0, 1)) @ BLUE_FIRST, factor)


def cutout_func(img: np.ndarray, pad_size: int, replace: Sequence[int] = BLACK) -> np.ndarray:
    """Fill a square of `pad_size` pixels about a random place."""
    (height, width), half = img.shape[:2], pad_size // 2
    y, x = int(random.random() * height), int(random.random() * width)
    out = img.copy()
    out[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = replace
    return out


# Arguments of the operations from a level, 0 to MAX_LEVEL.


def none_level_to_args(level: float) -> tuple:
    """Return nothing."""
    return ()


def enhance_level_to_args(MAX_LEVEL: float) -> Levels:
    """Return a factor, 0.1 to 1.9."""
    return lambda level: (level / MAX_LEVEL * 1.8 + 0.1,)


def translate_level_to_args(translate_const: float, MAX_LEVEL: float, replace_value: Any) -> Levels:
    """Return an amount up to `translate_const`, of either sign, and the fill."""
    return lambda level: (random.choice((1, -1)) * level / MAX_LEVEL * translate_const, replace_value)


def cutout_level_to_args(cutout_const: float, MAX_LEVEL: float, replace_value: Any) -> Levels:
    """Return a whole number up to `cutout_const`, and the fill."""
    return lambda level: (int(level / MAX_LEVEL * cutout_const), replace_value)


def solarize_level_to_args(MAX_LEVEL: float, most: int = 256) -> Levels:
    """Return a whole number up to `most`."""
    return lambda level: (int(level / MAX_LEVEL * most),)


posterize_level_to_args = partial(solarize_level_to_args, most=4)
shear_level_to_args, rotate_level_to_args = partial(translate_level_to_args, 0.3), partial(translate_level_to_args, 30)

enhance, shear = enhance_level_to_args(MAX_LEVEL), shear_level_to_args(MAX_LEVEL, FILL)
translate = translate_level_to_args(10, MAX_LEVEL, FILL)
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

    Images are PIL's with `isPIL`, otherwise arrays; arrays are returned. `augs` names operations, all by default.
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
                img = func_dict[name](img, *arg_dict[name](level))
        return img
