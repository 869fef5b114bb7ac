"""Training and inference on one GPU: python -m benchmarks.throughput

Measures pretraining by precision and batch size (pairs per second, model FLOP utilisation, peak memory), captioning,
re-ranking and VQA ranking against transformers and the released algorithm, and the share of a step that waits for data.
Writes benchmarks/GPU.md.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.__main__ import COLUMNS, line, run_row
from benchmarks.case import BASE, LARGE, Row, Size, word_texts
from benchmarks.inference_rows import answer_ranking, captioning, reranking
from benchmarks.measure import machine, matrix_rate, seconds
from benchmarks.training_rows import build_pretraining, pretraining_floor, training_step
from data.transforms import train_transform
from models.blip import BLIP_Decoder
from models.precision import autocast
from training.loop import to_device
from training.state import compile_blocks
from utils import memory_used

PAGE = Path(__file__).parent / "GPU.md"
PEAKS = {"H100": 989e3, "H200": 989e3, "A100": 312e3, "L40S": 362e3, "V100": 125e3}  # GFLOP/s in half precision, dense
PRECISIONS = {"float32 with TF32": ("", False), "bfloat16": ("bf16", False), "bfloat16, compiled": ("bf16", True)}
PRETRAINING_COLUMNS = ("ViT", "precision", "pairs", "s a step", "pairs/s", "MFU", "GiB at most")
WAITING_COLUMNS = ("pixels", "workers", "images/s", "share of the time that waits")
COMPILE: dict[str, Any] = {}  # options of torch.compile
STEPS, WARM_UP = 5, 5
NO_GOALS = ((0.0, 0.0), (0.0, 0.0))


def peak_rate(device: str) -> tuple[float, str]:
    """Return the peak rate in bfloat16, in GFLOP/s, and its source."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    for known, rate in PEAKS.items():
        if known in name:
            return rate, f"{known}'s data sheet"
    return matrix_rate(device, torch.bfloat16), "the fastest matrix product here"


