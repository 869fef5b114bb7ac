"""Caption NoCaps images, which show objects never seen in training, and score them by domain (paper section 5.2)."""

from launch.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from data import make_loaders
from files import read_json, write_json
from launch.config import NoCapsConfig
from launch.run import Run, launch
from metrics.caption import domain_scores
from models.blip import BLIP_Decoder, blip_decoder
from train_caption import check_captions, check_ground_truth, write_captions
from training.loop import Scores
from training.results import eval_splits, evaluate_only, on_splits, report_scores
from utils import on_main_process

EXAMPLES = (
    "python eval_nocaps.py --config configs/miniature/nocaps.yaml",
    "python -m torch.distributed.run --nproc_per_node=8 eval_nocaps.py --config configs/nocaps_large.yaml",
)


def evaluate(model: BLIP_Decoder, loader: DataLoader, split: str, config: NoCapsConfig, run: Run) -> Scores:
    """Write the captions of a split, and score them if its ground truth is given."""
    results = write_captions(model, loader, config, repetition_penalty=config.repetition_penalty)
    path = on_main_process(lambda: write_json(run.result(split), results))
    run.note(f"captions of the {split} images: {path}")
    if not (truth := config[f"{split}_gt"]):
        return {}
    found, notes = on_main_process(lambda: domain_scores(results, truth, config.java))
    for name, reason in notes.items():
        run.note(f"{name}: {reason}")
    return {f"{domain}_{name}": value for domain, scores in found.items() for name, value in scores.items()}


def examples(dataset: Any, split: str, run: Run, count: int = 24) -> list[dict[str, Any]]:
    """Return images with their captions, for the report."""
    rows = read_json(run.result(split))[:count]
    return [{"image": dataset.path(i), "lines": [("caption", row["caption"], "")]} for i, row in enumerate(rows)]


def main(config: NoCapsConfig, run: Run) -> None:
    """Caption the splits and report."""
    loaders = make_loaders("nocaps", config, eval_splits(config))
    on_main_process(lambda: check_ground_truth(loaders, lambda split: config[f"{split}_gt"]))
    model = blip_decoder(**config.model_settings("prompt"))
    for name, reason in check_captions(model, config).items() if config.val_gt or config.test_gt else ():
        run.note(f"{name}: {reason}")
    scores = evaluate_only(run, config, model, on_splits(loaders, partial(evaluate, config=config, run=run)))
    split = next(iter(loaders))
    report_scores(run, "NoCaps", scores, lambda: examples(loaders[split].dataset, split, run))


if __name__ == "__main__":
    sys.exit(launch(main, NoCapsConfig, "configs/nocaps.yaml", "output/nocaps", __doc__, EXAMPLES))
