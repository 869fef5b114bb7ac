"""Annotation files: found or downloaded, read, and checked entry by entry before a run begins."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from download import fetch
from utils import UserError, on_main_process

BASE_URL = "https://storage.googleapis.com/sfr-vision-language-research/datasets/"
FIRST_FEW = 3


def find_annotation(root: str | Path, name: str, own: str | Path = "") -> str:
    """Return the path of an annotation file; all processes call it.

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
    if not path.is_file():
        on_main_process(lambda: _download(name, path))
    return str(path)


def _download(name: str, path: Path) -> None:
    if path.is_file():
        return
    try:
        fetch(BASE_URL + name, path)
    except UserError as error:
        raise UserError(
            f"annotation file {path} is absent and could not be downloaded ({error}); put it there, get it from "
            f"{BASE_URL}{name}, or set the config's path to your own"
        ) from None


def read_annotation(path: str | Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Read a JSON list, or JSON lines (.jsonl), of objects that have the given keys.

    Raises:
        UserError: not there, not JSON, not a list of objects, empty, or an entry lacks a key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines() if line] if path.suffix == ".jsonl" else json.loads(text)
    except OSError as error:
        raise UserError(f"annotation file {path}: {error.strerror}; correct its path") from None
    except UnicodeDecodeError:
        raise UserError(f"annotation file {path} is not text in UTF-8; expected JSON") from None
    except json.JSONDecodeError as error:
        raise UserError(f"annotation file {path} is not JSON: line {error.lineno}: {error.msg}; correct it") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"annotation file {path} holds no list of entries; expected [{{{', '.join(keys)}}}, ...]")
    for number, row in enumerate(rows):
        missing = [key for key in keys if key not in row] if isinstance(row, dict) else keys
        if missing:
            raise UserError(f"annotation file {path}, entry {number}: lacks {', '.join(map(repr, missing))}; add it")
    return rows


def check_images(paths: Iterable[Path], annotation: str | Path) -> None:
    """Check that pictures exist.

    Raises:
        UserError: some do not; says how many and names the first few.
    """
    by_folder: dict[Path, set[str]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, set()).add(path.name)
    missing = sorted(
        str(folder / name) for folder, names in by_folder.items() for name in names - _names(folder)
    )
    if missing:
        first = ", ".join(missing[:FIRST_FEW]) + (", ..." if len(missing) > FIRST_FEW else "")
        total = sum(map(len, by_folder.values()))
        raise UserError(f"{annotation}: {len(missing)} of {total} images do not exist: {first}; correct image_root")


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except OSError:
        return set()


def as_list(value: Any) -> list[str]:
    """Return a caption or a list of captions as a list."""
    return [value] if isinstance(value, str) else list(value)
