"""Annotation files as their publishers release them: recognized, and converted to this project's rows."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from utils import UserError

Row = dict[str, Any]
Tables = dict[str, Any]  # name of an output file without .json -> its content
TOKEN_LINE = re.compile(r"([^\s#]+)#\d+\t(.*)")
KARPATHY = "a Karpathy split (dataset_coco.json, dataset_flickr30k.json)"
COCO = "a COCO or nocaps file of images (captions_*.json, *_image_info.json)"
VQA_QUESTIONS = "VQA v2's question file"
VQA_ANNOTATIONS = "VQA v2's annotation file"
NLVR2 = "NLVR2's JSON lines"
FLICKR = "Flickr30k's token file"
KEYS = {  # the list that a file holds, and keys of its rows
    KARPATHY: ("images", "sentences", "split"),
    COCO: ("images", "id", "file_name"),
    VQA_QUESTIONS: ("questions", "question_id", "question"),
    VQA_ANNOTATIONS: ("annotations", "question_id", "answers"),
}


def recognize(content: Any) -> str:
    """Return the publisher's format of a parsed JSON file, of JSON lines' rows, or of another file's text; or ''."""
    if isinstance(content, str):
        return FLICKR if TOKEN_LINE.match(content) else ""
    if isinstance(content, list):
        rows = [row for row in content[:1] if isinstance(row, dict)]
        return NLVR2 if rows and {"identifier", "sentence"} <= rows[0].keys() and "images" not in rows[0] else ""
    for name, (table, *keys) in KEYS.items():
        rows = content.get(table) if isinstance(content, dict) else None
        if isinstance(rows, list) and rows and isinstance(rows[0], dict) and rows[0].keys() >= {*keys}:
            return name
    return ""


def convert(contents: list[Any], prefix: str | None = None) -> tuple[str, Tables]:
    """Convert a publisher's file, or VQA v2's questions with their annotations, to rows that the datasets read.

    `prefix` is put before every image's name, instead of the publisher's own folder; of VQA v2, which has numbers of
    images alone, it may be their names, with a place for the number: "images/{:07d}.jpg".

    Returns:
        The name of the format, and the tables; a table named "" takes the name of the input.

    Raises:
        UserError: another format, files that do not belong together, a row that lacks something, or a wrong `prefix`.
    """
    _check_names(prefix or "")
    found = {recognize(content): content for content in contents}
    names = sorted(found)
    try:
        if names == [VQA_ANNOTATIONS, VQA_QUESTIONS] and len(contents) == 2:
            return VQA_QUESTIONS, {"": vqa_rows(found[VQA_QUESTIONS], found[VQA_ANNOTATIONS], prefix)}
        if len(contents) == 1 and names[0] in CONVERTERS:
            return names[0], CONVERTERS[names[0]](contents[0], prefix)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"{names[0]} has a row that is not as published ({error!r}); download it again") from None
    known = ", ".join([*CONVERTERS, VQA_QUESTIONS + " with " + VQA_ANNOTATIONS])
    got = " and ".join(sorted(recognize(content) or "an unknown format" for content in contents))
    raise UserError(f"cannot convert {got}; expected one of: {known}")


def _check_names(prefix: str) -> None:
    """Raise UserError if a prefix with a place for a number does not take one."""
    try:
        prefix.format(0)
    except (ValueError, LookupError):
        problem = f"the images' prefix is {prefix!r}; expected a folder, or of VQA v2 names such as images/{{:07d}}.jpg"
        raise UserError(problem) from None


def _join(folder: str, prefix: str | None, name: str) -> str:
    return "/".join(part.strip("/") for part in (folder if prefix is None else prefix, name) if part.strip("/"))


