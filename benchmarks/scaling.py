"""Cost against size, for this project and the released algorithm: python -m benchmarks.scaling

Writes benchmarks/scaling.png and its section of benchmarks/RESULTS.md; `small` models at 224 pixels, seconds.
"""

import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from benchmarks.case import SMALL_TEXT, Case, Size, word_texts
from benchmarks.inference_rows import build, captioning, inference, reranking
from benchmarks.measure import seconds
from benchmarks.results import write_section
from benchmarks.training_rows import pretraining_step
from inference.ranking import two_stage_scores
from models.blip_itm import BLIP_ITM
from models.cpu_products import pytorch_products
from report.figures import draw_lines
from tests import plain
from utils import run_command

FIGURE = Path(__file__).parent / "scaling.png"
SIZE = Size("small", SMALL_TEXT, 224)


def lines(make: Callable[..., Case], key: str, values: Iterable[int], repeats: int = 3) -> dict[str, list]:
    """Return (value, median seconds) of ours and of the first peer, after one run to warm up."""
    found: dict[str, list] = {"ours": [], "peer": []}
    for value in values:
        case = make(**{key: value})
        for name, work in (("ours", case.ours), ("peer", pytorch_products()(next(iter(case.peers.values()))))):
            work()
            found[name].append((value, statistics.median(seconds(work) for _ in range(repeats))))
    return found


def evaluation(images: int = 16, k: int = 8) -> Case:
    """Return both directions of a retrieval evaluation with two texts per image."""
    model = build(BLIP_ITM, SIZE, "cpu")
    pixels, texts = SIZE.images(images, "cpu"), word_texts(2 * images)
    batches = [{"image": part} for part in pixels.split(16)]

    def encode(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and features of images."""
        states = model.visual_encoder(batch["image"])
        return states, torch.nn.functional.normalize(model.vision_proj(states[:, 0]), dim=-1)

    ours = inference("cpu", False, lambda: two_stage_scores(model, encode, batches, texts, k, 64))
    theirs = inference("cpu", False, lambda: plain.retrieval_scores(model, pixels, texts, k))
    return Case(ours, {"released algorithm": theirs}, lambda: 0.0, [])


def main() -> None:
    """Measure, and write the figure and its numbers."""
    rerank, pretrain, caption = (partial(make, "cpu", size=SIZE) for make in (reranking, pretraining_step, captioning))
    panels = {
        "re-ranking one image (s)": ("texts", lines(rerank, "count", (1, 8, 32, 128))),
        "pretraining step (s), texts of about 10 words": ("pairs", lines(pretrain, "pairs", (2, 4, 8, 16))),
        "retrieval evaluation (s), k 8": ("images", lines(evaluation, "images", (8, 16, 32), 1)),
        "retrieval evaluation (s), 16 images": ("k", lines(evaluation, "k", (2, 8, 16), 1)),
        "captioning (s), beam 3, 20 tokens": ("images", lines(caption, "images", (1, 4, 16))),
    }
    draw_lines({t: found for t, (_, found) in panels.items()}, {t: unit for t, (unit, _) in panels.items()}, FIGURE)
    rows = ["![Cost against size](scaling.png)", ""]
    for title, (unit, found) in panels.items():
        for name, points in found.items():
            rows.append(f"- {title}, {name}: " + ", ".join(f"{y:.2f} at {x}" for x, y in points) + f" {unit}")
    print("\n".join(rows))
    write_section("Cost against size, `small` at 224 pixels: `python -m benchmarks.scaling`", "\n".join(rows))


if __name__ == "__main__":
    sys.exit(run_command(main))
