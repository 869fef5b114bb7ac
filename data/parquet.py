"""Parquet files of pairs, as img2dataset and published sets write them: with encoded images, or as lists of images."""

import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.annotations import as_list
from data.text import is_blank
from data.transforms import IMAGE_ENDINGS
from files import is_address, open_to_read
from utils import UserError, note

PARQUET = ".parquet"
IMAGES = ("image", *(ending[1:] for ending in IMAGE_ENDINGS))  # columns of encoded images, by order of preference
TEXTS = ("caption", "text", "title")
FACTS = ("key", "url", "status")  # read if they are there
ROWS = 4096  # rows at once of a list
BUFFER = 1 << 20  # bytes of a column that are read at once
Table = tuple[Any, dict[str, str]]  # pyarrow's file, and its columns by their names in small letters


@contextmanager
def _open(name: str | Path) -> Iterator[Table]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{name} needs pyarrow; pip install pyarrow") from None
    with open_to_read(name) as file, parquet.ParquetFile(file, buffer_size=BUFFER) as table:
        yield table, {column.lower(): column for column in table.schema_arrow.names}


def _image_column(table: Any) -> str:
    """Return the column of encoded images, as bytes or as Hugging Face's {"bytes", "path"}; '' if there is none."""
    import pyarrow.types as types

    for name in IMAGES:
        if name in table.schema_arrow.names:
            kind = table.schema_arrow.field(name).type
            if types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind):
                return name
    return ""


def has_images(name: str) -> bool:
    """Return True if a file holds encoded images, False for a list of paths or URLs; UserError if it is unreadable."""
    try:
        with _open(name) as (table, _):
            return bool(_image_column(table))
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read ({' '.join(str(error).split())}); replace it or take it out") from None


def _rows(table: Any, columns: dict[str, str], at_once: int) -> Iterator[dict[str, Any]]:
    """Yield rows as {name: value}; a memory of `at_once` rows, however large a row group is."""
    for batch in table.iter_batches(at_once, columns=list(columns.values())):
        values = [batch.column(column).to_pylist() for column in columns.values()]
        for row in zip(*values, strict=True):
            yield dict(zip(columns, row, strict=True))


def _columns(name: str | Path, known: dict[str, str], image: str = "") -> dict[str, str]:
    """Return the columns to read, under our names; UserError if there is no text, or nothing that leads to an image."""
    text = next((known[text] for text in TEXTS if text in known), "")
    columns = {key: known[key] for key in FACTS if key in known} | {"caption": text}
    if image or "image" in known:
        columns["image"] = image or known["image"]
    if not text or not columns.keys() & {"image", "key", "url"}:
        raise UserError(
            f"{name} has the columns {', '.join(known.values())}; expected 'caption' (or 'text') and encoded images, "
            "or 'image', 'key' or 'url' that lead to them"
        )
    return columns


def read_samples(name: str, dropped: Counter[str]) -> Iterator[tuple[str, str, bytes, str, dict[str, Any]]]:
    """Yield (key, ending of the image, image, text, other columns), some rows at a time; several texts are repeated.

    `dropped` counts rows that are left out, by reason. Errors are as in `data.tars.read_shard`; UserError if the file
    holds no images.
    """
    try:
        with _open(name) as (table, known):
            image = _image_column(table)
            if not image:
                raise UserError(f"{name} holds no encoded images; give lists by their names, such as a/*{PARQUET}")
            columns = _columns(name, known, image)
            for number, row in enumerate(_rows(table, columns, 16)):
                content = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
                texts = [text for text in as_list(row["caption"]) if isinstance(text, str) and not is_blank(text)]
                if not content or not texts:
                    dropped["without text" if content else "without image"] += 1
                key, facts = str(row.get("key") or f"{number:09d}"), {k: v for k, v in row.items() if k in FACTS and v}
                for text in texts if content else ():
                    yield key, _ending(image, content), content, text, facts
    except (ValueError, OSError) as error:  # pyarrow's errors of content; those of a file system have a number
        if isinstance(error, OSError) and (error.errno or is_address(name)):
            raise
        raise tarfile.ReadError(" ".join(str(error).split())) from None


def _ending(column: str, content: bytes) -> str:
    """Return the ending that the column is called by, or that the first bytes show."""
    if column != "image":
        return column
    return "png" if content.startswith(b"\x89PNG") else "webp" if content.startswith(b"RIFF") else "jpg"


def read_list(path: Path) -> Iterator[dict[str, Any]]:
    """Yield {"image" or "url", "caption"} of a list without images.

    "image" is a column, or for the files that img2dataset downloads, <name of the list>/<key>.jpg. Rows whose download
    failed are left out. UserError if the file is damaged or lacks columns.
    """
    failed = 0
    try:
        with _open(path) as (table, known):
            columns = _columns(path, known)
            for row in _rows(table, columns, ROWS):
                if row.get("status") not in (None, "success"):
                    failed += 1
                elif "image" in row:
                    yield {"image": row["image"], "caption": row["caption"]}
                elif row.keys() >= {"key", "status"} or "url" not in row:
                    yield {"image": f"{path.stem}/{row['key']}.jpg", "caption": row["caption"]}
                else:
                    yield {"url": row["url"], "caption": row["caption"]}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); replace it or take it out") from None
    if failed:
        note(f"{path}: {failed} rows whose download failed are left out")