def karpathy_tables(content: Any, prefix: str | None) -> Tables:
    """Return train (with restval), val and test rows, and the ground truth of val and test."""
    coco = content.get("dataset", "coco") == "coco"
    name = "coco_karpathy" if coco else content["dataset"]
    tables: Tables = {}
    for image in content["images"]:
        split = {"restval": "train"}.get(image["split"], image["split"])
        path = _join(image.get("filepath", "" if coco else f"{name}-images"), prefix, image["filename"])
        number = image.get("cocoid", image.get("imgid"))
        captions = [sentence["raw"].strip() for sentence in image["sentences"]]
        row = {"image": path, "caption": captions, "image_id": number}
        tables.setdefault(f"{name}_{split}", []).append(row)
    truth = {
        f"{key}_gt": ground_truth([row["image_id"] for row in rows], [row["caption"] for row in rows])
        for key, rows in tables.items()
        if not key.endswith("_train")
    }
    return tables | truth


def ground_truth(ids: Sequence[Any], captions: Sequence[Sequence[str]], domains: Sequence[str] = ()) -> dict[str, Any]:
    """Return the captions of images, which may have domains, in COCO's ground-truth format."""
    images = [{"id": i, **({"domain": domains[n]} if domains else {})} for n, i in enumerate(ids)]
    rows = [(i, caption) for i, listed in zip(ids, captions, strict=True) for caption in listed]
    return {"images": images, "annotations": [{"id": n, "image_id": i, "caption": c} for n, (i, c) in enumerate(rows)]}


def coco_tables(content: Any, prefix: str | None) -> Tables:
    """Return a row per image, with its captions where the file has them."""
    captions: dict[Any, list[str]] = {}
    for annotation in content.get("annotations", []):
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
    rows = []
    for image in content["images"]:
        folder = image.get("coco_url", "").rpartition("/")[0].rpartition("/")[2] if "domain" not in image else ""
        row = {"image": _join(folder, prefix, image["file_name"]), "image_id": image["id"]}
        if image["id"] in captions or not captions:
            rows.append(row | ({"caption": captions[image["id"]]} if captions else {}))
    return {"": rows}


def vqa_rows(questions: Any, annotations: Any, prefix: str | None) -> list[Row]:
    """Return a row per question, with ten answers where there are annotations."""
    subtype = questions.get("data_subtype", "")
    folder = subtype.replace("-dev", "")
    answers = {row["question_id"]: row for row in annotations["annotations"]} if annotations else {}
    rows = []
    for question in questions["questions"]:
        number = question["image_id"]
        names = prefix if prefix and "{" in prefix else _join(folder, prefix, f"COCO_{folder}_{{:012d}}.jpg")
        row = {"dataset": "vqa", "image": names.format(number)}
        row |= {key: question[key] for key in ("question", "question_id")}
        if annotations:
            found = answers[question["question_id"]]
            row["answer"] = [answer["answer"] for answer in found["answers"]]
            row |= {key: found[key] for key in ("answer_type", "question_type") if key in found}
        rows.append(row)
    return rows


def nlvr_tables(content: Any, prefix: str | None) -> Tables:
    """Return a row per statement; images are named as in NLVR2's archives of images."""
    rows = []
    for statement in content:
        stem = statement["identifier"].rpartition("-")[0]
        split = stem.partition("-")[0]
        folder = "/".join(map(str, ("images", split, *([statement["directory"]] if "directory" in statement else []))))
        images = [_join(folder, prefix, f"{stem}-img{side}.png") for side in (0, 1)]
        rows.append({"images": images, "sentence": statement["sentence"], "label": str(statement["label"])})
    return {"": rows}


def flickr_tables(content: str, prefix: str | None) -> Tables:
    """Return a row per image with its captions."""
    captions: dict[str, list[str]] = {}
    for line in filter(None, content.split("\n")):
        match = TOKEN_LINE.match(line)
        if not match:
            raise ValueError(line[:80])
        captions.setdefault(match[1], []).append(match[2].strip())
    return {"": [{"image": _join("flickr30k-images", prefix, name), "caption": c} for name, c in captions.items()]}


CONVERTERS: dict[str, Callable[[Any, str | None], Tables]] = {
    KARPATHY: karpathy_tables,
    COCO: coco_tables,
    VQA_QUESTIONS: lambda content, prefix: {"": vqa_rows(content, None, prefix)},
    NLVR2: nlvr_tables,
    FLICKR: flickr_tables,
}
