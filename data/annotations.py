"""Annotation files: located or downloaded, parsed, and every row checked before a run begins."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data.publishers import recognize
from data.text import is_blank
from download import fetch
from utils import UserError, first_few, is_listed, note, short_repr

BASE_URL = "https://storage.googleapis.com/sfr-vision-language-research/datasets/"
REMEDY = "correct it, link the file into the folder, or set the folder to '' to allow any path"
ONE_TEXT = ("image", "question", "sentence", "clip_name")
Row = dict[str, Any]


def find_annotation(root: str | Path, name: str, own: str | Path = "") -> str:
    """Return the path of an annotation file; any process may call it, alone or with others.

    It is the released file `name` in the folder `root`, downloaded if it does not exist; or `own`, the user's file,
    relative to the working directory or to `root`. UserError if there is none.
    """
    if own:
        for path in (Path(own), Path(root) / own):
            if path.is_file():
                return str(path)
        raise UserError(f"annotation file {own} does not exist, neither here nor in {root}; correct its path")
    path = Path(root) / name
    try:
        return str(fetch(BASE_URL + name, path, check=_no_json))
    except UserError as error:
        raise UserError(f"annotation file {path} is absent: {error}, or name your own in the config") from None


def _no_json(path: Path) -> str:
    """Return what is wrong with a downloaded file that cannot be JSON, otherwise ''."""
    with open(path, "rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    return "" if start[:1] in (b"[", b"{") else f"begins with {start[:20]!r}, so it is no JSON"


def read_annotation(path: str | Path, keys: Sequence[str]) -> list[Row]:
    """Read a JSON list, or JSON lines (.jsonl), of objects; errors as `read_list` and `check_rows`."""
    rows = read_list(path)
    check_rows(rows, keys, path)
    return rows


def read_list(path: str | Path) -> list[Any]:
    """Read a JSON list, or JSON lines (.jsonl), of any values; UserError for other files, also a publisher's own."""
    path = Path(path)
    rows: Any = read_text(path)
    if not recognize(rows):
        rows = _parse_lines(rows, path) if path.suffix == ".jsonl" else parse(rows, path)
    if name := recognize(rows):
        raise UserError(f"annotation file {path} is {name}; convert it with python -m data.convert {path}")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"annotation file {path} holds no list of entries; expected [entry, ...]")
    return rows


def read_text(path: Path) -> str:
    """Return the text of an annotation file, without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"annotation file {path}: {error.strerror}; correct its path") from None
    except UnicodeDecodeError:
        raise UserError(f"annotation file {path} is not text in UTF-8; expected JSON") from None


def _parse_lines(text: str, path: Path) -> list[Any]:
    # only line feeds separate lines: a JSON string may contain other line separators
    return [parse(line, path, number) for number, line in enumerate(text.split("\n")) if line.strip()]


def parse(text: str, path: str | Path, lines_before: int = 0) -> Any:
    """Return the value of JSON text; a UserError names the file and the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = lines_before + error.lineno
        raise UserError(f"annotation file {path} is not JSON: line {line}: {error.msg}; correct it") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise UserError(f"annotation file {path} cannot be read ({error}); correct it") from None


def check_rows(rows: Sequence[Any], keys: Sequence[str], path: str | Path, optional: Sequence[str] = ()) -> None:
    """Raise UserError for a row that is no object with the given keys, or has no texts where texts belong."""
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            problem = f"is {short_repr(row)}; expected an object with {', '.join(map(repr, keys))}"
            raise entry_error(problem, path, number)
        if missing := [key for key in keys if key not in row]:
            raise entry_error(f"lacks {', '.join(map(repr, missing))}; add it", path, number)
        for key in (*keys, *(key for key in optional if key in row)):
            if expected := _expected(key, row[key]):
                raise entry_error(f"{key!r} is {short_repr(row[key])}; expected {expected}", path, number)


def entry_error(problem: str, path: str | Path, *numbers: int) -> UserError:
    """Return the error for entries of an annotation file."""
    entries = "entry" if len(numbers) == 1 else "entries"
    return UserError(f"annotation file {path}, {entries} {' and '.join(map(str, numbers))} (the first is 0): {problem}")


