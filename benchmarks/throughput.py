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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.__main__ import COLUMNS, cells, run_row
from benchmarks.case import BASE, LARGE, Row, Size, bfloat16, word_texts
from benchmarks.inference_rows import answer_ranking, captioning, reranking
from benchmarks.measure import machine, matrix_rate, seconds
from benchmarks.results import shown, table
from benchmarks.training_rows import build_pretraining, pretraining_floor, training_step
from data.transforms import Transform, train_transform
from models.blip import BLIP_Decoder
from training.loop import to_device
from training.state import compile_blocks
from utils import UserError, allow_tf32, memory_used, run_command

PAGE = Path(__file__).parent / "GPU.md"
PEAKS = {"H100": 989e3, "H200": 989e3, "A100": 312e3, "L40S": 362e3, "V100": 125e3}  # GFLOP/s in half precision, dense
PRECISIONS = {"float32 with TF32": (False, False), "bfloat16": (True, False), "bfloat16, compiled": (True, True)}
PRETRAINING_COLUMNS = ("ViT", "precision", "pairs", "s a step", "pairs/s", "MFU", "GiB at most")
WAITING_COLUMNS = ("pixels", "workers", "images/s", "share of the time that waits")
STEPS, WARM_UP = 5, 5


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    sizes: dict[str, Size]  # models by name; the first one is also used for inference and data
    batches: list[int]  # pairs per pretraining step
    image_sizes: tuple[int, ...] = (224, 384)  # pixels of the images that are read; the first also of pretraining
    workers: tuple[int, ...] = (8, 12, 16)  # numbers of loading processes
    batch_size: int = 64  # of the steps that read images
    steps: int = 50
    texts: int = 128  # that are ranked


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
    torch.compiler.reset()  # or a second batch size would be compiled for any size
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def pretraining(size: Size, pairs: int, precision: str, device: str, peak: float) -> list[str]:
    """Return the figures of a pretraining step."""
    torch.manual_seed(0)
    amp, compiled = PRECISIONS[precision]
    model = build_pretraining(False, False, **size.settings).to(device)
    if compiled:
        compile_blocks(model)
    images, texts = size.images(pairs, device), word_texts(pairs)
    step = training_step(model, bfloat16(device, amp)(lambda model: model(images, texts, 0.4)))
    step()
    step()
    taken = statistics.median(seconds(step) for _ in range(STEPS))
    gflop = sum(part.gflop for part in pretraining_floor(model, texts))
    memory = memory_used(torch.device(device))
    return [f"{pairs}", f"{taken:.3f}", f"{pairs / taken:.1f}", f"{gflop / taken / peak:.1%}", f"{memory:.1f}"]


def pretraining_rows(plan: Plan, device: str, peak: float) -> Iterator[list[str]]:
    """Yield the rows of all sizes, precisions and batch sizes, until memory ends."""
    for (name, size), precision in product(plan.sizes.items(), PRECISIONS):
        for pairs in plan.batches:
            free_memory(device)
            try:
                found = pretraining(replace(size, image_size=plan.image_sizes[0]), pairs, precision, device, peak)
            except torch.OutOfMemoryError:
                break
            yield [name, precision, *found]


def inference_rows(size: Size, device: str, texts: int) -> Iterator[list[str]]:
    """Yield rows of captioning, re-ranking and VQA ranking, in float32 and bfloat16."""
    makes = {
        "captioning 8 images, beam 3, 20 tokens": partial(captioning, images=8),
        f"re-ranking one image against {texts} texts": partial(reranking, count=texts),
        "VQA ranking, released padding": partial(answer_ranking, smooth_padding=True, k=texts),
        "VQA ranking, masked padding": partial(answer_ranking, smooth_padding=False, k=texts),
    }
    for (title, make), amp in product(makes.items(), (False, True)):
        free_memory(device)
        row = Row(f"{title}, {'bfloat16' if amp else 'float32'}", make, repeats=STEPS, amp=amp)
        try:
            yield cells(run_row(row, device, amp=amp, size=size))
        except UserError as error:  # the other rows are measured all the same
            yield [row.title, str(error), *[""] * (len(COLUMNS) - 2)]


