"""What a command line names: images by files, folders and lists, and texts by lists."""

from collections.abc import Iterable
from pathlib import Path

from data.annotations import read_list
from utils import UserError

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
LISTS = {".txt", ".json", ".jsonl"}


def find_images(names: Iterable[str | Path]) -> list[Path]:
    """Return the images that files, folders and lists name, in order, each once.

    Args:
        names: an image; a folder, searched with its subfolders; or a list: .txt with a path a line, .json or
            .jsonl with paths or {"image": path}. A list's relative paths start from its own folder.

    Raises:
        UserError: something does not exist, or there is no image at all.
    """
    found: dict[Path, None] = {}
    for name in map(Path, names):
        if not _exists(name):
            raise UserError(
                f"{name} does not exist; give images, folders of images, or lists (.txt, .json, .jsonl)"
            )
        found |= dict.fromkeys(_expand(name))
    if not found:
        raise UserError(
            f"no image in {', '.join(map(str, names))}; expected files ending in {' '.join(sorted(ENDINGS))}"
        )
    return list(found)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for the file system
        return False


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(child for child in path.rglob("*") if child.suffix.lower() in ENDINGS and child.is_file())
    if path.suffix.lower() in LISTS:
        return [path.parent / name for name in read_texts(path, "image")]
    return [path]


def read_texts(path: Path, key: str) -> list[str]:
    """Return the texts of a list: .txt with one a line, or .json or .jsonl with texts or objects {key: text}.

    Raises:
        UserError: it cannot be read, or holds something else.
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