def _expected(key: str, value: Any) -> str:
    """Return what was expected in place of a wrong value, '' for a right one."""
    if key in ONE_TEXT:
        return "" if isinstance(value, str) else "a text"
    # a caption may be missing, and is then left out; a question needs an answer
    missing = type(None) if key == "caption" else str
    right = (value or key == "caption") and all(isinstance(text, str | missing) for text in as_list(value))
    right = right and not any(map(is_listed, as_list(value)))
    return "" if right or key not in ("caption", "answer") else "a text, or a list of texts"


def number_problem(row: Row, key: str, total: int) -> str:
    """Return what is wrong with the number of one of `total` things; '' for nothing, or if the row has none."""
    right = key not in row or (type(row[key]) is int and 0 <= row[key] < total)
    return "" if right else f"{key!r} is {short_repr(row[key])}; expected 0 to {total - 1}"


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, and a single caption or answer as a list of one."""
    return value if isinstance(value, list) else [value]


def keep_captions(rows: Sequence[Row], path: str | Path) -> list[Row]:
    """Return checked rows with "caption" a list of texts, without empty ones; UserError if none is left."""
    texts = [as_list(row["caption"]) or [None] for row in rows]
    kept = [[text for text in captions if not is_blank(text)] for captions in texts]
    if not any(kept):
        raise UserError(f"annotation file {path}: every caption is empty; expected texts under 'caption'")
    if lost := sum(map(len, texts)) - sum(map(len, kept)):
        without = sum(not captions for captions in kept)
        note(f"annotation file {path}: {lost} empty captions are left out, and {without} entries without any other")
    return [{**row, "caption": captions} for row, captions in zip(rows, kept, strict=True) if captions]


def check_images(root: str | Path, names: Iterable[str], annotation: str | Path) -> None:
    """Raise UserError if images, or other files, do not exist or are outside the root: their number, the first names.

    Each folder is listed once, which is fast for many files.
    """
    names = set(names)
    if outside := sorted(name for name in names if leaves(root, name)):
        problem = f"{len(outside)} of {len(names)} paths leave the folder {root}: {first_few(outside)}"
        raise UserError(f"annotation file {annotation}: {problem}; {REMEDY}")
    folders: dict[str, set[str]] = {}
    for name in names:
        folder, file = os.path.split(os.path.join(root, name))
        folders.setdefault(folder, set()).add(file)
    if missing := sorted(os.path.join(folder, file) for folder in folders for file in folders[folder] - _names(folder)):
        total = sum(map(len, folders.values()))
        raise UserError(
            f"annotation file {annotation}: {len(missing)} of {total} files do not exist: {first_few(missing)}; "
            "correct the root folder in the config, or take their entries out"
        )


def find_image(root: str | Path, number: int, stems: Sequence[str]) -> str:
    """Return the path below `root` of an image that its publisher names by a stem and twelve digits.

    The first of `stems`, such as "train2014/COCO_train2014_", that exists counts, with its folder or without; if none
    does, the first.
    """
    names = [f"{stem}{number:012d}.jpg" for stem in stems]
    both = [name for path in names for name in (path, os.path.basename(path))]
    return next((name for name in both if os.path.isfile(os.path.join(root, name))), both[0])


def leaves(root: str | Path, name: str) -> bool:
    """Return True if a path in an annotation file is outside the folder it is relative to: by .., or absolute.

    No path is outside the folder ''. Links within a folder are followed: only the owner of the folder can make them.
    """
    if not str(root) or not (".." in name or os.path.isabs(name)):
        return False
    path, folder = Path(os.path.abspath(os.path.join(root, name))), os.path.abspath(root)
    return ".." in Path(name).parts or not path.is_relative_to(folder)


def inside(root: str | Path, name: str) -> Path:
    """Return the path of an image in a list of pairs; UserError if it is outside the folder, as in `leaves`."""
    if leaves(root, name):
        raise UserError(f"image {name} leaves the folder {root}; {REMEDY}")
    return Path(root, name)


def _names(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder or os.curdir))
    except (OSError, ValueError):  # no such folder, or an impossible name
        return set()
