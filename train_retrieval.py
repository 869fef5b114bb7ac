"""Fine-tune and evaluate image-text retrieval (paper section 5.1)."""

from launch.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from data import make_loaders
from files import read_json, write_json
from inference.ranking import two_stage_scores
from launch.config import RetrievalConfig
from launch.run import Run, launch
from metrics.retrieval import retrieval_scores
from models.blip_retrieval import BLIP_Retrieval, blip_retrieval
from models.momentum import Candidates
from training.contrast import compute_candidates
from training.loop import Losses, Scores, Task
from training.progress import Progress
from training.results import on_splits, splits_of, train_and_report
from utils import on_main_process

DATASETS = {"coco": "retrieval_coco", "flickr": "retrieval_flickr"}
EXAMPLES = (
    "python train_retrieval.py --config configs/miniature/retrieval.yaml --output_dir output/retrieval",
    "python -m torch.distributed.run --nproc_per_node=8 train_retrieval.py --config configs/retrieval_flickr.yaml",
    "python train_retrieval.py --config configs/retrieval_coco.yaml --evaluate --set pretrained=model.pth",
)


def train_step(
    model: nn.Module, batch: dict[str, Any], progress: Progress, candidates: Candidates | None = None, *, alpha: float
) -> Losses:
    """Contrastive and matching losses of pairs; the weight `alpha` of momentum targets grows over the first epoch."""
    alpha *= min(1.0, progress.epoch_fraction)
    loss_itc, loss_itm = model(batch["image"], batch["caption"], alpha=alpha, idx=batch["idx"], candidates=candidates)
    return {"loss_itc": loss_itc, "loss_itm": loss_itm}


def evaluate(model: BLIP_Retrieval, loader: DataLoader, split: str, config: RetrievalConfig, run: Run) -> Scores:
    """Rank both ways and return recalls, their means and the median ranks."""

    def encode(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and features of images."""
        image_embeds = model.visual_encoder(batch["image"].to(run.device, non_blocking=True))
        return image_embeds, model.image_feat(image_embeds)

    dataset = loader.dataset
    if config.k_test > min(len(dataset), len(dataset.text)):
        run.note(f"k_test {config.k_test} is above the size of the {split} split and was lowered to it")
    sizes = config.k_test, config.batch_size_test
    ranking = two_stage_scores(model, encode, loader, dataset.text, *sizes, config.keep_images)

    def measure() -> Scores:
        """Write the best images of each text, and return the scores."""
        write_json(run.result(split), best_texts(ranking.t2i, dataset))
        return retrieval_scores(ranking.i2t, ranking.t2i, dataset.txt2img, dataset.img2txt)

    return on_main_process(measure)


def best_texts(t2i: Any, dataset: Any, count: int = 5) -> list[dict[str, Any]]:
    """Return the best images of every text, by index, and the right one."""
    best = (-t2i).argsort(axis=1, kind="stable")[:, :count]
    return [
        {"text": text, "images": row.tolist(), "right": dataset.txt2img[i]}
        for i, (text, row) in enumerate(zip(dataset.text, best, strict=True))
    ]


def examples(dataset: Any, split: str, run: Run, count: int = 12) -> list[dict[str, Any]]:
    """Return texts with the images found for them, for the report."""
    rows = read_json(run.result(split))
    return [
        {
            "images": [dataset.path(i) for i in row["images"]],
            "tones": ["good" if i == row["right"] else "" for i in row["images"]],
            "lines": [("text", row["text"], "good" if row["images"][0] == row["right"] else "bad")],
        }
        for row in rows[:: max(len(rows) // count, 1)][:count]
    ]


def main(config: RetrievalConfig, run: Run) -> None:
    """Train unless asked to evaluate only, then report."""
    loaders = make_loaders(DATASETS[config.dataset], config, splits_of(run, config), run.seed)
    model = blip_retrieval(**config.model_settings("embed_dim", "queue_size", "negative_all_rank", "itc_all_ranks"))
    task = Task(
        partial(train_step, alpha=config.alpha),
        on_splits(loaders, partial(evaluate, config=config, run=run)),
        best_metric=lambda scores: scores["val_r_mean"],
        candidates=compute_candidates if config.itc_cached else None,
    )
    train_and_report(run, config, model, loaders, task, "Image-text retrieval", partial(examples, run=run))


if __name__ == "__main__":
    sys.exit(launch(main, RetrievalConfig, "configs/retrieval_coco.yaml", "output/retrieval", __doc__, EXAMPLES))
