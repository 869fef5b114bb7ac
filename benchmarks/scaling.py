"""Cost against size, for this project and the released algorithm: python -m benchmarks.scaling

Writes benchmarks/scaling.png and its section of benchmarks/RESULTS.md; `small` models at 224 pixels, seconds.
"""

import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import SMALL_TEXT, Case, Size, word_texts
from benchmarks.inference_rows import captioning, reranking
from benchmarks.measure import seconds
from benchmarks.results import write_section
from benchmarks.training_rows import pretraining_step
from inference.ranking import two_stage_scores
from models.blip_itm import BLIP_ITM
from models.cpu_products import pytorch_products, use_cpu_products
from report.figures import draw_lines
from tests import plain

FIGURE = Path(__file__).parent / "scaling.png"
SIZE = Size("small", SMALL_TEXT, 224)
REPEATS = 3
Points = list[tuple[float, float]]


def lines(cases: Iterable[tuple[float, Case]], repeats: int = REPEATS) -> dict[str, Points]:
    """Return the median seconds of ours and of the first peer, for each case."""
    found: dict[str, Points] = {"ours": [], "peer": []}
    for size, case in cases:
        peer = pytorch_products()(next(iter(case.peers.values())))
        for name, work in (("ours", case.ours), ("peer", peer)):
            found[name].append((size, median_seconds(work, repeats)))
    return found


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the median time of some runs, after one run to warm up."""
    work()
    return statistics.median(seconds(work) for _ in range(repeats))


def evaluation(images: int, k: int) -> Case:
    """Return both directions of a retrieval evaluation with two texts per image."""
    model = use_cpu_products(BLIP_ITM(**SIZE.settings).eval())
    pixels, texts = torch.randn(images, 3, SIZE.image_size, SIZE.image_size), word_texts(2 * images)
    batches = [{"image": part} for part in pixels.split(16)]

    def encode(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        states = model.visual_encoder(batch["image"])
        return states, torch.nn.functional.normalize(model.vision_proj(states[:, 0]), dim=-1)

    ours = torch.no_grad()(lambda: two_stage_scores(model, encode, batches, texts, k, 64))
    theirs = torch.no_grad()(lambda: plain.retrieval_scores(model, pixels, texts, k))
    return Case(ours, {"released algorithm": theirs}, lambda: 0.0, [])


def main() -> int:
    """Measure, and write the figure and its numbers."""
    panels = {
        "re-ranking one image (s)": (
            "texts", lines((k, reranking("cpu", size=SIZE, count=k)) for k in (1, 8, 32, 128))
        ),
        "pretraining step (s), texts of about 10 words": (
            "pairs", lines((n, pretraining_step("cpu", size=SIZE, pairs=n)) for n in (2, 4, 8, 16))
        ),
        "retrieval evaluation (s), k 8": ("images", lines(((n, evaluation(n, 8)) for n in (8, 16, 32)), 1)),
        "retrieval evaluation (s), 16 images": ("k", lines(((k, evaluation(16, k)) for k in (2, 8, 16)), 1)),
        "captioning (s), beam 3, 20 tokens": (
            "images", lines((n, captioning("cpu", size=SIZE, images=n)) for n in (1, 4, 16))
        ),
    }  # fmt: skip
    draw_lines({t: found for t, (_, found) in panels.items()}, {t: unit for t, (unit, _) in panels.items()}, FIGURE)
    rows = ["![Cost against size](scaling.png)", ""]
    for title, (unit, found) in panels.items():
        for name, points in found.items():
            rows.append(f"- {title}, {name}: " + ", ".join(f"{y:.2f} at {x}" for x, y in points) + f" {unit}")
    print("\n".join(rows))
    write_section("Cost against size, `small` at 224 pixels: `python -m benchmarks.scaling`", "\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
