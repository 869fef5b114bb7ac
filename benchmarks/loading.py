"""Images read, augmented and made tensors, a second and core: python -m benchmarks.loading

Ours beside Pillow with torchvision's pipelines, on the photographs that two packages bring, at COCO's size and as a
camera takes them, and whole batches from workers.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as T

from benchmarks.results import write_section
from data.transforms import MEAN, STD, train_transform
from demo.photographs import CAPTIONS, bundled

SIZES = {"640 pixels": 640, "2048 pixels": 2048}
SECONDS = 4.0
REPEATS = 3
BICUBIC = T.InterpolationMode.BICUBIC


def write_images(folder: Path, side: int) -> list[Path]:
    """Write the photographs as JPEGs of one longer side."""
    paths = []
    for name in CAPTIONS:
        image = Image.open(bundled(name)).convert("RGB")
        ratio = side / max(image.size)
        path = folder / f"{side}_{Path(name).stem}.jpg"
        image.resize((round(image.width * ratio), round(image.height * ratio))).save(path, quality=92)
        paths.append(path)
    return paths


def torchvision_reader(augment: bool) -> Callable[[Path], torch.Tensor]:
    """Return Pillow and torchvision: crop and flip, with torchvision's own RandAugment or without."""
    crop = T.RandomResizedCrop(384, scale=(0.5, 1.0), interpolation=BICUBIC)
    steps: list[Any] = [crop, T.RandomHorizontalFlip()]
    steps += [T.RandAugment(2, 5)] if augment else []
    pipeline = T.Compose([*steps, T.ToTensor(), T.Normalize(MEAN, STD)])

    def read(path: Path) -> torch.Tensor:
        with Image.open(path) as image:
            return pipeline(image.convert("RGB"))

    return read


READERS = {
    "ours": train_transform(384).read,
    "ours, reduced_jpeg": train_transform(384, reduced_jpeg=True).read,
    "Pillow and torchvision, RandAugment": torchvision_reader(True),
    "Pillow and torchvision, crop and flip only": torchvision_reader(False),
}


def rate(read: Callable[[Path], torch.Tensor], paths: list[Path]) -> float:
    """Return images a second."""
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS / REPEATS:
        for path in paths:
            read(path)
        done += len(paths)
    return done / (time.perf_counter() - began)


def rates(paths: list[Path]) -> dict[str, float]:
    """Return each reader's median rate, measured in turn."""
    found: dict[str, list[float]] = {name: [] for name in READERS}
    for _ in range(REPEATS):
        for name, read in READERS.items():
            found[name].append(rate(read, paths))
    return {name: statistics.median(values) for name, values in found.items()}


class Images(torch.utils.data.Dataset):
    """The photographs over and over."""

    def __init__(self, paths: list[Path], length: int):
        self.paths, self.length, self.transform = paths, length, train_transform(384)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform.read(self.paths[index % len(self.paths)])


def worker_rate(paths: list[Path], num_workers: int, batches: int = 20) -> float:
    """Return images a second of a loader's workers, their start left out."""
    loader = iter(DataLoader(Images(paths, 32 * (batches + 1)), batch_size=32, num_workers=num_workers))
    next(loader)
    began = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return 32 * batches / (time.perf_counter() - began)


def main() -> int:
    """Measure and print the table."""
    torch.set_num_threads(1)
    lines = ["| images a second | " + " | ".join(SIZES) + " |", "|---" * (len(SIZES) + 1) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: write_images(Path(folder), side) for name, side in SIZES.items()}
        columns = {name: rates(found) for name, found in paths.items()}
        for reader in READERS:
            lines.append(f"| {reader}, one core | " + " | ".join(f"{columns[n][reader]:.0f}" for n in SIZES) + " |")
        cells = " | ".join(f"{worker_rate(paths[name], 2):.0f}" for name in SIZES)
        lines.append(f"| ours, batches of 2 workers | {cells} |")
    print("\n".join(lines))
    write_section("Reading images: `python -m benchmarks.loading`", "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
