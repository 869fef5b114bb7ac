"""Fine-tune and evaluate a judge of statements about two images, NLVR2 (paper section 5.4)."""

from launch.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from data import make_loaders, prefetch
from files import read_json, write_json
from launch.config import NLVRConfig
from launch.run import Run, launch
from metrics.classification import accuracy, consistency
from models.blip_nlvr import BLIP_NLVR, blip_nlvr
from training.loop import Losses, Scores, Task
from training.progress import Progress
from training.results import on_splits, splits_of, train_and_report
from utils import gather_results, on_main_process, refuse_nan, track

EXAMPLES = (
    "python train_nlvr.py --config configs/miniature/nlvr.yaml --output_dir output/nlvr",
    "python -m torch.distributed.run --nproc_per_node=16 train_nlvr.py --config configs/nlvr.yaml",
)


def both_images(batch: dict[str, Any]) -> torch.Tensor:
    """Put the left images before the right ones: (2 * batch, 3, H, W)."""
    return torch.cat((batch["image0"], batch["image1"]))


def train_step(model: nn.Module, batch: dict[str, Any], progress: Progress) -> Losses:
    """Classification loss of statements about pairs of images."""
    return {"loss_nlvr": model(both_images(batch), batch["sentence"], targets=batch["label"], train=True)}


def judge(model: BLIP_NLVR, loader: DataLoader, device: torch.device) -> list[dict[str, Any]]:
    """Judge every statement of a split; the same list on every process."""
    rows = []
    for batch in prefetch(track(loader, "judging"), device):
        logits = model(both_images(batch), batch["sentence"], targets=batch["label"].to(device), train=False)
        for sentence, label, row in zip(batch["sentence"], batch["label"].tolist(), logits.float().cpu(), strict=True):
            probability = row.softmax(0)[1].item()
            rows.append({"sentence": sentence, "label": label, "prediction": int(row.argmax()), "true": probability})
    return gather_results(rows)


def evaluate(model: BLIP_NLVR, loader: DataLoader, split: str, run: Run) -> Scores:
    """Return accuracy, and consistency over statements that several pairs share."""
    rows = judge(model, loader, run.device)
    refuse_nan([row["true"] for row in rows])
    on_main_process(lambda: write_json(run.result(split), rows))
    sentences, predictions, labels = ([row[key] for row in rows] for key in ("sentence", "prediction", "label"))
    return {"acc": accuracy(predictions, labels), "consistency": consistency(sentences, predictions, labels)}


def examples(dataset: Any, split: str, run: Run, count: int = 16) -> list[dict[str, Any]]:
    """Return statements with their images and verdicts, for the report."""
    return [
        {
            "images": dataset.paths(i),
            "lines": [
                (f"{bool(row['prediction'])}", row["sentence"], "good" if row["prediction"] == row["label"] else "bad"),
                ("probability of true", f"{row['true']:.2f}", ""),
            ],
        }
        for i, row in enumerate(read_json(run.result(split))[:count])
    ]


def main(config: NLVRConfig, run: Run) -> None:
    """Train unless asked to evaluate only, then report."""
    loaders = make_loaders("nlvr", config, splits_of(run, config), run.seed)
    model = blip_nlvr(**config.model_settings("drop_path_rate"))
    task = Task(train_step, on_splits(loaders, partial(evaluate, run=run)), lambda scores: scores["val_acc"])
    train_and_report(run, config, model, loaders, task, "Statements about two images", partial(examples, run=run))


if __name__ == "__main__":
    sys.exit(launch(main, NLVRConfig, "configs/nlvr.yaml", "output/nlvr", __doc__, EXAMPLES))
