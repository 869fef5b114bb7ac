"""Work in shards that survives kills: each finished shard is a file, and the next start does the others."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from data.pretrain import PairList
from files import read_json, read_rows, to_json, write_json, write_whole
from utils import ProgressLine, UserError, barrier, get_world_size

Row = dict[str, Any]
Pair = tuple[str, str]  # image path, web text
Results = Iterator[tuple[int, list[Row]]]


class Shards:
    """Pairs of several lists, cut into shards, and a folder with a file for each finished shard.

    Args:
        lists: sequences of (image path, text); or one sequence of tar files' names, each a shard.
        size: pairs of a shard; 1 for tar files.
        folder: of the finished shards.
        tars: the shards are tar files.
    """

    def __init__(
        self, lists: Sequence[PairList | Sequence[Pair] | Sequence[str]], size: int, folder: Path, tars: bool = False
    ):
        self.lists, self.size, self.folder, self.tars = lists, size, folder, tars
        self.total = sum(len(pairs) for pairs in lists)

    def __len__(self) -> int:
        return -(-self.total // self.size)

    def pairs(self, shard: int) -> list[Pair] | list[str]:
        """Return the pairs of a shard, or the name of its tar file."""
        found, first, last = [], shard * self.size, (shard + 1) * self.size
        for pairs in self.lists:
            found += pairs[max(first, 0) : max(last, 0)]
            first, last = first - len(pairs), last - len(pairs)
        return found

    def path(self, shard: int) -> Path:
        """Return the file of a finished shard."""
        return self.folder / f"{shard:07d}.jsonl"

    def rows(self, shard: int) -> list[Row]:
        """Return the rows of a finished shard."""
        return read_rows(self.path(shard))

    def count_missing(self) -> int:
        """Return the number of shards that are not finished."""
        return sum(not self.path(shard).is_file() for shard in range(len(self)))


def open_folder(folder: Path, settings: Row, overwrite: bool = False) -> None:
    """Make a folder of shards, or accept one whose shards were made with the same settings.

    Args:
        settings: everything that the shards' content depends on.
        overwrite: delete shards of other settings.

    Raises:
        UserError: it holds shards of other settings or lists, or cannot be written.
    """
    path, settings = folder / "settings.json", json.loads(json.dumps(settings))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("*.part*"):  # of a start that was killed
            part.unlink(missing_ok=True)
        try:
            old = read_json(path)
        except (FileNotFoundError, ValueError):
            old = {}
        if old == settings:
            return
        if any(folder.glob("*.jsonl")) and not overwrite:
            changed = sorted(key for key in settings | old if old.get(key) != settings.get(key))
            raise UserError(
                f"{folder} holds shards of other settings ({', '.join(changed)}); restore them, choose another "
                "--output_dir, or delete these shards, and no others, with --overwrite"
            )
        for shard in folder.glob("*.jsonl"):
            shard.unlink()
        write_json(path, settings)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --output_dir") from None


def fingerprint_of(path: str | Path) -> list[str | int]:
    """Return name, size and time of a file, which change when it does; a URL or hub name as it is."""
    if not Path(path).is_file():
        return [str(path)]
    stat = Path(path).stat()
    return [Path(path).name, stat.st_size, stat.st_mtime_ns]


def run_shards(
    shards: Shards, work: Callable[[int], list[Row]] | None, title: str, results: Results | None = None
) -> None:
    """Do every shard that is not finished; each process takes the next one when it is free.

    Args:
        shards: what to do.
        work: shard -> its rows, which depend on nothing but the shard.
        title: of the progress line.
        results: shards and their rows as others do them, in place of `work`.

    Raises:
        UserError: a shard cannot be written, or none of its images can be read.
    """
    line = ProgressLine(shards.total, title)
    first, finished = min((len(shards) - shards.count_missing()) * shards.size, shards.total), 0
    for shard, rows in results or ((shard, work(shard)) for shard in _next_shards(shards, title)):
        if not shards.tars and len(rows) > 1 and all("error" in row for row in rows):
            raise UserError(
                f"none of the {len(rows)} images of shard {shard} can be read, the first because: {rows[0]['error']}; "
                "correct image_root and start again: finished shards are kept"
            )
        with write_whole(shards.path(shard), shared=True) as file:
            write_rows(file, rows)
        finished += len(shards.pairs(shard)) * get_world_size()
        line.update(min(first + finished, shards.total), f"{len(shards)} shards", first)
    _wait_for_all(title)
    line.close()


def write_rows(file: TextIO, rows: Sequence[Row]) -> None:
    """Write JSON lines."""
    file.writelines(to_json(row) + "\n" for row in rows)


def _wait_for_all(title: str) -> None:
    """Wait until every process has finished, however long the last shard takes: a collective has a time limit."""
    if get_world_size() > 1:
        store = dist.distributed_c10d._get_default_store()
        store.add(f"finished {title}", 1)
        while store.add(f"finished {title}", 0) < get_world_size():
            time.sleep(0.1)
        barrier()  # the process that holds the store stays until the others have read it


def _next_shards(shards: Shards, title: str) -> Iterator[int]:
    """Yield the numbers of unfinished shards; several processes share one counter."""
    store = dist.distributed_c10d._get_default_store() if get_world_size() > 1 else None
    own = iter(range(len(shards)))
    while (shard := store.add(f"shards of {title}", 1) - 1 if store else next(own, len(shards))) < len(shards):
        if not shards.path(shard).is_file():
            yield shard
