"""VQA v2 and Visual Genome: questions about images, with human answers."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from data.annotations import (
    Row,
    as_list,
    check_images,
    check_rows,
    entry_error,
    find_image,
    number_problem,
    read_annotation,
    read_list,
)
from data.ids import check_question_ids
from data.text import is_blank, pre_question
from data.transforms import Transform
from utils import UserError, note, short_repr

VG_WEIGHT = 0.2  # of a Visual Genome answer, which one person gave


class Questions(Dataset):
    """Questions of JSON lists of {"image", "question", "question_id"}, with "dataset" "vqa" (default) or "vg".

    `roots` are the image folders of the datasets, `key` is a further key that every row must have.
    """

    def __init__(self, annotation_files: Sequence[str], roots: dict[str, str], transform: Transform, key: str):
        self.roots, self.transform, self.annotation = roots, transform, []
        for file in annotation_files:
            rows = [with_answer(with_image(row, roots)) for row in read_annotation(file, ("question",))]
            check_rows(rows, ("image", "question", key), file, optional=("answer",))
            for number, row in enumerate(rows):
                if row.setdefault("dataset", "vqa") not in list(roots):
                    problem = f"dataset is {short_repr(row['dataset'])}; expected {' or '.join(map(repr, roots))}"
                    raise entry_error(problem, file, number)
            for name, root in roots.items():
                check_images(root, (row["image"] for row in rows if row["dataset"] == name), file)
            self.annotation += rows

    def __len__(self) -> int:
        return len(self.annotation)

    def path(self, index: int) -> Path:
        """Return the path of a question's image."""
        row = self.annotation[index]
        return Path(self.roots[row["dataset"]]) / row["image"]

    def item(self, index: int) -> dict[str, Any]:
        """Return {"image", "question"}."""
        question = pre_question(self.annotation[index]["question"])
        return {"image": self.transform.read(self.path(index)), "question": question}


def with_image(row: Row, roots: dict[str, str]) -> Row:
    """Return a row with "image"; A-OKVQA publishes "image_id", the number of an image of COCO 2017, and "split"."""
    if "image" in row or not isinstance(row.get("split"), str) or type(row.get("image_id")) is not int:
        return row
    return {**row, "image": find_image(roots["vqa"], row["image_id"], [f"{row['split']}2017/"])}


def with_answer(row: Row) -> Row:
    """Return a row with its answers under "answer"; VQA v2 publishes them as "answers", A-OKVQA "direct_answers"."""
    key = next((key for key in ("answers", "direct_answers") if key in row), None)
    if "answer" in row or key is None:
        return row
    answers = as_list(row[key])
    return {**row, "answer": [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]}


class VQATrain(Questions):
    """Questions with weighted answers: {"image", "question", "answers", "weights"}."""

    def __init__(self, annotation_files: Sequence[str], roots: dict[str, str], transform: Transform):
        super().__init__(annotation_files, roots, transform, "answer")
        answers = [[text for text in as_list(row["answer"]) if not is_blank(text)] for row in self.annotation]
        if lost := sum(not kept for kept in answers):
            note(f"{', '.join(annotation_files)}: {lost} questions with empty answers only are left out")
        rows = zip(self.annotation, answers, strict=True)
        self.annotation = [{**row, "answer": kept} for row, kept in rows if kept]
        if not self.annotation:
            raise UserError(f"{', '.join(annotation_files)}: every answer is empty; expected texts under 'answer'")

    def __getitem__(self, index: int) -> dict[str, Any]:
        answers, weights = weigh(self.annotation[index])
        return {**self.item(index), "answers": answers, "weights": weights}


def weigh(row: Row) -> tuple[list[str], list[float]]:
    """Return the distinct answers of a row and their weights: their share, or 0.2 for Visual Genome's."""
    if row["dataset"] == "vg":
        return as_list(row["answer"])[:1], [VG_WEIGHT]
    counts = Counter(as_list(row["answer"]))
    return list(counts), [count / counts.total() for count in counts.values()]


class VQATest(Questions):
    """Questions to answer: {"image", "question", "question_id"}; `answer_list` are the candidates of `answer_file`."""

    def __init__(self, annotation_file: str, roots: dict[str, str], transform: Transform, answer_file: str = ""):
        super().__init__([annotation_file], roots, transform, "question_id")
        check_question_ids(self.annotation, annotation_file)
        for number, row in enumerate(self.annotation):
            if problem := _choice_problem(row):
                raise entry_error(problem, annotation_file, number)
        lost, total = sum("answer" not in row for row in self.annotation), len(self.annotation)
        if 0 < lost < total:
            note(f"annotation file {annotation_file}: {lost} of {total} questions have no answer to score")
        self.answer_list = read_answers(answer_file) if answer_file else []

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.item(index), "question_id": self.annotation[index]["question_id"]}


def _choice_problem(row: Row) -> str:
    """Return what is wrong with a question's choices, '' for nothing or if it has none."""
    choices = row.get("choices")
    if choices is None:
        return ""
    if not (isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices)):
        return f"'choices' is {short_repr(choices)}; expected a list of texts"
    return "" if row.get("correct_choice_idx") is None else number_problem(row, "correct_choice_idx", len(choices))


def read_answers(path: str) -> list[str]:
    """Read a JSON list of answers, each once."""
    answers = read_list(path)
    for number, answer in enumerate(answers):
        if not isinstance(answer, str):
            problem = f"{short_repr(answer)}; expected a text"
            raise UserError(f"answer list {path}, entry {number} (the first is 0): {problem}")
    found = list(dict.fromkeys(answer for answer in answers if not is_blank(answer)))
    if len(found) < len(answers):
        note(f"answer list {path}: {len(answers) - len(found)} empty or repeated answers are left out")
    if not found:
        raise UserError(f"answer list {path}: every answer is empty; expected a list of texts")
    return found


def vqa_collate_fn(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate items of `VQATrain`: "answer" and "weights" are flat, "n" is the number of answers of each question."""
    return {
        "image": torch.stack([item["image"] for item in batch]),
        "question": [item["question"] for item in batch],
        "answer": [answer for item in batch for answer in item["answers"]],
        "weights": torch.tensor([weight for item in batch for weight in item["weights"]]),
        "n": [len(item["answers"]) for item in batch],
    }
