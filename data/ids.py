"""Identifiers of images and questions: one text for equal ids, and an error for ids that collide."""

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.annotations import Row, entry_error
from utils import UserError, id_text, short_repr

COCO_NAME = re.compile(r"COCO_\w+_(\d+)|(\d{12})")  # of 2014 and of 2017, without .jpg
ID_KEYS = ("image_id", "img_id", "id")


def image_key(row: Row) -> str:
    """Return an image's path in one spelling, so that a/b.jpg and a/./b.jpg are the same image."""
    return posixpath.normpath(row["image"])


def image_id(row: Row) -> int | str:
    """Return a row's id: its own, otherwise the number of a COCO file name, otherwise the file name without ending.

    Only COCO's numbers lose their leading zeros; 7.jpg is 7, 007.jpg is "007".
    """
    for key in ID_KEYS:
        if key in row:
            return row[key]
    stem = Path(row["image"]).stem
    number = COCO_NAME.fullmatch(stem)
    digits = (number[1] or number[2]) if number else stem
    return int(digits) if number or re.fullmatch(r"0|[1-9][0-9]{0,17}", stem) else stem


def check_image_ids(rows: Sequence[Row], ids: Sequence[Any], path: str | Path) -> None:
    """Check that every image has one id, and every id one image; UserError names the two rows that collide."""
    keys, images = _texts(ids, path, "image_id"), [image_key(row) for row in rows]
    remedy = "give every image a 'image_id' of its own"
    _refuse_second(keys, images, path, "the id {} belongs to two images, {} and {}; " + remedy)
    remedy = "give an image the same 'image_id' in all entries, or no entry an id"
    _refuse_second(images, keys, path, "the ids {1} and {2} belong to one image, {0}; " + remedy)


def check_question_ids(rows: Sequence[Row], path: str | Path) -> None:
    """Check that no two questions share a "question_id"; a row may be repeated. UserError names the two."""
    questions = [f"{row['question']} ({image_key(row)})" for row in rows]
    keys = _texts([row["question_id"] for row in rows], path, "question_id")
    remedy = "give every question a 'question_id' of its own"
    _refuse_second(keys, questions, path, "the id {} belongs to two questions, {} and {}; " + remedy)


def check_dialogue_ids(rows: Sequence[Row], path: str | Path) -> None:
    """Check that no two dialogues share an "image_id"; UserError names the two."""
    keys, numbers = _texts([row["image_id"] for row in rows], path, "image_id"), [str(n) for n in range(len(rows))]
    remedy = "take one out, or give it an 'image_id' of its own"
    _refuse_second(keys, numbers, path, "the id {} belongs to two dialogues; " + remedy)


def number_images(rows: Sequence[Row], path: str | Path) -> list[int]:
    """Return a number for each row, equal for rows of one image; UserError for ids that do not fit the images."""
    if any("image_id" in row for row in rows):
        check_image_ids(rows, [row.get("image_id", image_key(row)) for row in rows], path)
    numbers: dict[str, int] = {}
    return [numbers.setdefault(image_key(row), len(numbers)) for row in rows]


def _texts(ids: Sequence[Any], path: str | Path, name: str) -> list[str]:
    texts = []
    for number, value in enumerate(ids):
        try:
            texts.append(id_text(value))
        except UserError:
            problem = f"{name!r} is {short_repr(value)}; expected a whole number or a text"
            raise entry_error(problem, path, number) from None
    return texts


def _refuse_second(keys: Sequence[str], values: Sequence[str], path: str | Path, problem: str) -> None:
    """Refuse a key with two values; the text `problem` has places for the key and for both."""
    first: dict[str, int] = {}
    for number, (key, value) in enumerate(zip(keys, values, strict=True)):
        other = first.setdefault(key, number)
        if values[other] != value:
            raise entry_error(problem.format(key, values[other][:80], value[:80]), path, other, number)
