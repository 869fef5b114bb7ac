"""Images per second and core that are read, augmented and made tensors: python -m benchmarks.loading

Ours against Pillow with both versions of torchvision's transforms, on the photographs of two packages, at COCO's size
and at a camera's. torchvision's transforms of tensors are fast, but round differently from Pillow, with which the
released code resizes: 0.5% of the values of noise differ by 1.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.io import decode_image
from torchvision.transforms import v2

from benchmarks.measure import cpu_name
from benchmarks.results import table, write_section
from data.transforms import MEAN, STD, train_transform
from demo.photographs import CAPTIONS, bundled

SIZES = {"640 pixels": 640, "2048 pixels": 2048}
IMAGE_SIZE = 384  # of fine-tuning; pretraining has 224
ROUNDS = 9  # in each, every reader reads every photograph once
BICUBIC = T.InterpolationMode.BICUBIC
GPUS, PAIRS_OF_A_GPU = 8, 473  # an A100 at 35% utilisation, base (docs/large_runs.md)
Read = Callable[[Path], torch.Tensor]


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


def pillow(path: Path) -> Image.Image:
    """Read an image with Pillow."""
    with Image.open(path) as image:
        return image.convert("RGB")


def torchvision_readers() -> dict[str, Read]:
    """Return torchvision's crop, flip and RandAugment (its own operations, as many and as strong as ours)."""
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    first = [T.RandomResizedCrop(IMAGE_SIZE, (0.5, 1.0), interpolation=BICUBIC), T.RandomHorizontalFlip()]
    first_v2 = [v2.RandomResizedCrop(IMAGE_SIZE, (0.5, 1.0), interpolation=BICUBIC), v2.RandomHorizontalFlip()]
    half = T.RandomApply([T.RandAugment(1, 5)], 0.5)  # the released RandAugment skips half of its two operations
    half_v2 = v2.RandomApply([v2.RandAugment(1, 5)], 0.5)
    version_1 = T.Compose([*first, half, half, T.ToTensor(), T.Normalize(MEAN, STD)])
    version_2 = v2.Compose([*first_v2, half_v2, half_v2, v2.ToImage(), *last])
    on_tensors = v2.Compose([*first_v2, half_v2, half_v2, *last])
    always = T.Compose([*first, T.RandAugment(2, 5), T.ToTensor(), T.Normalize(MEAN, STD)])
    return {
        "Pillow and torchvision": lambda path: version_1(pillow(path)),
        "Pillow and torchvision v2": lambda path: version_2(pillow(path)),
        "torchvision v2 alone, on tensors": lambda path: on_tensors(decode_image(str(path), "RGB")),
        "Pillow and torchvision, no operation skipped": lambda path: always(pillow(path)),
    }


READERS: dict[str, Read] = {
    "ours": train_transform(IMAGE_SIZE).read,
    **torchvision_readers(),
    "ours, `reduced_jpeg`": train_transform(IMAGE_SIZE, reduced_jpeg=True).read,
    "ours, pretraining (224 pixels)": train_transform(224, 0.2).read,
}


def rates(paths: list[Path]) -> dict[str, list[float]]:
    """Return each reader's images a second of processor time, measured in turn."""
    found: dict[str, list[float]] = {name: [] for name in READERS}
    for _ in range(ROUNDS):
        for name, read in READERS.items():
            began = time.process_time()
            for path in paths:
                read(path)
            found[name].append(len(paths) / (time.process_time() - began))
    return found


def cell(found: dict[str, list[float]], name: str) -> str:
    """Return images a second of a reader, and the median of ours over it, round by round."""
    ratio = statistics.median(a / b for a, b in zip(found["ours"], found[name], strict=True))
    return f"{statistics.median(found[name]):.0f}" + (f" (ours x {ratio:.2f})" if name != "ours" else "")


def main() -> int:
    """Measure, print and write the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: write_images(Path(folder), side) for name, side in SIZES.items()}
        columns = {name: rates(found) for name, found in paths.items()}
    load = f", load {os.getloadavg()[0]:.0f}" if hasattr(os, "getloadavg") else ""  # lowers rates more than ratios
    rows = [[name, *(cell(found, name) for found in columns.values())] for name in READERS]
    rate, need = statistics.median(columns["640 pixels"]["ours, pretraining (224 pixels)"]), GPUS * PAIRS_OF_A_GPU
    text = (
        f"{cpu_name()}, {os.cpu_count()} cores{load}; {IMAGE_SIZE} pixels after augmentation.\n\n"
        f"{table(('images a second and core', *columns), rows)}\n\n"
        f"{GPUS} A100 that pretrain base at 35% utilisation take {need:,} pairs a second: at {rate:.0f} images of 640 "
        f"pixels a second and core, {need / rate:.0f} cores."
    )
    print(text)
    write_section("Reading images: `python -m benchmarks.loading`", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
