"""Dialogues about images, in the format of VisDial v1.0 (Das et al., CVPR 2017)."""

import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data.annotations import (
    Row,
    check_images,
    check_rows,
    entry_error,
    find_image,
    number_problem,
    parse,
    read_annotation,
    read_text,
    short_repr,
)
from data.ids import check_dialogue_ids
from data.text import pre_caption, pre_question
from data.transforms import Transform
from utils import UserError, id_text

SEPARATOR = " [SEP] "  # BERT's token, between questions and answers
STEMS = {  # folder and name of a split's images up to their number, as published
    "train": ("train2014/COCO_train2014_", "val2014/COCO_val2014_"),
    "val": ("VisualDialog_val2018/VisualDialog_val2018_",),
    "test": ("VisualDialog_test2018/VisualDialog_test2018_",),
}
Key = tuple[str, int]  # text of the image's id, number of the round (the first is 1)


class Dialogues(Dataset):
    """Dialogues whose options are ranked: {"image", "caption", "index"}.

    Args:
        annotation_file: as `read_dialogues`; a dialogue without "image", a path, has a published image.
        image_root: folder of the images, or of VisDial's and COCO's folders.
        transform: RGB image -> tensor.
        dense_file: as `read_relevance`; '' for none.

    Attributes:
        annotation: the dialogues, each with "image".
        right: number of the right option, by image and round.
        relevance: of each option, by image and round.
    """

    def __init__(self, annotation_file: str, image_root: str, transform: Transform, dense_file: str = ""):
        content = read_dialogues(annotation_file)
        self.questions = [pre_question(text) for text in content["data"]["questions"]]
        self.answers: list[str] = content["data"]["answers"]
        self.annotation: list[Row] = content["data"]["dialogs"]
        self.image_root, self.transform = Path(image_root), transform
        for number, row in enumerate(self.annotation):
            if "image" not in row:
                stems = STEMS.get(str(content.get("split")), ())
                if not stems or type(row["image_id"]) is not int:
                    expected = "its path, or a number and a 'split' of the file as in VisDial"
                    raise entry_error(f"has no 'image'; expected {expected}", annotation_file, number)
                row["image"] = find_image(image_root, row["image_id"], stems)
        check_images(image_root, (row["image"] for row in self.annotation), annotation_file)
        owned = [(id_text(row["image_id"]), row["dialog"]) for row in self.annotation]
        rounds = {(owner, number): one for owner, dialog in owned for number, one in enumerate(dialog, 1)}
        self.right: dict[Key, int] = {key: one["gt_index"] for key, one in rounds.items() if "gt_index" in one}
        self.relevance = read_relevance(dense_file, rounds) if dense_file else {}

    def __len__(self) -> int:
        return len(self.annotation)

    def path(self, index: int) -> Path:
        """Return the path of a dialogue's image."""
        return self.image_root / self.annotation[index]["image"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        caption = pre_caption(self.annotation[index]["caption"])
        return {"image": self.transform.read(self.path(index)), "caption": caption, "index": index}

    def texts(self, index: int, turn: int, options: Iterable[int]) -> list[str]:
        """Return a dialogue up to the question of a round (the first is 0), with each of these answers."""
        rounds = self.annotation[index]["dialog"]
        said = [f"{self.questions[one['question']]}{SEPARATOR}{self.answers[one['answer']]}" for one in rounds[:turn]]
        asked = SEPARATOR.join([*said, self.questions[rounds[turn]["question"]]])
        return [f"{asked}{SEPARATOR}{self.answers[option]}" for option in options]


class DialogueTrain(Dialogues):
    """Dialogues with right and wrong answers: {"image", "caption", "dialogue": texts, "targets": int64 (texts,)}.

    Of every dialogue `num_rounds` are drawn, evenly spaced, so that texts in one place of a batch have similar lengths;
    each with the right answer (target 1) and `num_negatives` wrong ones (0). A short dialogue repeats its rounds.
    """

    def __init__(
        self, annotation_file: str, image_root: str, transform: Transform, num_rounds: int, num_negatives: int
    ):
        super().__init__(annotation_file, image_root, transform)
        self.num_rounds, self.num_negatives = num_rounds, num_negatives
        for number, row in enumerate(self.annotation):
            options = [len(one["answer_options"]) for one in row["dialog"] if "gt_index" in one]
            if not options or options[0] <= num_negatives:
                expected = f"'gt_index' in a round, and more options than num_negatives, {num_negatives}"
                raise entry_error(f"does not suffice for training; expected {expected}", annotation_file, number)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rounds, texts = self.annotation[index]["dialog"], []
        known = [turn for turn, one in enumerate(rounds) if "gt_index" in one]
        shift = random.randrange(len(known))
        for place in range(self.num_rounds):
            turn = known[(place * len(known) + shift) // self.num_rounds]
            options, right = rounds[turn]["answer_options"], rounds[turn]["gt_index"]
            wrong = random.sample([number for number in range(len(options)) if number != right], self.num_negatives)
            texts += self.texts(index, turn, options[[right, *wrong]])
        targets = torch.tensor([1, *[0] * self.num_negatives] * self.num_rounds)
        return super().__getitem__(index) | {"dialogue": texts, "targets": targets}


def read_dialogues(path: str) -> Row:
    """Read {"split", "data": {"questions", "answers": texts, "dialogs"}}.

    A dialogue is {"image_id", "caption", "dialog"}, and a round of it {"question", "answer": numbers of texts,
    "answer_options": numbers of answers, which are returned as an array, "gt_index": number of the right option}. The
    last round may lack "answer", any round "answer_options" and "gt_index".

    Raises:
        UserError: another format, a number of no text, a round with more or fewer options than those before, or two
            dialogues with one image_id.
    """
    content = parse(read_text(Path(path)), path)
    data = content.get("data") if isinstance(content, dict) else None
    tables = [data.get(key) for key in ("questions", "answers", "dialogs")] if isinstance(data, dict) else [None]
    if not all(isinstance(table, list) and table for table in tables):
        raise UserError(f"annotation file {path} lacks 'data' with the lists questions, answers and dialogs of VisDial")
    for table in tables[:2]:
        if wrong := [text for text in table if not isinstance(text, str)]:
            raise UserError(f"annotation file {path}: a question or answer is {short_repr(wrong[0])}; expected a text")
    check_rows(tables[2], ("image_id", "caption", "dialog"), path, optional=("image",))
    num_options: set[int] = set()
    for number, row in enumerate(tables[2]):
        rounds = row["dialog"]
        if not isinstance(row["caption"], str) or not isinstance(rounds, list) or not rounds:
            raise entry_error("has no text as 'caption', or no rounds as 'dialog'; correct it", path, number)
        for turn, one in enumerate(rounds, 1):
            if problem := _round_problem(one, data, num_options, turn == len(rounds)):
                raise entry_error(f"round {turn}: {problem}", path, number)
    check_dialogue_ids(tables[2], path)
    return content


def _round_problem(one: Any, data: Row, num_options: set[int], is_last: bool) -> str:
    """Return what is wrong with a round, '' for nothing; `num_options` are the numbers of options of earlier rounds."""
    needed = ("question",) if is_last else ("question", "answer")
    if not isinstance(one, dict) or any(key not in one for key in needed):
        return f"{short_repr(one)}; expected an object with {' and '.join(needed)}"
    answers, options = data["answers"], one.get("answer_options", [])
    problem = number_problem(one, "question", len(data["questions"])) or number_problem(one, "answer", len(answers))
    if problem or "answer_options" not in one and "gt_index" not in one:
        return problem
    if not isinstance(options, list) or not all(type(i) is int and 0 <= i < len(answers) for i in options):
        return f"'answer_options' is {short_repr(options)}; expected numbers of answers"
    num_options.add(len(options))
    if len(options) < 2 or len(num_options) > 1:
        return f"{len(options)} answer_options; expected two or more, and as many in every round"
    one["answer_options"] = np.array(options, dtype=np.int32)
    if problem := number_problem(one, "gt_index", len(options)):
        return problem
    said, meant = (answers[number] for number in (one.get("answer", options[0]), options[one.get("gt_index", 0)]))
    wrong = {"answer", "gt_index"} <= one.keys() and said != meant
    return f"'answer' is {short_repr(said)}, and the option 'gt_index' {short_repr(meant)}" if wrong else ""


def read_relevance(path: str, rounds: dict[Key, Row]) -> dict[Key, list[float]]:
    """Read dense annotations: [{"image_id", "round_id", "gt_relevance" or "relevance": a number per option}, ...].

    Raises:
        UserError: a round that has no options or comes twice, another number of values, or none above 0.
    """
    found: dict[Key, list[float]] = {}
    for number, row in enumerate(read_annotation(path, ("image_id", "round_id"))):
        key, values = (id_text(row["image_id"]), row["round_id"]), row.get("gt_relevance", row.get("relevance"))
        if type(key[1]) is not int or key in found or "answer_options" not in rounds.get(key, {}):
            problem = f"round {short_repr(key[1])} of image {short_repr(key[0])} has no options, or comes twice"
            raise entry_error(f"{problem}; correct it, or take it out", path, number)
        size = len(rounds[key]["answer_options"])
        numbers = isinstance(values, list) and all(isinstance(v, int | float) and 0 <= v < math.inf for v in values)
        if not numbers or len(values) != size or not any(values):
            problem = f"'gt_relevance' is {short_repr(values)}; expected {size} numbers from 0, not all 0"
            raise entry_error(problem, path, number)
        found[key] = values
    return found
