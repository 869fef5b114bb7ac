"""The form of a benchmark row, the sizes it runs at, and the comparison of its results."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks import floor
from models.vit import vit_sizes

TOLERANCE, TOLERANCE_BF16 = 1e-4, 1e-2  # of scores; in bfloat16, which has 8 bits, relative to scores above 1
Work = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """Size of a benchmarked model."""

    vit: str | Mapping = "base"
    text: Mapping[str, Any] = field(default_factory=dict)  # settings of the text transformer that differ from base
    image_size: int = 384

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, depth and patch size of the ViT."""
        sizes = vit_sizes(self.vit)
        return sizes["embed_dim"], sizes["depth"], sizes["patch_size"]

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return (self.image_size // self.shape[2]) ** 2 + 1

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of a model's constructor."""
        return {"vit": self.vit, "med_config": dict(self.text), "image_size": self.image_size}

    def images(self, count: int, device: str) -> torch.Tensor:
        """Return random images."""
        return torch.randn(count, 3, self.image_size, self.image_size, device=device)


SMALL_TEXT = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 12}
BASE, LARGE, SMALL = Size(), Size("large"), Size("small", SMALL_TEXT)


@dataclass
class Case:
    """One row, ready to run."""

    ours: Work
    peers: dict[str, Work]  # other ways to the same result, by name; the fastest is compared
    difference: Callable[[], float]  # the largest difference of scores; raises where strings or ranks differ
    floor: list[floor.Part]  # the least work, by stages


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    title: str
    make: Callable[..., Case]  # (device) -> the case
    goals: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 0.0), (0.0, 0.0))  # see `goal`; for AVX2, AVX-512
    floor_aim: float = 0.0  # times the floor to aim at
    repeats: int = 3
    amp: bool = False  # ours runs in bfloat16

    @property
    def tolerance(self) -> float:
        """Largest difference of scores."""
        return TOLERANCE_BF16 if self.amp else TOLERANCE

    @property
    def goal(self) -> tuple[float, float]:
        """Ratio to reach and to aim at on this processor."""
        return self.goals["AVX512" in torch.backends.cpu.get_cpu_capability()]


def word_texts(count: int, seed: int = 0) -> list[str]:
    """Return texts as long as COCO's captions, 10 or 11 words."""
    rng = np.random.default_rng(seed)
    words = ["a", "the", "man", "woman", "dog", "red", "table", "with", "on", "in", "of", "two", "plate", "field", "to"]
    return [" ".join(rng.choice(words, n)) for n in rng.normal(10.5, 2.4, count).round().clip(7, 25).astype(int)]


def bfloat16(device: str, enabled: bool) -> torch.autocast:
    """Return autocast to bfloat16, or a context that does nothing; also a decorator."""
    return torch.autocast(device, torch.bfloat16, enabled=enabled)


def largest_difference(found: Any, expected: Iterable[Any], relative: bool = False) -> float:
    """Return the largest difference of two sequences of tensors; `relative` divides it by expected values above 1."""
    differences = []
    for one, other in zip(found, expected, strict=True):
        one, other = (torch.as_tensor(x).detach().float().cpu() for x in (one, other))
        scale = other.abs().clamp(min=1.0) if relative else 1.0
        differences.append(((one - other).abs() / scale).max().item())
    return max(differences)


def difference_of(ours: Work, ways: Sequence[Work], relative: bool = False) -> Callable[[], float]:
    """Return a function for the largest difference of our tensor from those of other ways."""
    return lambda: max(largest_difference([ours()], [way()], relative) for way in ways)
