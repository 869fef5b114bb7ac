"""Pretraining on one device, whole steps on made data: python -m benchmarks.throughput

Pairs a second, the share of the device's peak rate that the counted operations make (MFU), and peak memory, for batches
that double until memory ends.
"""

import argparse
import gc
import statistics
import sys
from typing import Any

import torch

from benchmarks.measure import matrix_rate, seconds
from benchmarks.results import write_section
from benchmarks.rows import mixed, pretraining_floor, training_step, word_texts
from models.blip_pretrain import BLIP_Pretrain
from utils import memory_used

PEAKS = {"H100": 989e3, "H200": 989e3, "A100": 312e3, "L40S": 362e3, "V100": 125e3}  # GFLOP/s in half precision, dense
STEPS = 5
COLUMNS = ("ViT", "pairs", "s a step", "pairs/s", "MFU", "GiB")


def peak_rate(device: str) -> tuple[float, str]:
    """Return the device's peak in bfloat16, GFLOP/s, and where the figure is from."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    for known, rate in PEAKS.items():
        if known in name:
            return rate, f"{known}'s data sheet"
    return matrix_rate(device, torch.bfloat16), "matrix products here"


def measure(vit: str, pairs: int, device: str, peak: float, checkpointed: bool, **settings: Any) -> dict[str, Any]:
    """Return the row of one size and batch, in bfloat16; `settings` are the model's others."""
    torch.manual_seed(0)
    blocks = 24 if checkpointed else 0
    model = BLIP_Pretrain(vit=vit, vit_grad_ckpt=checkpointed, vit_ckpt_layer=blocks, **settings).train().to(device)
    images, texts = torch.randn(pairs, 3, 224, 224, device=device), word_texts(pairs)

    def losses(model: BLIP_Pretrain) -> tuple[torch.Tensor, ...]:
        with mixed(device, True):
            return model(images, texts, 0.4)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = training_step(model, losses, plainly=False)
    step()
    taken = statistics.median(seconds(step) for _ in range(STEPS))
    gflop = sum(part.gflop for part in pretraining_floor(model, texts))
    figures = (vit, pairs, taken, pairs / taken, 100 * gflop / taken / peak, memory_used(torch.device(device)))
    return dict(zip(COLUMNS, figures, strict=True))


def doubling(vit: str, first: int, largest: int, device: str, peak: float, checkpointed: bool) -> list[dict[str, Any]]:
    """Return the rows of one size, until the largest batch or the end of memory."""
    rows, pairs = [], first
    while pairs <= largest:
        try:
            rows.append(measure(vit, pairs, device, peak, checkpointed))
        except torch.OutOfMemoryError:
            break
        finally:
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
        print(line(rows[-1]), flush=True)
        pairs *= 2
    return rows


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    vit, pairs, taken, rate, mfu, memory = row.values()
    return f"| {vit} | {pairs} | {taken:.3f} | {rate:.1f} | {mfu:.0f}% | {memory:.1f} |"


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vit", nargs="+", default=["base", "large"])
    parser.add_argument("--first", type=int, default=8, help="pairs of the first batch (default: 8)")
    parser.add_argument("--largest", type=int, default=1024, help="pairs at most (default: 1024; 8 on a CPU)")
    parser.add_argument("--checkpointed", action="store_true", help="recompute the ViT's blocks in the backward pass")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    largest = min(args.largest, 8) if args.device == "cpu" else args.largest
    peak, source = peak_rate(args.device)
    head = [f"Peak {peak / 1e3:.1f} TFLOP/s by {source}.", ""]
    head += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    rows = []
    for vit in args.vit:
        rows += doubling(vit, min(args.first, largest), largest, args.device, peak, args.checkpointed)
    text = "\n".join([*head, *map(line, rows)])
    print(text)
    kind = "recomputing the ViT" if args.checkpointed else "keeping all"
    write_section(f"Pretraining on one {args.device}, bfloat16, {kind}: `python -m benchmarks.throughput`", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
