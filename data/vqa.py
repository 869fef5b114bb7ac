"""VQA v2 and Visual Genome: questions about images, with people's answers."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from data.annotations import as_list, check_images, read_annotation, read_list, shorten
from data.text import pre_question
from data.transforms import Transform
from utils import UserError

VG_WEIGHT = 0.2  # of a Visual Genome answer, which one person gave


class Questions(Dataset):
    """Questions of one or several files.

    Args:
        annotation_files: JSON lists of {"image", "question", "question_id"}, "dataset" being "vqa" or "vg".
        roots: folder of the images of each dataset.
        transform: RGB image -> tensor.
        keys: what every entry must have.
    """

    def __init__(
        self, annotation_files: Sequence[str], roots: dict[str, str], transform: Transform, keys: tuple[str, ...]
    ):
        self.roots, self.transform, self.annotation = roots, transform, []
        for file in annotation_files:
            rows = read_annotation(file, keys)
            for number, row in enumerate(rows):
                if row.setdefault("dataset", "vqa") not in list(roots):
                    raise UserError(
                        f"annotation file {file}, entry {number} (the first is 0): dataset is "
                        f"{shorten(row['dataset'])}; expected {' or '.join(map(repr, roots))}"
                    )
            for name, root in roots.items():
                check_images(root, (row["image"] for row in rows if row["dataset"] == name), file)
            self.annotation += rows

    def __len__(self) -> int:
        return len(self.annotation)

    def path(self, index: int) -> Path:
        """Return the path of a question's image."""
        entry = self.annotation[index]
        return Path(self.roots[entry["dataset"]]) / entry["image"]

    def item(self, index: int) -> dict[str, Any]:
        """Return {"image", "question"}."""
        question = pre_question(self.annotation[index]["question"])
        return {"image": self.transform.read(self.path(index)), "question": question}


class VQATrain(Questions):
    """Questions with weighted answers: {"image", "question", "answers", "weights"}."""

    def __init__(self, annotation_files: Sequence[str], roots: dict[str, str], transform: Transform):
        super().__init__(annotation_files, roots, transform, ("image", "question", "answer"))

    def __getitem__(self, index: int) -> dict[str, Any]:
        answers, weights = weigh(self.annotation[index])
        return {**self.item(index), "answers": answers, "weights": weights}


def weigh(entry: dict[str, Any]) -> tuple[list[str], list[float]]:
    """Return the distinct answers of an entry and their weights: their share, or 0.2 for Visual Genome's."""
    if entry["dataset"] == "vg":
        return as_list(entry["answer"])[:1], [VG_WEIGHT]
    counts = Counter(as_list(entry["answer"]))
    return list(counts), [count / counts.total() for count in counts.values()]


class VQATest(Questions):
    """Questions to answer: {"image", "question", "question_id"}.

    Attributes:
        answer_list: candidate answers for ranking; empty without a file.
    """

    def __init__(self, annotation_file: str, roots: dict[str, str], transform: Transform, answer_file: str = ""):
        super().__init__([annotation_file], roots, transform, ("image", "question", "question_id"))
        self.answer_list = read_answers(answer_file) if answer_file else []

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.item(index), "question_id": self.annotation[index]["question_id"]}


def read_answers(path: str) -> list[str]:
    """Read a JSON list of answers."""
    answers = read_list(path)
    for number, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise UserError(f"answer list {path}, entry {number} (the first is 0): {shorten(answer)}; expected a text")
    return answers


def vqa_collate_fn(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join items of `VQATrain`: "answer" and "weights" flat, "n" how many of them each question has."""
    return {
        "image": torch.stack([item["image"] for item in batch]),
        "question": [item["question"] for item in batch],
        "answer": [answer for item in batch for answer in item["answers"]],
        "weights": torch.tensor([weight for item in batch for weight in item["weights"]]),
        "n": [len(item["answers"]) for item in batch],
    }
