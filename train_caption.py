"""Fine-tune and evaluate a captioner (paper section 5.2)."""

from launch.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from data import make_loaders, prefetch
from data.annotations import find_annotation
from files import read_json, write_json
from launch.config import CaptionConfig
from launch.run import Run, launch
from metrics.caption import caption_scores, metric_obstacles
from metrics.ground_truth import read_ground_truth, refuse_missing
from models.blip import BLIP_Decoder, blip_decoder
from training.loop import Losses, Scores, Task
from training.progress import Progress
from training.results import on_splits, splits_of, train_and_report
from utils import UserError, gather_results, id_text, on_main_process, track

EXAMPLES = (
    "python train_caption.py --config configs/miniature/caption.yaml --output_dir output/caption",
    "python -m torch.distributed.run --nproc_per_node=8 train_caption.py --config configs/caption_coco.yaml",
    "python train_caption.py --config configs/miniature/caption.yaml --evaluate "
    "--set pretrained=output/caption/checkpoint_best.pth",
)


def train_step(model: nn.Module, batch: dict[str, Any], progress: Progress) -> Losses:
    """Language-modelling loss of images and captions."""
    return {"loss_lm": model(batch["image"], batch["caption"])}


def write_captions(model: BLIP_Decoder, loader: DataLoader, config: Any, **settings: float) -> list[dict[str, Any]]:
    """Caption every image of a split; the same list, in the order of the split, on every process."""
    device, results = next(model.parameters()).device, []
    settings |= {key: config[key] for key in ("num_beams", "max_length", "min_length")}
    for batch in prefetch(track(loader, "captioning"), device):
        captions = model.generate(batch["image"], **settings)
        ids = batch["image_id"]
        ids = ids if isinstance(ids, list) else ids.tolist()
        results += [{"image_id": image_id, "caption": text} for image_id, text in zip(ids, captions, strict=True)]
    return gather_results(results)


def evaluate(model: BLIP_Decoder, loader: DataLoader, split: str, config: CaptionConfig, run: Run) -> Scores:
    """Caption the images of a split, write the results, and score them."""
    results = write_captions(model, loader, config)

    def score() -> tuple[Scores, dict[str, str]]:
        """Write the result file and return the scores, and notes on what was left out."""
        write_json(run.result(split), results)
        return caption_scores(results, ground_truth(split, config), config.java)

    scores, notes = on_main_process(score)
    for name, reason in notes.items():
        run.note(f"{name}: {reason}")
    return scores


def ground_truth(split: str, config: CaptionConfig) -> str:
    """Return the path of a split's ground truth."""
    return find_annotation(config.coco_gt_root, f"coco_karpathy_{split}_gt.json", config[f"{split}_gt"])


def best_metric(scores: dict[str, float]) -> float:
    """CIDEr + Bleu_4 on the validation images."""
    return scores["val_CIDEr"] + scores["val_Bleu_4"]


def check_ground_truth(loaders: dict[str, DataLoader], truth_of: Callable[[str], str]) -> None:
    """Raise UserError if the ground truth of a split, the file `truth_of(split)`, has images that the split has not."""
    for split, loader in loaders.items():
        if split != "train" and (file := truth_of(split)):
            refuse_missing(read_ground_truth(file), loader.dataset.ids)


def check_captions(model: BLIP_Decoder, config: Any) -> dict[str, str]:
    """Return the metrics that cannot be computed here, and why; UserError if the prompt fills `max_length`."""
    if model.prompt_length >= config.max_length:
        lengths = f"prompt has {model.prompt_length} tokens and max_length is {config.max_length}"
        raise UserError(f"{lengths}; raise max_length")
    return metric_obstacles(config.java)


def examples(dataset: Any, split: str, config: CaptionConfig, run: Run, count: int = 24) -> list[dict[str, Any]]:
    """Return images of a split with their captions and references, for the report."""
    references = read_ground_truth(ground_truth(split, config)).references
    cards = []
    for i, row in enumerate(read_json(run.result(split))[:count]):
        lines = [("reference", text, "") for text in references.get(id_text(row["image_id"]), [])]
        cards.append({"image": dataset.path(i), "lines": [("caption", row["caption"], ""), *lines]})
    return cards


def main(config: CaptionConfig, run: Run) -> None:
    """Train unless asked to evaluate only, then report."""
    loaders = make_loaders("caption_coco", config, splits_of(run, config), run.seed)
    on_main_process(lambda: check_ground_truth(loaders, lambda split: ground_truth(split, config)))
    model = blip_decoder(**config.model_settings("prompt", "smooth_padding"))
    for name, reason in check_captions(model, config).items():
        run.note(f"{name}: {reason}")
    task = Task(train_step, on_splits(loaders, partial(evaluate, config=config, run=run)), best_metric)
    train_and_report(run, config, model, loaders, task, "Captioning", partial(examples, config=config, run=run))


if __name__ == "__main__":
    sys.exit(launch(main, CaptionConfig, "configs/caption_coco.yaml", "output/caption_coco", __doc__, EXAMPLES))