def write_images(folder: Path) -> list[Path]:
    """Write JPEGs of 640 x 480 pixels."""
    rng, paths = np.random.default_rng(0), [folder / f"{number}.jpg" for number in range(16)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=92)
    return paths


def read_batch(transform: Transform, paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Read and augment images as in training; runs in the loading processes."""
    return {"image": torch.stack([transform.read(path) for path in paths])}


def waiting(size: Size, workers: int, plan: Plan, device: str) -> list[str]:
    """Return a row: images per second of captioning in bfloat16, and the share of the time that waits for data."""
    torch.manual_seed(0)
    model, texts = BLIP_Decoder(**size.settings).train().to(device), word_texts(plan.batch_size)
    batch: dict[str, Any] = {}
    losses = bfloat16(device, True)(lambda model: [model(batch["image"], texts)])
    step, waited, began = training_step(model, losses), 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        paths, read = write_images(Path(folder)), partial(read_batch, train_transform(size.image_size))
        items = list(islice(cycle(paths), plan.batch_size * (WARM_UP + plan.steps)))
        pin = device == "cuda"
        loader = iter(DataLoader(items, plan.batch_size, num_workers=workers, collate_fn=read, pin_memory=pin))
        for number in range(WARM_UP + plan.steps):
            if number == WARM_UP:
                waited, began = 0.0, time.perf_counter()
            before = time.perf_counter()
            images = next(loader)
            waited += time.perf_counter() - before
            batch.update(to_device(images, torch.device(device)))
            step()
        total = time.perf_counter() - began
    rate = plan.batch_size * plan.steps / total
    return [f"{size.image_size}", f"{workers}", f"{rate:.1f}", f"{waited / total:.1%}"]


def sections(plan: Plan, device: str) -> Iterator[str]:
    """Measure and yield the sections of the page; `device` is "cuda", or "cpu" as a test."""
    facts, (peak, source), first = machine(device), peak_rate(device), next(iter(plan.sizes.values()))
    loading = product((replace(first, image_size=pixels) for pixels in plan.image_sizes), plan.workers)
    yield f"# {facts['device']}"
    yield f"By `python -m benchmarks.throughput`: {', '.join(f'{name} {value}' for name, value in facts.items())}."
    yield f"## Pretraining\n\nMFU is the share of {peak / 1e3:.1f} TFLOP/s, the rate of {source}."
    allow_tf32(True)
    yield table(PRETRAINING_COLUMNS, shown(pretraining_rows(plan, device, peak)))
    yield "## Inference\n\nThe peer is the fastest of transformers and the released algorithm in the same precision."
    allow_tf32(False)  # results are compared to 1e-4
    yield table(COLUMNS, shown(inference_rows(first, device, plan.texts)))
    yield f"## Waiting for data\n\nCaptioning steps of {plan.batch_size} JPEGs of 640 x 480 pixels, bfloat16."
    yield table(WAITING_COLUMNS, shown(waiting(size, workers, plan, device) for size, workers in loading))


def main() -> None:
    """Measure a GPU and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=512, help="pairs of the largest batch (default: 512)")
    parser.add_argument("--output", type=Path, default=PAGE, help=f"file to write (default: {PAGE.name})")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA GPU; run this where `nvidia-smi` shows one")
    batches = [size for size in (16, 32, 64, 128, 256, 512, 1024) if size <= args.largest]
    with open(args.output, "w", encoding="utf-8") as page:
        for section in sections(Plan({"base": BASE, "large": LARGE}, batches), "cuda"):
            print(section, end="\n\n", file=page, flush=True)  # what is measured stays, whatever comes next
    print(f"wrote {args.output}")


if __name__ == "__main__":
    sys.exit(run_command(main))
