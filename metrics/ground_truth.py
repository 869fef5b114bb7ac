"""Reference captions of images, and which results they belong to."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import UserError, first_few, id_text, is_listed


@dataclass
class GroundTruth:
    """Reference captions of a COCO caption file."""

    path: Path
    references: dict[str, list[str]]  # of each image, by its id as text
    domains: dict[str, str]  # of images that have one (nocaps), by their ids
    num_empty: int = 0  # captions that are missing or empty, and left out
    num_without: int = 0  # images that have no caption


def read_ground_truth(gt_file: str | Path) -> GroundTruth:
    """Read a file in the COCO caption format.

    A row's caption may be a list of captions. Ids are compared as text, so 7, 7.0 and "7" are one image. UserError for
    no such file, another format, or a row without id or with a caption that is no text.
    """
    path = Path(gt_file)
    content = _parse(path)
    truth = GroundTruth(path, {}, {})
    listed: set[str] = set()
    for number, row in enumerate(content["annotations"]):
        key, captions = _read_row(row, path, number)
        listed.add(key)
        texts = [caption for caption in captions if caption and caption.strip()]
        truth.num_empty += len(captions) - len(texts)
        if texts:
            truth.references.setdefault(key, []).extend(texts)
    if not truth.references:
        raise UserError(f'{path}: every caption is empty; expected texts under "caption"')
    images = content.get("images")
    for image in images if isinstance(images, list) else []:
        if isinstance(image, dict) and "id" in image:
            key = _id_of(image["id"], path, "an image")
            listed.add(key)
            if image.get("domain") is not None:
                truth.domains[key] = str(image["domain"])
    truth.num_without = len(listed - truth.references.keys())
    return truth


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the ground truth {path}: {error.strerror}; give a COCO caption file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); expected a COCO caption file") from None
    rows = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(
            f"{path} is not in the COCO caption format: expected an object whose list "
            '"annotations" holds rows with "image_id" and "caption"'
        )
    return content


def _read_row(row: Any, path: Path, number: int) -> tuple[str, list[str | None]]:
    """Return the id and the captions of a row of "annotations"."""
    place = f"annotation {number} (the first is 0)"
    if not isinstance(row, dict) or not {"image_id", "caption"} <= row.keys():
        expected = 'expected "image_id" and "caption"'
        raise UserError(f"{path} is not in the COCO caption format: {place} is {row!r:.60}; {expected}")
    value = row["caption"]
    captions = (value or [None]) if isinstance(value, list) else [value]
    if not all(isinstance(caption, str | None) for caption in captions) or any(map(is_listed, captions)):
        raise UserError(f"{path}: {place} has the caption {value!r:.60}; expected a text, or a list of texts")
    return _id_of(row["image_id"], path, place), captions


def _id_of(value: Any, path: Path | str, place: str) -> str:
    try:
        return id_text(value)
    except UserError as error:
        raise UserError(f"{path}: {place}: {error}") from None


def predictions_for(results: list[dict], truth: GroundTruth) -> tuple[dict[str, str], dict[str, str]]:
    """Return the caption of every image of the ground truth, or raise UserError, and notes on other rows."""
    found: dict[str, str] = {}
    for number, row in enumerate(results):
        if not isinstance(row, dict) or not {"image_id", "caption"} <= row.keys():
            raise UserError(f'caption result {number} is {row!r:.60}; expected "image_id" and "caption"')
        if not isinstance(row["caption"], str):
            raise UserError(f"caption result {number} has the caption {row['caption']!r:.60}; expected a text")
        found.setdefault(_id_of(row["image_id"], "caption results", f"row {number}"), row["caption"])
    refuse_missing(truth, found)
    empty, without = truth.num_empty, truth.num_without
    repeated, foreign = len(results) - len(found), len(found.keys() - truth.references.keys())
    notes = {}
    if empty or without:
        notes["ground truth"] = f"{empty} empty captions and {without} images without captions are left out"
    if repeated or foreign:
        what = f"{foreign} captions of images without ground truth and {repeated} second captions of an image"
        notes["results"] = f"{what} are not scored"
    return found, notes


def refuse_missing(truth: GroundTruth, ids: Iterable[Any]) -> None:
    """Raise UserError if images of the ground truth are not among some ids, with their number and the first."""
    present = {id_text(value) for value in ids}
    missing = [key for key in truth.references if key not in present]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(truth.references)} images of {truth.path} have no caption in the results "
            f"(image_id {first_few(missing)}); caption every image, or give the ground truth that belongs to them"
        )
