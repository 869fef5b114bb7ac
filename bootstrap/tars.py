"""Images and web texts of CapFilt, read from lists or tar shards, and tar shards of the bootstrapped pairs."""

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bootstrap.shards import Row, Shards
from data.annotations import inside
from data.pretrain import MAX_WORDS
from data.tars import Record, read_shard
from data.text import pre_caption
from files import is_address, open_store, write_whole
from utils import UserError


@dataclass
class Sample:
    """An image and its web texts.

    Attributes:
        name: its path, or its key in a tar shard; unique within a shard.
        image: path, or encoded.
        texts: web texts, cleaned.
        record: of the tar shard.
    """

    name: str
    image: Path | bytes
    texts: list[str]
    record: Record | None = None


# shard -> its samples, some at a time, and rows for what could not be read
Source = Callable[[int], Iterator[tuple[list[Sample], list[Row]]]]


def list_source(shards: Shards, image_root: str) -> Source:
    """Return a source of the images of lists, each once, a shard at a time."""

    def source(shard: int) -> Iterator[tuple[list[Sample], list[Row]]]:
        """Yield the samples of a shard, and rows for paths that are refused."""
        samples: dict[str, Sample] = {}
        errors: dict[str, Row] = {}
        for image, text in shards.pairs(shard):
            try:
                sample = samples.setdefault(image, Sample(image, inside(image_root, image), []))
            except UserError as error:
                errors[image] = {"image": image, "error": str(error)}
                continue
            sample.texts.append(pre_caption(text, MAX_WORDS))
        for name, content in read_objects(image_root, list(samples)).items() if is_address(image_root) else ():
            if isinstance(content, bytes):
                samples[name].image = content
            else:
                errors[name] = {"image": name, "error": f"{image_root}/{name} cannot be read ({content})"}
                del samples[name]
        yield list(samples.values()), list(errors.values())

    return source


def read_objects(root: str, names: Sequence[str]) -> dict[str, bytes | Exception]:
    """Return the content of objects below an address, or the error of each that cannot be read; all at once."""
    store, folder = open_store(root)
    paths = [f"{folder.rstrip('/')}/{name}" for name in names]
    found = store.cat(paths, on_error="return") if paths else {}
    return {name: found[path] for name, path in zip(names, paths, strict=True)}


def tar_source(shards: Shards, size: int) -> Source:
    """Return a source of the samples of tar files, `size` at a time.

    A damaged archive counts as one unreadable image, after those before the damage. A command that fails ends the
    run, since it may succeed at the next start.
    """

    def source(shard: int) -> Iterator[tuple[list[Sample], list[Row]]]:
        """Yield the samples of a tar file, then a row for damage."""
        (tar,) = shards.pairs(shard)
        held: list[Sample] = []
        errors: list[Row] = []
        try:
            for sample in _samples(tar):
                held.append(sample)
                if len(held) == size:
                    yield held, []
                    held = []
        except tarfile.TarError as error:
            errors = [{"image": tar, "error": f"the archive cannot be read to its end ({error})"}]
        except OSError as error:
            raise UserError(
                f"shard {tar} cannot be read ({error}); repair it and start again: finished shards are kept"
            ) from None
        yield held, errors

    return source


def _samples(tar: str) -> Iterator[Sample]:
    """Yield a tar file's samples under unique names: a repeated key gets a number."""
    seen: Counter[str] = Counter()
    for record in read_shard(tar):
        seen[record.key] += 1
        name = record.key if seen[record.key] == 1 else f"{record.key}#{seen[record.key]}"
        yield Sample(name, record.image, [pre_caption(record.caption, MAX_WORDS)], record)


def with_places(rows: Sequence[Row], samples: Sequence[Sample]) -> list[Row]:
    """Return rows whose errors name the tar file of the unreadable image, if it is in one."""
    places = {sample.name: f"{sample.record.name}: " for sample in samples if sample.record}
    return [row | {"error": places.get(row["image"], "") + row["error"]} if "error" in row else row for row in rows]


# Writing.

Write = Callable[[Sequence[Sample], Sequence[Row]], None]
Output = Callable[[int], AbstractContextManager[Write]]  # shard -> context in which its pairs are written


