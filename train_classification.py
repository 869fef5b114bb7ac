"""Fine-tune and evaluate classification of images, with or without a text, such as visual entailment (SNLI-VE)."""

from launch.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from data import make_loaders, prefetch
from data.classification import class_names
from files import read_json, write_json
from inference.zero_shot import class_features, class_probabilities
from launch.config import ClassificationConfig
from launch.run import Run, launch
from metrics.classification import accuracy
from models.blip_classification import blip_classification
from models.blip_itm import blip_itm
from training.loop import Losses, Scores, Task
from training.progress import Progress
from training.results import on_splits, splits_of, train_and_report
from utils import UserError, gather_results, on_main_process, refuse_nan, track

EXAMPLES = (
    "python train_classification.py --config configs/miniature/classification.yaml --output_dir output/entailment",
    "python -m torch.distributed.run --nproc_per_node=8 train_classification.py --config configs/snli_ve.yaml",
    "python train_classification.py --evaluate --set zero_shot=true --set test_file=folder --set pretrained=model.pth",
)
Predict = Callable[[dict[str, Any]], torch.Tensor]


def train_step(model: nn.Module, batch: dict[str, Any], progress: Progress) -> Losses:
    """Classification loss."""
    return {"loss_cls": model(batch["image"], batch["text"], targets=batch["label"], train=True)}


def make_predict(model: nn.Module, config: ClassificationConfig) -> Predict:
    """Return a function from a batch to probabilities (batch, classes)."""
    if config.zero_shot:
        feats = class_features(model, config.classes, config.templates)
        return lambda batch: class_probabilities(model, batch["image"], feats, config.temperature)
    return lambda batch: model(batch["image"], batch["text"], train=False).float().softmax(dim=-1)


def classify(predict: Predict, loader: DataLoader, classes: list[str], device: torch.device) -> list[dict[str, Any]]:
    """Classify every example of a split; the same list on every process."""
    rows = []
    for batch in prefetch(track(loader, "classifying"), device):
        found = predict(batch).cpu()
        for text, label, probabilities in zip(batch["text"], batch["label"].tolist(), found, strict=True):
            best = int(probabilities.argmax())
            rows.append({"text": text, "label": classes[label], "prediction": classes[best],
                         "probability": round(probabilities[best].item(), 4)})  # fmt: skip
    return gather_results(rows)


def evaluate(model: nn.Module, loader: DataLoader, split: str, config: ClassificationConfig, run: Run) -> Scores:
    """Return the accuracy."""
    rows = classify(make_predict(model, config), loader, config.classes, run.device)
    refuse_nan([row["probability"] for row in rows])
    on_main_process(lambda: write_json(run.result(split), rows))
    return {"acc": accuracy(*([config.classes.index(row[key]) for row in rows] for key in ("prediction", "label")))}


def examples(dataset: Any, split: str, run: Run, count: int = 24) -> list[dict[str, Any]]:
    """Return images with their classes, for the report."""
    return [
        {
            "image": dataset.path(i),
            "lines": [("text", row["text"], ""), (row["prediction"], f"{row['probability']:.2f}", tone)],
        }
        for i, row in enumerate(read_json(run.result(split))[:count])
        for tone in ["good" if row["prediction"] == row["label"] else "bad"]
    ]


def main(config: ClassificationConfig, run: Run) -> None:
    """Train unless asked to evaluate only, then report."""
    config.classes = config.classes or class_names(config.test_file)
    if config.zero_shot and not run.evaluate:
        raise UserError("zero_shot classification does not train; add --evaluate")
    splits = ("test",) if config.zero_shot else splits_of(run, config)
    loaders = make_loaders("classification", config, splits, run.seed)
    if config.zero_shot:
        model = blip_itm(**config.model_settings("embed_dim"))
    else:
        model = blip_classification(**config.model_settings("drop_path_rate"), num_classes=len(config.classes))
    evaluate_all = on_splits(loaders, partial(evaluate, config=config, run=run))
    task = Task(train_step, evaluate_all, lambda scores: scores["val_acc"])
    train_and_report(run, config, model, loaders, task, "Classification", partial(examples, run=run))


if __name__ == "__main__":
    sys.exit(launch(main, ClassificationConfig, "configs/snli_ve.yaml", "output/snli_ve", __doc__, EXAMPLES))
