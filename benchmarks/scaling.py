"""Cost against size, ours and the plain released algorithm: python -m benchmarks.scaling

Writes benchmarks/scaling.png and benchmarks/scaling.json; sizes `small` at 224 pixels, seconds.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import seconds
from benchmarks.results import write_section
from benchmarks.rows import SMALL_TEXT, training_step, word_texts
from inference.ranking import match_image, two_stage_scores
from models.blip_itm import BLIP_ITM
from models.blip_pretrain import BLIP_Pretrain
from models.cpu_products import pytorch_products, use_cpu_products
from report.figures import draw_lines
from tests import plain

FOLDER = Path(__file__).parent
Points = list[tuple[float, float]]
REPEATS = 3
TOKENS = 197  # of a image of 224 pixels
plainly = pytorch_products()


def median_seconds(work: Callable[[], Any]) -> float:
    """Return the median time of some runs, after one that warms up."""
    work()
    return statistics.median(seconds(work) for _ in range(REPEATS))


@torch.no_grad()
def reranking(sizes: tuple[int, ...] = (1, 8, 16, 32, 64, 128)) -> dict[str, Points]:
    """One image against k texts."""
    model = use_cpu_products(BLIP_ITM(med_config=SMALL_TEXT, vit="small", image_size=224).eval())
    states, lines = torch.randn(1, TOKENS, 384), {"ours": [], "plain": []}
    for k in sizes:
        texts = word_texts(k)
        rows = [model.tokenizer(text).input_ids for text in texts]
        ids, mask = plain.tokens_of(model, texts, plain.MATCH_TOKENS, model.tokenizer.enc_token_id)
        expanded = states.expand(k, -1, -1)
        lines["ours"].append((k, median_seconds(lambda rows=rows: match_image(model, states, rows, 64))))
        work = lambda e=expanded, i=ids, m=mask: plain.match_logits(model, e, i, m)  # noqa: E731
        lines["plain"].append((k, median_seconds(plainly(work))))
    return lines


def pretraining(cases: dict[int, list[str]]) -> dict[str, Points]:
    """A whole step on each case's texts."""
    lines: dict[str, Points] = {"ours": [], "plain": []}
    steps = {
        "ours": (lambda image, texts: lambda m: m(image, texts, 0.4), False),
        "plain": (lambda image, texts: lambda m: plain.pretraining_losses(m, image, texts, 0.4), True),
    }
    for name, (losses, by_pytorch) in steps.items():
        model = BLIP_Pretrain(med_config=SMALL_TEXT, vit="small", image_size=224, queue_size=4096).train()
        for size, texts in cases.items():
            image = torch.randn(len(texts), 3, 224, 224)
            step = training_step(model, losses(image, texts), by_pytorch)
            lines[name].append((size, median_seconds(plainly(step) if by_pytorch else step)))
    return lines


@torch.no_grad()
def evaluation(sizes: tuple[int, ...] = (8, 16, 32, 64), k: int = 8) -> dict[str, Points]:
    """Both directions of a collection with two texts an image."""
    model = use_cpu_products(BLIP_ITM(med_config=SMALL_TEXT, vit="small", image_size=224).eval())
    lines: dict[str, Points] = {"ours": [], "plain": []}

    def encode(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        states = model.visual_encoder(batch["image"])
        return states, torch.nn.functional.normalize(model.vision_proj(states[:, 0]), dim=-1)

    for size in sizes:
        images, texts = torch.randn(size, 3, 224, 224), word_texts(2 * size)
        batches = [{"image": part} for part in images.split(16)]
        ours = lambda b=batches, t=texts: two_stage_scores(model, encode, b, t, k, 64)  # noqa: E731
        lines["ours"].append((size, seconds(ours)))
        work = plainly(lambda i=images, t=texts: plain.retrieval_scores(model, i, t, k))
        lines["plain"].append((size, seconds(work)))
    return lines


def main() -> int:
    """Measure, and write the figures."""
    torch.manual_seed(0)
    by_length = {n: [" ".join(["red"] * n)] * 8 for n in (4, 8, 12, 18, 26)}
    by_batch = {n: word_texts(n) for n in (2, 4, 8, 16)}
    panels = {
        "re-ranking one image (s)": (reranking(), "texts"),
        "pretraining step (s), texts of about 10 words": (pretraining(by_batch), "pairs"),
        "pretraining step (s), 8 pairs": (pretraining(by_length), "words of each text"),
        "retrieval evaluation (s), k 8": (evaluation(), "images, with two texts each"),
    }
    draw_lines(
        {title: lines for title, (lines, _) in panels.items()},
        {title: unit for title, (_, unit) in panels.items()},
        FOLDER / "scaling.png",
    )
    (FOLDER / "scaling.json").write_text(json.dumps({title: lines for title, (lines, _) in panels.items()}, indent=1))
    told = ["![Cost against size](scaling.png)", ""]
    for title, (lines, unit) in panels.items():
        for name, points in lines.items():
            told.append(f"- {title}, {name}: " + ", ".join(f"{y:.2f} at {x}" for x, y in points) + f" {unit}")
    print("\n".join(told))
    write_section("Cost against size, `small` at 224 pixels: `python -m benchmarks.scaling`", "\n".join(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