class TarOutput:
    """Tar shards of the bootstrapped set in a folder or at an address, one for each shard of the input."""

    ending = ".tar"

    def __init__(self, folder: str | Path):
        self.folder = str(folder)

    def path(self, shard: int, ending: str = "") -> str | Path:
        """Return the file of a shard."""
        path = f"{self.folder}/{shard:05d}{ending or self.ending}"
        return path if is_address(path) else Path(path)

    @contextmanager
    def __call__(self, shard: int) -> Iterator[Write]:
        """Write a shard, whole or not at all.

        Raises:
            UserError: the disk is full, or the folder or store cannot be written.
        """
        try:
            if not is_address(self.folder):
                Path(self.folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be made ({error.strerror}); choose another --output_dir") from None
        with write_whole(self.path(shard), "wb", shared=True) as file, self.writer(file, shard) as write:
            yield write

    @contextmanager
    def writer(self, file: IO[bytes], shard: int) -> Iterator[Write]:
        """Write the kept pairs of a shard to its file, and their number beside it."""
        number = 0
        with tarfile.open(fileobj=file, mode="w") as tar:

            def write(samples: Sequence[Sample], rows: Sequence[Row]) -> None:
                """Add the kept pairs, and count them."""
                nonlocal number
                number += add_pairs(tar, samples, rows)

            yield write
        with write_whole(self.path(shard, "_stats.json"), "wb", shared=True) as stats:  # for `data.shards.count_pairs`
            stats.write(json.dumps({"successes": number}).encode())

    def delete_unfinished(self, shards: Shards) -> None:
        """Delete the files of shards that are not finished: of other settings, or of a start that was killed.

        Raises:
            UserError: one cannot be deleted.
        """
        store, folder = open_store(self.folder)
        try:
            for path in store.ls(folder, detail=False) if store.exists(folder) else ():
                ending = re.escape(self.ending)
                name = re.fullmatch(rf"(\d+)({ending}|_stats\.json|({ending}|_stats\.json)\.part\d+)", Path(path).name)
                if name and (".part" in name[2] or not _is_finished(shards, int(name[1]))):
                    store.rm_file(path)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be cleared of unfinished shards ({error})") from None


def _is_finished(shards: Shards, shard: int) -> bool:
    return shard < len(shards) and shards.path(shard).is_file()


@contextmanager
def no_output(shard: int) -> Iterator[Write]:
    """Write no file: the output of a run over lists."""
    yield lambda samples, rows: None


def add_pairs(tar: tarfile.TarFile, samples: Sequence[Sample], rows: Sequence[Row]) -> int:
    """Add a sample for each kept row: the unchanged image, the caption, their origin; returns the number of samples."""
    by_name = {sample.name: sample for sample in samples}
    numbers: Counter[str] = Counter()
    for row in rows:
        if not row.get("kept"):
            continue
        sample = by_name[row["image"]]
        key = f"{sample.name}-{numbers[sample.name]}"
        numbers[sample.name] += 1
        _add(tar, f"{key}.{sample.record.ending}", sample.image)
        _add(tar, f"{key}.txt", row["caption"].encode())
        _add(tar, f"{key}.json", json.dumps(facts_of(sample, row), ensure_ascii=False).encode())
    return sum(numbers.values())


def facts_of(sample: Sample, row: Row) -> dict[str, Any]:
    """Return the .json of a bootstrapped pair: its text, source and probability, and the image's origin."""
    facts = {key: row[key] for key in ("caption", "source", "probability") if key in row} | {"key": sample.record.key}
    return facts | {"url": sample.record.facts["url"]} if "url" in sample.record.facts else facts


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file without time and owner, so that the same content gives the same archive."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


def read_images(tars: Sequence[str], names: Sequence[str]) -> dict[str, bytes]:
    """Return the encoded images of some names, as far as the first tar files have them and can be read."""
    found: dict[str, bytes] = {}
    for tar in tars[: len(names)]:
        try:
            for sample in _samples(tar):
                if sample.name in names:
                    found.setdefault(sample.name, sample.image)
                if len(found) == len(set(names)):
                    return found
        except (OSError, tarfile.TarError):
            continue
    return found
