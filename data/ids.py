"""Identifiers of images and questions: one text for equal ids, and an error for ids that collide."""

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.annotations import Row, place, short_repr
from utils import UserError, id_text

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
    """Check that every image has one id, and every id belongs to one image.

    Raises:
        UserError: the message names the two rows that collide.
    """
    keys = [_text_of(value, path, number, "image_id") for number, value in enumerate(ids)]
    images = [image_key(row) for row in rows]
    _refuse_shared(keys, images, path, "image_id", "image")
    first: dict[str, int] = {}
    for number, (image, key) in enumerate(zip(images, keys, strict=True)):
        other = first.setdefault(image, number)
        if keys[other] != key:
            raise UserError(
                f"{place(path, other, number)}: the ids {keys[other]} and {key} belong to one image, {image}; "
                "give an image the same 'image_id' in all entries, or no entry an id"
            )


def check_question_ids(rows: Sequence[Row], path: str | Path) -> None:
    """Check that no two questions share a "question_id"; a row may be repeated.

    Raises:
        UserError: the message names the two rows that collide.
    """
    keys = [_text_of(row["question_id"], path, number, "question_id") for number, row in enumerate(rows)]
    questions = [f"{row['question']} ({image_key(row)})" for row in rows]
    _refuse_shared(keys, questions, path, "question_id", "question")


def number_images(rows: Sequence[Row], path: str | Path) -> list[int]:
    """Return a number for each row, equal for rows of the same image.

    Raises:
        UserError: an "image_id" belongs to two images, or an image has two, or it is no id.
    """
    if any("image_id" in row for row in rows):
        check_image_ids(rows, [row.get("image_id", image_key(row)) for row in rows], path)
    numbers: dict[str, int] = {}
    return [numbers.setdefault(image_key(row), len(numbers)) for row in rows]


def _text_of(value: Any, path: str | Path, number: int, name: str) -> str:
    try:
        return id_text(value)
    except UserError:
        problem = f"{name!r} is {short_repr(value)}; expected a whole number or a text"
        raise UserError(f"{place(path, number)}: {problem}") from None


def _refuse_shared(keys: Sequence[str], owners: Sequence[str], path: str | Path, name: str, what: str) -> None:
    first: dict[str, int] = {}
    for number, (key, owner) in enumerate(zip(keys, owners, strict=True)):
        other = first.setdefault(key, number)
        if owners[other] != owner:
            raise UserError(
                f"{place(path, other, number)}: the id {key} belongs to two {what}s, {owners[other][:80]} and "
                f"{owner[:80]}; give every {what} a {name!r} of its own"
            )
