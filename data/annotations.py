"""Annotation files: found or downloaded, read, and checked entry by entry before a run begins."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from download import fetch
from utils import UserError

BASE_URL = "https://storage.googleapis.com/sfr-vision-language-research/datasets/"
FIRST_FEW = 3
REMEDY = "correct it, link what it means into the folder, or set the folder to '' to allow any path"
ONE_TEXT = ("image", "question", "sentence", "clip_name")
TEXTS = ("caption", "answer")


def find_annotation(root: str | Path, name: str, own: str | Path = "") -> str:
    """Return the path of an annotation file; any process may call it, alone or with others.

    Args:
        root: folder of the annotation files.
        name: released name of the file, which is downloaded into `root` if absent.
        own: path of an own file instead, from here or from `root`.

    Raises:
        UserError: the own file does not exist, or the released one cannot be downloaded.
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
    """Say what a downloaded file is, if it is no annotation file; '' if it may be one."""
    with open(path, "rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    return "" if start[:1] in (b"[", b"{") else f"begins with {start[:20]!r}, so it is no JSON"


def read_annotation(path: str | Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Read a JSON list, or JSON lines (.jsonl), of objects that have the given keys.

    Raises:
        UserError: not there, not JSON, not a list of objects, empty, or an entry lacks a key or has no text there.
    """
    rows = read_list(path)
    for number, row in enumerate(rows):
        if problem := _problem(row, keys):
            raise UserError(f"annotation file {path}, entry {number} (the first is 0): {problem}")
    return rows


def read_list(path: str | Path) -> list[Any]:
    """Read a JSON list, or JSON lines (.jsonl), of anything.

    Raises:
        UserError: not there, not JSON, not a list, or empty.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"annotation file {path}: {error.strerror}; correct its path") from None
    except UnicodeDecodeError:
        raise UserError(f"annotation file {path} is not text in UTF-8; expected JSON") from None
    rows = _parse_lines(text, path) if path.suffix == ".jsonl" else _parse(text, path)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"annotation file {path} holds no list of entries; expected [entry, ...]")
    return rows


def _parse_lines(text: str, path: Path) -> list[Any]:
    # split at line feeds only: a JSON text may hold other separators of lines
    return [_parse(line, path, number) for number, line in enumerate(text.split("\n")) if line.strip()]


def _parse(text: str, path: Path, lines_before: int = 0) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = lines_before + error.lineno
        raise UserError(f"annotation file {path} is not JSON: line {line}: {error.msg}; correct it") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise UserError(f"annotation file {path} cannot be read ({error}); correct it") from None


def _problem(entry: Any, keys: Sequence[str]) -> str:
    """Say what is wrong with an entry; '' if nothing is."""
    if not isinstance(entry, dict):
        return f"is {shorten(entry)}; expected an object with {', '.join(map(repr, keys))}"
    if missing := [key for key in keys if key not in entry]:
        return f"lacks {', '.join(map(repr, missing))}; add it"
    for key in keys:
        value = entry[key]
        if key in ONE_TEXT and not isinstance(value, str):
            return f"{key!r} is {shorten(value)}; expected a text"
        if key in TEXTS and not (value and all(isinstance(text, str) for text in as_list(value))):
            return f"{key!r} is {shorten(value)}; expected a text, or a list of texts"
    return ""


def shorten(value: Any) -> str:
    """Write a value of an annotation in the few characters that an error message has for it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_images(root: str | Path, names: Iterable[str], annotation: str | Path) -> None:
    """Check that images, or other files, exist; each folder is listed once, which is fast for many files.

    Args:
        root: what the names start from.
        names: paths of the files; each may occur often.
        annotation: file that lists them, for the message.

    Raises:
        UserError: some do not, or leave the root; says how many and names the first few.
    """
    names = set(names)
    if outside := sorted(name for name in names if leaves(root, name)):
        problem = f"{len(outside)} of {len(names)} paths leave the folder {root}: {_first(outside)}"
        raise UserError(f"annotation file {annotation}: {problem}; {REMEDY}")
    folders: dict[str, set[str]] = {}
    for name in names:
        folder, file = os.path.split(os.path.join(root, name))
        folders.setdefault(folder, set()).add(file)
    missing = sorted(os.path.join(folder, file) for folder, files in folders.items() for file in files - _names(folder))
    if missing:
        total = sum(map(len, folders.values()))
        raise UserError(
            f"annotation file {annotation}: {len(missing)} of {total} files do not exist: {_first(missing)}; "
            "correct the root folder in the config, or take their entries out"
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(name[:100] for name in names[:FIRST_FEW]) + (", ..." if len(names) > FIRST_FEW else "")


def leaves(root: str | Path, name: str) -> bool:
    """Tell whether a path of an annotation file leaves the folder that it starts from: by .., or as an absolute path.

    The folder '' has no outside. Links within a folder are followed, wherever they lead: only its owner makes them.
    """
    if not str(root) or not (".." in name or os.path.isabs(name)):
        return False
    path, folder = Path(os.path.abspath(os.path.join(root, name))), os.path.abspath(root)
    return ".." in Path(name).parts or not path.is_relative_to(folder)


def inside(root: str | Path, name: str) -> Path:
    """Return the path of an image that a list of pairs names.

    Raises:
        UserError: it leaves the folder, as `leaves`.
    """
    if leaves(root, name):
        raise UserError(f"image {name} leaves the folder {root}; {REMEDY}")
    return Path(root, name)


def _names(folder: str) -> set[str]:
    try:
        with os.scandir(folder or os.curdir) as entries:
            return {entry.name for entry in entries}
    except (OSError, ValueError):  # no such folder, or a name that no folder can have
        return set()


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, and a single caption or answer as a list of one."""
    return value if isinstance(value, list) else [value]
