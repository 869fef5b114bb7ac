"""Fine-tune and evaluate visual dialogue, VisDial v1.0: rank the options of every question (paper section 5.5)."""

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
from data.dialogue import Dialogues
from files import read_json, write_json
from launch.config import DialogueConfig
from launch.run import Run, launch
from metrics.dialogue import dialogue_scores, option_ranks
from models.attention import Projection
from models.blip_dialogue import BLIP_Dialogue, blip_dialogue
from training.loop import Losses, Scores, Task
from training.progress import Progress
from training.results import on_splits, splits_of, train_and_report
from utils import gather_results, on_main_process, track

EXAMPLES = (
    "python train_dialogue.py --config configs/miniature/dialogue.yaml --output_dir output/dialogue",
    "python -m torch.distributed.run --nproc_per_node=8 train_dialogue.py --config configs/visdial.yaml",
    "python train_dialogue.py --evaluate --set splits=[val] --set pretrained=output/visdial/checkpoint_best.pth",
)


def train_step(model: nn.Module, batch: dict[str, Any], progress: Progress) -> Losses:
    """Matching loss of right and wrong answers."""
    dialogue = [text for texts in batch["dialogue"] for text in texts]
    return {"loss_itm": model(batch["image"], batch["caption"], dialogue, targets=batch["targets"].flatten())}


def rank(model: BLIP_Dialogue, loader: DataLoader, device: torch.device) -> list[dict[str, Any]]:
    """Rank the options of every round; the same list, in the format of VisDial's server, on every process."""
    found = []  # rows of each dialogue
    for batch in prefetch(track(loader, "ranking"), device):
        projection = model.project(batch["image"], batch["caption"])
        for source, index in enumerate(batch["index"].tolist()):
            own = projection.select(torch.tensor([source], device=device))
            found.append(rank_dialogue(model, own, loader.dataset, index))
    return [row for rows in gather_results(found) for row in rows]


def rank_dialogue(model: BLIP_Dialogue, projection: Projection, dataset: Dialogues, index: int) -> list[dict[str, Any]]:
    """Rank the options of a dialogue's rounds, which all read one projection of its image and caption."""
    row, ranked = dataset.annotation[index], []
    for turn, one in enumerate(row["dialog"]):
        if "answer_options" in one:
            texts = dataset.texts(index, turn, one["answer_options"])
            wrong, right = model.judge(projection.read_by(len(texts)), texts).float().cpu().unbind(1)
            ranks = option_ranks(right - wrong).tolist()
            ranked.append({"image_id": row["image_id"], "round_id": turn + 1, "ranks": ranks})
    return ranked


def evaluate(model: BLIP_Dialogue, loader: DataLoader, split: str, run: Run) -> Scores:
    """Write the ranks of a split, and return their scores."""
    rows, dataset = rank(model, loader, run.device), loader.dataset
    on_main_process(lambda: write_json(run.result(split), rows))
    scores = dialogue_scores(rows, dataset.right, dataset.relevance)
    if not scores:
        run.note(f"{split}: no right options are known: result/ holds the file for the evaluation server")
    return scores


def examples(dataset: Dialogues, split: str, run: Run, count: int = 12) -> list[dict[str, Any]]:
    """Return images with their dialogues and the options ranked first, for the report."""
    ranks = {(row["image_id"], row["round_id"]): row["ranks"] for row in read_json(run.result(split))}
    cards = []
    for index, row in enumerate(dataset.annotation[:count]):
        lines = [("caption", row["caption"], "")]
        for number, one in enumerate(row["dialog"], 1):
            lines.append(("question", dataset.questions[one["question"]], ""))
            if (row["image_id"], number) in ranks:
                first = ranks[row["image_id"], number].index(1)
                tone = "" if "gt_index" not in one else "good" if first == one["gt_index"] else "bad"
                lines.append(("answer", dataset.answers[one["answer_options"][first]], tone))
            if "answer" in one:
                lines.append(("right", dataset.answers[one["answer"]], ""))
        cards.append({"image": dataset.path(index), "lines": lines})
    return cards


def main(config: DialogueConfig, run: Run) -> None:
    """Train unless asked to evaluate only, then report."""
    loaders = make_loaders("dialogue", config, splits_of(run, config), run.seed)
    model = blip_dialogue(**config.model_settings("drop_path_rate"))
    task = Task(train_step, on_splits(loaders, partial(evaluate, run=run)), lambda scores: scores["val_mrr"])
    train_and_report(run, config, model, loaders, task, "Visual dialogue", partial(examples, run=run))


if __name__ == "__main__":
    sys.exit(launch(main, DialogueConfig, "configs/visdial.yaml", "output/visdial", __doc__, EXAMPLES))
