"""The images of a command line, given as files, folders, lists and URLs, and the texts, given as lists."""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from PIL import Image

from data.annotations import read_list
from data.images import is_url
from utils import UserError, note

LISTS = (".txt", ".json", ".jsonl")
STDIN = "-"
EXPECTED = "give images, folders of images, URLs, lists (.txt, .json, .jsonl), or - for a list on standard input"
# Files and folders that other systems leave in a folder of images.
SYSTEM_NAMES = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini", "@eaDir")
# Formats that Pillow knows but cannot decode, or only with other programs.
NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")


@cache
def image_endings() -> frozenset[str]:
    """Return the endings of files that Pillow reads here; HEIC and JPEG XL where their plugins are installed."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401  # registers itself
    Image.init()
    return frozenset(
        ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - {*NOT_DECODED}
    )


def find_images(names: Iterable[str | Path], recursive: bool = True) -> list[Path | str]:
    """Return the images that files, folders, lists and URLs name, in order, each once; URLs as texts.

    A note on standard error counts what was left out: other files of folders, by ending, and linked folders.

    Args:
        names: an image; a folder; a URL; a list: .txt with a path a line, .json or .jsonl with paths or
            {"image": path}, relative paths starting from its own folder; or "-" for paths on standard input, a line
            each. Among other names, as when a shell expands "folder/*", text files without image names are left out.
        recursive: search folders with their subfolders; linked folders are never searched.

    Raises:
        UserError: something does not exist, or there is no image at all.
    """
    names, found, skipped = list(names), {}, Counter()
    for name in names:
        if str(name) == STDIN:
            found |= dict.fromkeys(_to_images(line.strip() for line in sys.stdin))
        elif is_url(str(name)):
            found[str(name)] = None
        else:
            found |= dict.fromkeys(_expand(Path(name), recursive, len(names) > 1, skipped))
    if skipped:
        counts = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())
        note(f"left out: {counts}")
    if not found:
        raise UserError(f"no image in {', '.join(map(str, names))}; {EXPECTED}")
    return list(found)


def read_prompts(names: Iterable[str | Path]) -> dict[str, str]:
    """Return the "prompt" that JSON lists among these names give images, by name; raises UserError for no text."""
    found = {}
    for path in [Path(name) for name in names if str(name).lower().endswith((".json", ".jsonl"))]:
        rows = read_list(path) if path.is_file() else []
        for row in [row for row in rows if isinstance(row, dict) and "prompt" in row and row.get("image")]:
            if not isinstance(row["prompt"], str):
                raise UserError(f"list {path} has the prompt {row['prompt']!r:.40}; expected a text")
            found |= {str(image): row["prompt"] for image in _to_images([row["image"]], path.parent)}
    return found


def _to_images(lines: Iterable[str], folder: Path | None = None) -> Iterator[Path | str]:
    """Yield the paths, relative to a folder, and URLs of a list."""
    for line in filter(None, lines):
        yield line if is_url(line) else folder / line if folder else Path(line)


def _expand(path: Path, recursive: bool, among_others: bool, skipped: Counter[str]) -> list[Path | str]:
    if not os.path.exists(path):  # unlike Path's, also False for a name too long for the file system
        raise UserError(f"{str(path)[:200]} does not exist; {EXPECTED}")
    if path.is_dir():
        return sorted(_walk(path, recursive, skipped))
    if among_others and _is_system_file(path.name):
        return []
    if path.suffix.lower() in LISTS:
        if among_others and not _is_list_of_images(path):
            skipped[f"{path.suffix.lower()} files that name no images"] += 1
            return []
        return list(_to_images(read_texts(path, "image"), path.parent))
    if among_others and path.suffix.lower() not in image_endings() and _is_text(path):
        skipped[f"{path.suffix.lower() or 'text'} files"] += 1
        return []
    return [path]


def _walk(folder: Path, recursive: bool, skipped: Counter[str]) -> Iterator[Path]:
    """Yield the images of a folder and count the other files and the folders that are not searched."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        if links and recursive:
            skipped["linked folders, which are searched when named"] += len(links)
        folders[:] = [name for name in folders if name not in SYSTEM_NAMES] if recursive else []
        for name in files:
            if _is_system_file(name):
                continue
            path = Path(parent, name)
            if path.suffix.lower() in image_endings():
                yield path
            else:
                skipped[f"{path.suffix.lower() or 'files without ending'}{' files' if path.suffix else ''}"] += 1


def _is_system_file(name: str) -> bool:
    return name in SYSTEM_NAMES or name.startswith("._")


def _is_list_of_images(path: Path) -> bool:
    """Return True if the first entry of a list is a file or a URL."""
    with suppress(UserError):
        first = read_texts(path, "image")[:1]
        return bool(first) and (is_url(first[0]) or os.path.isfile(path.parent / first[0]))
    return False


def _is_text(path: Path) -> bool:
    """Return True if the beginning of a file is text and not an image."""
    with suppress(OSError), open(path, "rb") as file:
        start = file.read(512)
        return b"\0" not in start and start.isascii()
    return False


def read_texts(path: Path, key: str) -> list[str]:
    """Return the texts of a list: .txt with one a line, or .json or .jsonl with texts or objects {key: text}.

    Raises UserError if it cannot be read, or holds something else.
    """
    expected = f"expected a text a line (.txt), or JSON texts or objects with {key!r} (.json, .jsonl)"
    if path.suffix.lower() in (".json", ".jsonl"):
        rows = [row.get(key) if isinstance(row, dict) else row for row in read_list(path)]
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"list {path} cannot be read ({error}); {expected}") from None
        rows = [line.strip() for line in lines if line.strip()]
    if not all(isinstance(row, str) and row for row in rows):
        raise UserError(f"list {path} holds something else; {expected}")
    return rows
