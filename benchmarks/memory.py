"""Memory of a pretraining step for each pair, with and without checkpointing: python -m benchmarks.memory

Each measurement is a process of its own, whose peak is read at two batch sizes.
"""

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import torch

from benchmarks.results import write_section
from benchmarks.rows import training_step, word_texts
from models.blip_pretrain import BLIP_Pretrain
from models.med import TextTransformer

BATCHES = (4, 12)  # pairs, far enough apart for the difference to count
CASES = {"none": (False, False), "image": (True, False), "text": (False, True), "image and text": (True, True)}


def peak(pairs: int, image: bool, text: bool) -> float:
    """Return the peak memory, in MiB, of a process that takes two steps."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = BLIP_Pretrain(vit_grad_ckpt=image, vit_ckpt_layer=12, queue_size=4096).train().to(device)
    for part in model.modules():
        if isinstance(part, TextTransformer):
            part.grad_checkpointing = text
    images, texts = torch.randn(pairs, 3, 224, 224, device=device), word_texts(pairs)
    step = training_step(model, lambda m: m(images, texts, 0.4), plainly=False)
    for _ in range(2):
        step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(name: str, pairs: int) -> float:
    """Return the peak of a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--case", name, "--pairs", str(pairs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def all_cases() -> dict[str, dict[str, Any]]:
    """Return MiB a pair and the rest, for each kind of checkpointing."""
    found = {}
    for name in CASES:
        few, many = (measure(name, pairs) for pairs in BATCHES)
        each = (many - few) / (BATCHES[1] - BATCHES[0])
        found[name] = {"MiB a pair": each, "MiB besides": few - BATCHES[0] * each}
    return found


def main() -> int:
    """Measure all cases, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="measure this one here and print its peak in MiB")
    parser.add_argument("--pairs", type=int, default=BATCHES[0])
    args = parser.parse_args()
    if args.case:
        print(peak(args.pairs, *CASES[args.case]))
        return 0
    lines = ["| checkpointing of | MiB a pair | MiB besides |", "|---|---|---|"]
    for name, row in all_cases().items():
        lines.append(f"| {name} | {row['MiB a pair']:.0f} | {row['MiB besides']:.0f} |")
    print("\n".join(lines))
    write_section("Memory of a pretraining step, base: `python -m benchmarks.memory`", "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