def free_memory(device: str) -> None:
    """Free what earlier models held, and count the peak from here."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def pretraining(size: Size, pairs: int, precision: str, device: str, peak: float) -> list[str]:
    """Return a row of the table of pretraining steps."""
    torch.manual_seed(0)
    amp, compiled = PRECISIONS[precision]
    model = build_pretraining(False, False, **size.settings).to(device)
    if compiled:
        compile_blocks(model, **COMPILE)
    images = torch.randn(pairs, 3, size.image_size, size.image_size, device=device)
    texts = word_texts(pairs)

    def losses(model: torch.nn.Module) -> Any:
        with autocast(amp, torch.device(device)):
            return model(images, texts, 0.4)

    step = training_step(model, losses)
    step()
    step()
    taken = statistics.median(seconds(step) for _ in range(STEPS))
    gflop = sum(part.gflop for part in pretraining_floor(model, texts))
    memory = memory_used(torch.device(device))
    return [f"{pairs}", f"{taken:.3f}", f"{pairs / taken:.1f}", f"{gflop / taken / peak:.1%}", f"{memory:.1f}"]


def pretraining_rows(sizes: dict[str, Size], batches: list[int], device: str, peak: float) -> Iterator[list[str]]:
    """Yield the rows of all sizes, precisions and batch sizes, until memory ends."""
    for name, size in sizes.items():
        for precision in PRECISIONS:
            for pairs in batches:
                free_memory(device)
                try:
                    row = pretraining(size, pairs, precision, device, peak)
                except torch.OutOfMemoryError:
                    break
                yield [name, precision, *row]


def inference_rows(size: Size, device: str, count: int) -> Iterator[str]:
    """Yield rows of captioning, re-ranking and VQA ranking of `count` texts, in float32 and bfloat16."""
    makes = {
        "captioning 8 images, beam 3, 20 tokens": lambda amp: captioning(device, amp, size, images=8),
        f"re-ranking one image against {count} texts": lambda amp: reranking(device, amp, size, count),
        "VQA ranking, released padding": lambda amp: answer_ranking(device, True, amp, size, count),
        "VQA ranking, masked padding": lambda amp: answer_ranking(device, False, amp, size, count),
    }
    for title, make in makes.items():
        for amp in (False, True):
            free_memory(device)
            name = f"{title}, {'bfloat16' if amp else 'float32'}"
            row = Row(name, lambda _, make=make, amp=amp: make(amp), NO_GOALS, 0, STEPS, amp)
            yield line(run_row(row, device))


class Photographs(Dataset):
    """JPEGs of 640 x 480 pixels, read and augmented as in training.

    Args:
        folder: gets the files.
        length: number of items; the files repeat.
        image_size: pixels after augmentation.
    """

    def __init__(self, folder: Path, length: int, image_size: int):
        self.length, self.transform, rng = length, train_transform(image_size), np.random.default_rng(0)
        self.paths = [folder / f"{number}.jpg" for number in range(16)]
        for path in self.paths:
            coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
            coarse.resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=92)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.transform.read(self.paths[index % len(self.paths)])}


def waiting(size: Size, batch_size: int, workers: int, device: str, steps: int) -> list[str]:
    """Return a row: images per second of captioning in bfloat16, and the share of the time that waits for data."""
    torch.manual_seed(0)
    model, texts = BLIP_Decoder(**size.settings).train().to(device), word_texts(batch_size)
    batch: dict[str, Any] = {}

    def losses(model: torch.nn.Module) -> Any:
        with autocast("bf16", torch.device(device)):
            return [model(batch["image"], texts)]

    step, waited, began = training_step(model, losses), 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        data = Photographs(Path(folder), batch_size * (WARM_UP + steps), size.image_size)
        loader = iter(DataLoader(data, batch_size, num_workers=workers, pin_memory=device == "cuda"))
        for number in range(WARM_UP + steps):
            if number == WARM_UP:
                waited, began = 0.0, time.perf_counter()
            before = time.perf_counter()
            read = next(loader)
            waited += time.perf_counter() - before
            batch.update(to_device(read, torch.device(device)))
            step()
        total = time.perf_counter() - began
    return [f"{size.image_size}", f"{workers}", f"{batch_size * steps / total:.1f}", f"{waited / total:.1%}"]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; its rows are also printed as they come."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|---" * lines[0].count(" | ") + "|---|")
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def report(
    device: str,
    sizes: dict[str, Size],
    batches: list[int],
    image_sizes: tuple[int, ...],
    workers: list[int],
    batch_size: int,
    steps: int,
    count: int,
) -> str:
    """Measure everything and return the page.

    Args:
        device: "cuda", or "cpu" as a test.
        sizes: models by name; the first one is also used for inference and data.
        batches: pairs per pretraining step.
        image_sizes: pixels of the images that are read.
        workers: numbers of loading processes.
        batch_size, steps: of the steps that read images.
        count: texts that are ranked.
    """
    peak, source = peak_rate(device)
    facts = machine(device)
    first = next(iter(sizes.values()))
    pretrained = {name: replace(size, image_size=image_sizes[0]) for name, size in sizes.items()}
    loading = product([replace(first, image_size=image_size) for image_size in image_sizes], workers)
    parts = (
        f"# {facts['device']}",
        f"By `python -m benchmarks.throughput`: {', '.join(f'{name} {value}' for name, value in facts.items())}.",
        f"## Pretraining\n\nMFU is the share of {peak / 1e3:.1f} TFLOP/s, the rate of {source}.",
        table(PRETRAINING_COLUMNS, pretraining_rows(pretrained, batches, device, peak)),
        "## Inference\n\nThe peer is the fastest of transformers and the released algorithm in the same precision.",
        "\n".join((f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *inference_rows(first, device, count))),
        f"## Waiting for data\n\nCaptioning steps of {batch_size} JPEGs of 640 x 480 pixels, bfloat16.",
        table(WAITING_COLUMNS, (waiting(size, batch_size, n, device, steps) for size, n in loading)),
    )
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Measure a GPU and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=512, help="pairs of the largest batch (default: 512)")
    parser.add_argument("--output", type=Path, default=PAGE, help=f"file to write (default: {PAGE.name})")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch finds no CUDA GPU; run this where `nvidia-smi` shows one", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    batches = [size for size in (16, 32, 64, 128, 256, 512, 1024) if size <= args.largest]
    page = report("cuda", {"base": BASE, "large": LARGE}, batches, (224, 384), [8, 12, 16], 64, 50, 128)
    args.output.write_text(page, encoding="utf-8")
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
