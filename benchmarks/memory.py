"""Memory of a pretraining step: python -m benchmarks.memory

For each pair, with and without checkpointing, from two batch sizes; and of a large batch, in one and in several parts.
Each measurement is a process of its own, whose peak is read.
"""

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import torch

from benchmarks.results import write_section
from benchmarks.rows import word_texts
from models.blip_pretrain import BLIP_Pretrain
from models.med import TextTransformer
from training.contrast import compute_candidates
from training.optimizer import create_optimizer

BATCHES = (4, 12)  # pairs, far enough apart for the difference to count
LARGE, PARTS = 16, (1, 2, 4)  # pairs of a large batch, and the parts it comes in
CASES = {"none": (False, False), "image": (True, False), "text": (False, True), "image and text": (True, True)}


def build(image: bool, text: bool, **settings: Any) -> BLIP_Pretrain:
    """Return a model in training mode whose image or text blocks are recomputed in the backward pass."""
    model = BLIP_Pretrain(vit_grad_ckpt=image, vit_ckpt_layer=24, **settings).train()
    for part in model.modules():
        if isinstance(part, TextTransformer):
            part.grad_checkpointing = text
    return model


def peak(pairs: int, parts: int, image: bool, text: bool) -> float:
    """Return the peak memory, in MiB, of a process that takes two steps, each of `parts` batches of `pairs`."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(image, text, queue_size=4096).to(device)
    optimizer = create_optimizer(model, 1e-6, 0.05)
    batches = [{"image": torch.randn(pairs, 3, 224, 224), "caption": word_texts(pairs)} for _ in range(parts)]
    for _ in range(2):
        take_step(model, optimizer, batches, device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def take_step(model: BLIP_Pretrain, optimizer: torch.optim.Optimizer, batches: list, device: torch.device) -> None:
    """Take a step as `training.loop` does; the contrast of several batches is that of one large batch."""
    optimizer.zero_grad(set_to_none=True)
    batches = [{**batch, "image": batch["image"].to(device)} for batch in batches]
    found = compute_candidates(model, batches) if len(batches) > 1 else [None]
    for batch, candidates in zip(batches, found, strict=True):
        losses = model(**batch, alpha=0.4, candidates=candidates)
        (sum(losses) / len(batches)).backward()
    optimizer.step()


def measure(name: str, pairs: int, parts: int = 1) -> float:
    """Return the peak of a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--case", name, "--pairs", str(pairs), "--parts", str(parts)]
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
    parser.add_argument("--pairs", type=int, default=BATCHES[0], help="pairs of a batch")
    parser.add_argument("--parts", type=int, default=1, help="batches of a step, contrasted as one (itc_cached)")
    args = parser.parse_args()
    if args.case:
        print(peak(args.pairs, args.parts, *CASES[args.case]))
        return 0
    lines = ["| checkpointing of | MiB a pair | MiB besides |", "|---|---|---|"]
    for name, row in all_cases().items():
        lines.append(f"| {name} | {row['MiB a pair']:.0f} | {row['MiB besides']:.0f} |")
    lines += ["", f"| {LARGE} pairs contrasted | MiB at most |", "|---|---|"]
    for parts in PARTS:
        what = "in one batch" if parts == 1 else f"in {parts} batches of {LARGE // parts} (`itc_cached`)"
        lines.append(f"| {what} | {measure('none', LARGE // parts, parts):.0f} |")
    print("\n".join(lines))
    write_section("Memory of a pretraining step, base: `python -m benchmarks.memory`", "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
