"""Fine-tune and evaluate visual question answering (paper section 5.3)."""

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
from launch.config import VQAConfig
from launch.run import Run, launch
from metrics.knowledge import choice_accuracy, direct_accuracy, exact_match
from metrics.vqa import vqa_accuracy
from models.blip_vqa import BLIP_VQA, MAX_QUESTION_TOKENS, blip_vqa
from models.tokenizer import tokenize
from training.loop import Losses, Scores, Task
from training.progress import Progress
from training.results import on_splits, train_and_report
from utils import UserError, gather_results, on_main_process, track

EXAMPLES = (
    "python train_vqa.py --config configs/miniature/vqa.yaml --output_dir output/vqa",
    "python -m torch.distributed.run --nproc_per_node=16 train_vqa.py --config configs/vqa.yaml",
    "python train_vqa.py --config configs/vqa.yaml --evaluate --set inference=generate",
)
SCORES = {"vqa": vqa_accuracy, "aokvqa": direct_accuracy, "exact": exact_match}


def train_step(model: nn.Module, batch: dict[str, Any], progress: Progress) -> Losses:
    """Weighted language-modelling loss of the answers."""
    loss = model(batch["image"], batch["question"], batch["answer"], n=batch["n"], weights=batch["weights"])
    return {"loss_vqa": loss}


def answer(model: BLIP_VQA, loader: DataLoader, config: VQAConfig, device: torch.device) -> list[dict[str, Any]]:
    """Answer every question of a split; the same list, in the order of the split, on every process."""
    names = loader.dataset.answer_list
    candidates = tokenize(model.tokenizer, names, "dec", device=device) if config.inference == "rank" else None
    choices = {row["question_id"]: row.get("choices") for row in loader.dataset.annotation}
    rows = []
    for batch in prefetch(track(loader, "answering"), device):
        image, questions = batch["image"], batch["question"]
        ids = batch["question_id"]
        ids = ids if isinstance(ids, list) else ids.tolist()
        if config.inference == "choices":
            answers = choose(model, image, questions, [choices[i] for i in ids])
        elif candidates is None:
            answers = model(image, questions, train=False, inference="generate")
        else:
            chosen = model(image, questions, candidates, train=False, inference="rank", k_test=config.k_test)
            answers = [names[i] for i in chosen.tolist()]
        rows += [{"question_id": i, "answer": text} for i, text in zip(ids, answers, strict=True)]
    return gather_results(rows)


def choose(model: BLIP_VQA, image: torch.Tensor, questions: list[str], choices: list[list[str] | None]) -> list[str]:
    """Choose among the choices that each question has of its own."""
    text = tokenize(model.tokenizer, questions, "enc", MAX_QUESTION_TOKENS, image.device)
    states, chosen = model.question_states(image, text), []
    for i, names in enumerate(choices):
        if not names:
            raise UserError("inference: choices needs 'choices' in every row of the test file; set inference: rank")
        candidates = tokenize(model.tokenizer, names, "dec", device=image.device)
        best = model.rank_answer(states[i : i + 1], text.attention_mask[i : i + 1], *candidates, len(names))
        chosen.append(names[best.item()])
    return chosen


def score(rows: list[dict[str, Any]], annotation: list[dict[str, Any]], config: VQAConfig) -> Scores:
    """Score answers where the test file tells the right ones; {} where it does not."""
    if config.inference == "choices":
        truth = [row for row in annotation if row.get("correct_choice_idx") is not None]
        return choice_accuracy(rows, truth) if truth else {}
    truth = [row for row in annotation if "answer" in row]
    return SCORES[config.scoring](rows, truth) if truth else {}


def evaluate(model: BLIP_VQA, loader: DataLoader, split: str, config: VQAConfig, run: Run) -> Scores:
    """Write the result file, and score it where the test file has answers."""
    rows = answer(model, loader, config, run.device)

    def measure() -> Scores:
        """Write the answers, and return their scores."""
        write_json(run.result("vqa_result"), rows)
        if config.scoring == "aokvqa":  # the file for its leaderboard
            key = "multiple_choice" if config.inference == "choices" else "direct_answer"
            write_json(run.result("aokvqa"), {row["question_id"]: {key: row["answer"]} for row in rows})
        return score(rows, loader.dataset.annotation, config)

    scores = on_main_process(measure)
    if not scores:
        run.note("the test file has no answers: result/ holds the file for the evaluation server")
    return scores


def examples(dataset: Any, split: str, run: Run, count: int = 24) -> list[dict[str, Any]]:
    """Return images with questions and answers, for the report."""
    rows = []
    for i, row in enumerate(read_json(run.result("vqa_result"))[:count]):
        entry = dataset.annotation[i]
        truth = entry.get("answer", [])
        truth = [truth] if isinstance(truth, str) else truth
        tone = "" if not truth else "good" if row["answer"] in truth else "bad"
        lines = [("question", entry["question"], ""), ("answer", row["answer"], tone)]
        people = ", ".join(dict.fromkeys(truth))
        rows.append({"image": dataset.path(i), "lines": lines + ([("people", people, "")] if people else [])})
    return rows


def main(config: VQAConfig, run: Run) -> None:
    """Train unless asked to evaluate only, then report."""
    loaders = make_loaders("vqa", config, ("test",) if run.evaluate else ("train", "test"), run.seed)
    model = blip_vqa(**config.model_settings("drop_path_rate", "smooth_padding", "mask_padding"))
    task = Task(train_step, on_splits(loaders, partial(evaluate, config=config, run=run)))
    train_and_report(run, config, model, loaders, task, "Visual question answering", partial(examples, run=run))


if __name__ == "__main__":
    sys.exit(launch(main, VQAConfig, "configs/vqa.yaml", "output/vqa", __doc__, EXAMPLES))
