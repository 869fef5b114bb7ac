"""Scenes of the miniature world: objects and their positions, and how they are drawn."""

import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 60),
    "blue": (38, 84, 214),
    "yellow": (245, 214, 40),
    "purple": (132, 56, 178),
    "orange": (250, 136, 22),
    "cyan": (60, 208, 216),
    "pink": (250, 152, 200),
}
SIZES = {"small": 24 / 64, "large": 32 / 64}  # share of the image's side
LEVELS = {1: (1, False), 2: (2, False), 3: (3, False), 4: (3, True)}  # maximum number of objects, textured or not
BACKGROUNDS = ("plain", "striped", "dotted", "checkered")
SUPERSAMPLING = 4
GRID = 8  # objects are centred on a grid of this many cells per side

Pair = tuple[str, str]  # colour and shape


@dataclass(frozen=True)
class Item:
    """One object; x and y of its centre and its extent `side` are fractions of the image's side."""

    color: str
    shape: str
    size: str
    x: float
    y: float

    @property
    def pair(self) -> Pair:
        """Colour and shape."""
        return self.color, self.shape

    @property
    def side(self) -> float:
        """Extent as a fraction of the image's side."""
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    """Contents of an image: objects from left to right, and the background."""

    items: tuple[Item, ...]
    background: str
    tones: tuple[int, int]  # grey values of the background

    @property
    def pairs(self) -> list[Pair]:
        """Colours and shapes, from left to right; no pair occurs twice."""
        return [item.pair for item in self.items]


def unseen_pairs() -> set[Pair]:
    """Return the pairs that no training image contains: one per shape and one per colour."""
    colors = list(COLORS)
    return {(colors[(i + 3) % len(colors)], shape) for i, shape in enumerate(SHAPES)}


def seen_pairs() -> list[Pair]:
    """Return the pairs that training images contain, in a fixed order."""
    return [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in unseen_pairs()]


def draw_scene(rng: random.Random, level: int, with_unseen: bool = False) -> Scene:
    """Return a random scene of a level of `LEVELS`; `with_unseen` includes a pair that no training image contains."""
    most, textured = LEVELS[level]
    pairs = rng.sample(seen_pairs(), rng.randint(1, most))
    if with_unseen:
        pairs[0] = rng.choice(sorted(unseen_pairs()))
    background = rng.choice(BACKGROUNDS) if textured else "plain"
    tone = rng.choice((18, 45, 72, 100, 128, 156, 190, 220, 245))
    other = tone + rng.choice((-1, 1)) * rng.randint(14, 30)
    return Scene(place(rng, pairs), background, (tone, max(0, min(255, other))))


def place(rng: random.Random, pairs: list[Pair]) -> tuple[Item, ...]:
    """Draw sizes and positions without overlap; return the objects from left to right."""
    while True:
        items: list[Item] = []
        for color, shape in pairs:
            size = rng.choice(list(SIZES))
            places = [i / GRID for i in range(1, GRID) if SIZES[size] / 2 <= i / GRID <= 1 - SIZES[size] / 2]
            items.append(Item(color, shape, size, rng.choice(places), rng.choice(places)))
        if all(apart(a, b) for i, a in enumerate(items) for b in items[:i]):
            return tuple(sorted(items, key=lambda item: item.x))


def apart(a: Item, b: Item) -> bool:
    """Return True if two boxes do not overlap and their offset has a clear main direction."""
    across, down = abs(a.x - b.x), abs(a.y - b.y)
    return max(across, down) >= (a.side + b.side) / 2 and abs(across - down) > 0.04


def render(scene: Scene, image_size: int = 64) -> Image.Image:
    """Draw a scene as an RGB image."""
    side = image_size * SUPERSAMPLING
    dark, light = (np.uint8(tone) for tone in scene.tones)
    image = Image.fromarray(np.where(pattern(scene.background, side), light, dark)).convert("RGB")
    canvas = ImageDraw.Draw(image)
    for item in scene.items:
        draw_item(canvas, item, side)
    return image.resize((image_size, image_size), Image.Resampling.BOX)


@lru_cache
def pattern(name: str, side: int) -> np.ndarray:
    """Return the mask of a background's second tone, bool (side, side)."""
    y, x = np.mgrid[:side, :side] / side
    if name == "plain":
        return np.zeros((side, side), bool)
    if name == "striped":
        return (x + y) * 8 % 1 < 0.5
    if name == "dotted":
        return ((x * 8 % 1 - 0.5) ** 2 + (y * 8 % 1 - 0.5) ** 2) < 0.08
    return (x * 8 % 2 < 1) ^ (y * 8 % 2 < 1)


def draw_item(canvas: ImageDraw.ImageDraw, item: Item, side: int) -> None:
    """Draw one object."""
    color, radius = COLORS[item.color], item.side * side / 2
    x, y = item.x * side, item.y * side
    box = (x - radius, y - radius, x + radius, y + radius)
    if item.shape == "circle":
        canvas.ellipse(box, fill=color)
    elif item.shape == "ring":
        canvas.ellipse(box, outline=color, width=round(radius * 0.42))
    else:
        canvas.polygon([(x + u * radius, y + v * radius) for u, v in OUTLINES[item.shape]], fill=color)


def _star() -> list[tuple[float, float]]:
    radii = (1.0, 0.42)
    angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return [(radii[i % 2] * math.cos(a), radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)]


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / 40 for i in range(40)]
    curve = [(math.sin(a) ** 3, 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a))
             for a in angles]  # fmt: skip
    return [(x, -(y + 2.5) / 14.5) for x, y in curve]


_ARM = 0.3
OUTLINES = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
    "star": _star(),
    "heart": _heart(),
    "cross": [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM), (_ARM, 1), (-_ARM, 1),
              (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)],  # fmt: skip
}
