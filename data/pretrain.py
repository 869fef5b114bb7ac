"""Pairs for pretraining: lists of any length, indexed once and from then on mapped from disk (paper section 4.1)."""

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from data.annotations import as_list, inside
from data.parquet import PARQUET, read_list
from data.text import is_blank, pre_caption
from data.transforms import Transform
from download import cache_folder
from files import is_address, open_store, open_to_read, write_whole
from utils import ProgressLine, UserError, barrier, note

CHUNK = 1 << 22  # bytes of a list that are read at once
OFFSET = np.dtype("<i8")
SEPARATORS = re.compile(r"[ \t\r\n,\[\]]*")  # before an entry: white space, commas, the brackets of the list
MAX_WORDS = 30
TRIES = 20  # images tried in place of an unreadable one


class PairList:
    """Rows of one list, mapped from disk: any number of processes share the pages of one copy.

    The list is JSON, or JSON lines, of {"image": path, "caption": text or texts}; or with "url" in place of "image",
    the image then being where `image_of_url` says.
    """

    def __init__(self, path: Path):
        self.path = index_folder(path) / "rows.bin"
        self.offsets = np.load(self.path.with_name("offsets.npy"), mmap_mode="r")
        self.rows = np.memmap(self.path, dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        """Return image path and caption of a row; of a slice, those of its rows, read from the file and not mapped."""
        if not isinstance(index, slice):
            start, end = self.offsets[index : index + 2]
            return _pair(self.rows[start:end].tobytes())
        first, last, _ = index.indices(len(self))
        offsets = self.offsets[first : last + 1].tolist()
        with open(self.path, "rb") as file:
            file.seek(offsets[0])
            return [_pair(file.read(end - start)) for start, end in pairwise(offsets)]


def _pair(row: bytes) -> tuple[str, str]:
    image, _, caption = row.decode().partition("\0")
    return image, caption


def list_turns(folder: str) -> list[Path]:
    """Return the lists of a folder that the epochs take in turn; '' has none."""
    if not folder:
        return []
    paths = sorted(path for path in Path(folder).glob("*.json*") if path.is_file())
    if not paths:
        raise UserError(f"laion_path {folder} holds no .json or .jsonl list; correct it, or set it to ''")
    return paths


def index_folder(path: Path) -> Path:
    """Return the folder of a list's index; its name changes when the list changes."""
    try:
        stat = path.stat()
    except OSError:
        raise UserError(f"list of pairs {path} does not exist; correct train_file or laion_path") from None
    name = f"{path.name}-{stat.st_size:x}-{stat.st_mtime_ns:x}-{_fingerprint(path):x}.pairs"
    beside = path.parent / name
    if beside.is_dir() or os.access(path.parent, os.W_OK):
        return beside
    return cache_folder() / "index" / name


def _fingerprint(path: Path, size: int = 1 << 16) -> int:
    """Return a checksum of a file's beginning, middle and end: copies and mounts may all have one time."""
    total, value = path.stat().st_size, 0
    with open(path, "rb") as file:
        for start in (0, total // 2, max(total - size, 0)):
            file.seek(start)
            value = zlib.crc32(file.read(size), value)
    return value


def open_lists(paths: Sequence[str | Path]) -> list[PairList]:
    """Index the lists that are new, by one process of each machine, and open all of them."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    for path in paths:
        if first or not is_address(path):
            folder = index_folder(_local(path))
            if first and not folder.is_dir():
                build_index(_local(path), folder)
    barrier()
    return [PairList(_local(path)) for path in paths]


def _local(address: str | Path) -> Path:
    """Return a list's path; of an address, that of a copy in the cache, which is new when the list's size changes."""
    if not is_address(address):
        return Path(address)
    store, path = open_store(address)
    try:
        name = hashlib.sha256(f"{address} {store.info(path)['size']}".encode()).hexdigest()[:12]
        copy = cache_folder() / "lists" / name / address.rpartition("/")[2].partition("?")[0]
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.is_file():
            with write_whole(copy, "wb", shared=True) as file, open_to_read(address) as source:
                shutil.copyfileobj(source, file)
    except OSError as error:
        raise UserError(f"list of pairs {address} cannot be read ({error}); correct its address") from None
    return copy


def build_index(path: Path, folder: Path) -> None:
    """Write a list's rows one after the other, and where each begins, in memory that does not grow with them."""
    temporary = folder.with_name(folder.name + f".part{os.getpid()}")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary / "rows.bin", "wb") as rows, open(temporary / "offsets.bin", "wb") as offsets:
            position = 0
            for row in _encoded_pairs(path):
                offsets.write(position.to_bytes(OFFSET.itemsize, "little"))
                position += rows.write(row)
            offsets.write(position.to_bytes(OFFSET.itemsize, "little"))
        if not position:
            raise UserError(f"{path} holds no pairs; expected a list of {{'image', 'caption'}}")
        np.save(temporary / "offsets.npy", np.memmap(temporary / "offsets.bin", OFFSET, mode="r"))
        (temporary / "offsets.bin").unlink()
        temporary.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another run has been faster
            problem = f"could not be written ({error.strerror}); free space beside {path}"
            raise UserError(f"index {folder} {problem}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _encoded_pairs(path: Path) -> Iterator[bytes]:
    num_empty = 0
    for number, row in enumerate(read_list(path) if path.suffix == PARQUET else read_rows(path)):
        image, captions = _pairs_of(row, f"{path}, entry {number}")
        texts = [caption for caption in captions if not is_blank(caption)]
        num_empty += len(captions) - len(texts)
        yield from (f"{image}\0{text}".encode("utf-8", "replace") for text in texts)
    if num_empty:
        note(f"{path}: {num_empty} empty captions are left out")


def _pairs_of(row: Any, place: str) -> tuple[str, list[str | None]]:
    """Return the image path and the captions of an entry."""
    if not isinstance(row, dict) or "caption" not in row or not {"image", "url"} & row.keys():
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{place}: has {keys}; expected the keys 'image' (or 'url') and 'caption'")
    key = "image" if "image" in row else "url"
    captions = as_list(row["caption"]) or [None]
    if not isinstance(row[key], str) or "\0" in row[key] or not all(isinstance(text, str | None) for text in captions):
        raise UserError(f"{place}: {key} {row[key]!r:.40}, caption {row['caption']!r:.40}; expected texts")
    return row["image"] if key == "image" else image_of_url(row["url"]), captions


def image_of_url(url: str) -> str:
    """Return where a downloaded image is expected under image_root: ab/abcdef....jpg, the URL's SHA-256."""
    name = hashlib.sha256(url.encode("utf-8", "replace")).hexdigest()[:32]
    return f"{name[:2]}/{name}.jpg"


def read_rows(path: Path) -> Iterator[Any]:
    """Yield the entries of a JSON list, or of JSON lines, reading a few megabytes at a time, with progress."""
    try:
        yield from _rows(path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; expected a JSON list of pairs") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise UserError(f"{path} is not a JSON list of pairs ({error}); correct it") from None


def _rows(path: Path) -> Iterator[Any]:
    line = ProgressLine(path.stat().st_size, f"indexing {path.name} (once), bytes")
    decoder, text, number, is_list = json.JSONDecoder(), "", 0, False
    with open(path, encoding="utf-8-sig") as file:
        while chunk := file.read(CHUNK):
            text, position = text + chunk, 0
            is_list = is_list or (not number and text.lstrip().startswith("["))
            while True:
                try:
                    row, position = decoder.raw_decode(text, SEPARATORS.match(text, position).end())
                except json.JSONDecodeError:
                    break  # an entry that goes on in the next chunk, or an error that the end will show
                yield row
                number += 1
            text = text[position:]
            if len(text) > 4 * CHUNK:
                break
            line.update(file.buffer.tell())
    line.close()
    if text[SEPARATORS.match(text).end() :]:
        place = f"what follows entry {number - 1}" if number else "its beginning"
        raise UserError(f"{path} is not a JSON list of pairs: {place} cannot be read")
    if is_list and not text.rstrip().endswith("]"):
        raise UserError(f"{path} ends after entry {number - 1} without a closing bracket; get it again, or close it")


class PairDataset(Dataset):
    """Images and captions of several lists, and of one of the further lists `turns` per epoch, in turn.

    Every epoch has the length of the lists plus the longest of the further ones; a shorter one begins again.
    An unreadable image, or one outside of `image_root`, is replaced by another pair of the epoch, and named in "bad".
    """

    def __init__(
        self, train_files: Sequence[str | Path], image_root: str, transform: Transform,
        turns: Sequence[str | Path] = (),
    ):  # fmt: skip
        self.lists, self.turns = open_lists(train_files), open_lists(turns)
        self.image_root, self.transform = image_root, transform
        self.starts = np.cumsum([0] + [len(pairs) for pairs in self.lists])
        self.turn_length = max((len(pairs) for pairs in self.turns), default=0)

    def __len__(self) -> int:
        return int(self.starts[-1]) + self.turn_length

    def pair(self, epoch: int, index: int) -> tuple[str, str]:
        """Return image path and caption of a pair."""
        if index >= self.starts[-1]:
            pairs = self.turns[epoch % len(self.turns)]
            return pairs[(index - int(self.starts[-1])) % len(pairs)]
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.lists[number][index - int(self.starts[number])]

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """Return {"image", "caption", "bad"}; "bad" names the unreadable images met on the way, one a line."""
        bad: list[str] = []
        for attempt in range(TRIES):
            image, caption = self.pair(epoch, (index + attempt * 7919) % len(self))
            try:
                tensor = self.transform.read(inside(self.image_root, image))
            except UserError as error:
                bad.append(str(error))
                continue
            return {"image": tensor, "caption": pre_caption(caption, MAX_WORDS), "bad": "\n".join(bad)}
        raise UserError(f"{TRIES} images in a row cannot be read, the first being {bad[0]}; correct image_root")

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.at(0, index)
