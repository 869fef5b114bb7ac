"""CapFilt's engine: work in shards that survive kills, and the bootstrapped set that is made of them (section 3.3)."""

import hashlib
import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch.distributed as dist

from data.pretrain import PairList
from files import write_whole
from utils import ProgressLine, UserError, barrier, get_world_size

Row = dict[str, Any]
Pair = tuple[str, str]  # image path, web text
BINS = 20  # of the histogram of probabilities
SHOWN = 24  # images of the report


class Shards:
    """Pairs of several lists, cut into shards, and a folder with a file for each finished one.

    Args:
        lists: sequences of (image path, text); or one of tar files' names, each of which is a shard.
        size: pairs of a shard; 1 for tar files.
        folder: of the finished shards.
        tars: whether they are tar files.
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
        found, start = [], 0
        first, last = shard * self.size, min((shard + 1) * self.size, self.total)
        for pairs in self.lists:
            found += [pairs[i - start] for i in range(max(first, start), min(last, start + len(pairs)))]
            start += len(pairs)
        return found

    def path(self, shard: int) -> Path:
        """Return the file of a finished shard."""
        return self.folder / f"{shard:07d}.jsonl"

    def rows(self, shard: int) -> list[Row]:
        """Return what was written of a shard."""
        with open(self.path(shard), encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def prepare(folder: Path, settings: Row, overwrite: bool = False) -> None:
    """Make a folder of shards, or accept one whose shards were made with the same settings.

    Args:
        folder: of the shards.
        settings: what the shards depend on.
        overwrite: drop shards of other settings.

    Raises:
        UserError: it holds shards of other settings or lists, or cannot be written.
    """
    path, settings = folder / "settings.json", json.loads(json.dumps(settings))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("*.part*"):  # of a start that was killed
            part.unlink(missing_ok=True)
        old = _read_settings(path)
        if old == settings:
            return
        if any(folder.glob("*.jsonl")) and not overwrite:
            changed = sorted(key for key in settings if old.get(key) != settings[key])
            raise UserError(
                f"{folder} holds shards of other settings ({', '.join(changed)}); restore them, choose another "
                "--output_dir, or drop these shards, and no others, with --overwrite"
            )
        for shard in folder.glob("*.jsonl"):
            shard.unlink()
        with write_whole(path) as file:
            json.dump(settings, file)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --output_dir") from None


def _read_settings(path: Path) -> Row:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def fingerprint_of(path: str | Path) -> list:
    """Return what changes when a file does: name, size and time; a URL or hub name stays itself."""
    if not Path(path).is_file():
        return [str(path)]
    stat = Path(path).stat()
    return [Path(path).name, stat.st_size, stat.st_mtime_ns]


def run_shards(shards: Shards, work: Callable[[int], list[Row]], title: str) -> None:
    """Do every shard that is not finished; processes take the next one as they get free.

    Args:
        shards: what to do.
        work: shard -> its rows; depends on nothing but the shard.
        title: of the progress line.

    Raises:
        UserError: a shard cannot be written.
    """
    done = sum(shards.path(shard).is_file() for shard in range(len(shards)))
    line = ProgressLine(shards.total, title)
    first, finished = min(done * shards.size, shards.total), 0
    for shard in next_shards(shards, title):
        rows = work(shard)
        if not shards.tars:
            refuse_unreadable(shard, rows)
        write_shard(shards.path(shard), rows)
        finished += len(shards.pairs(shard)) * get_world_size()
        line.update(min(first + finished, shards.total), f"{len(shards)} shards", first)
    wait_for_all(title)
    line.close()


def wait_for_all(title: str) -> None:
    """Wait until every process has finished, however long the last shard takes: a collective has a time limit."""
    if get_world_size() > 1:
        store = dist.distributed_c10d._get_default_store()
        store.add(f"finished {title}", 1)
        while store.add(f"finished {title}", 0) < get_world_size():
            time.sleep(0.1)
        barrier()  # nobody leaves, perhaps with the store, while others still ask


def refuse_unreadable(shard: int, rows: Sequence[Row]) -> None:
    """Stop where no image of a shard can be read: a wrong folder, or a disk that went away.

    Raises:
        UserError: the shard's images all have errors, and there are several.
    """
    if len(rows) > 1 and all("error" in row for row in rows):
        raise UserError(
            f"none of the {len(rows)} images of shard {shard} can be read, the first because: {rows[0]['error']}; "
            "correct image_root and start again: finished shards are kept"
        )


def next_shards(shards: Shards, title: str) -> Iterator[int]:
    """Yield the numbers of shards to do; several processes share one counter."""
    store = dist.distributed_c10d._get_default_store() if get_world_size() > 1 else None
    own = iter(range(len(shards)))
    while (shard := store.add(f"shards of {title}", 1) - 1 if store else next(own, len(shards))) < len(shards):
        if not shards.path(shard).is_file():
            yield shard


def write_shard(path: Path, rows: Sequence[Row]) -> None:
    """Write a shard, whole or not at all.

    Raises:
        UserError: the disk is full or the folder may not be written.
    """
    temporary = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            write_rows(file, rows)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"shard {path} could not be written ({error.strerror}); free space and start again: finished ones are kept"
        ) from None


def write_rows(file: TextIO, rows: Sequence[Row]) -> None:
    """Write JSON lines."""
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# What the shards add up to.


@dataclass
class Tally:
    """Counts over all rows, gathered one shard at a time; memory grows with the vocabulary only."""

    kept: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    unreadable: int = 0
    histograms: dict[str, list[int]] = field(default_factory=dict)
    words: dict[str, Counter] = field(default_factory=dict)
    texts: dict[str, "Distinct"] = field(default_factory=lambda: defaultdict(Distinct))
    same: int = 0
    shared_words: float = 0.0
    compared: int = 0
    shown: list[list[Row]] = field(default_factory=list)

    def add(self, rows: Sequence[Row]) -> None:
        """Count the rows of a shard."""
        by_image: dict[str, list[Row]] = {}
        for row in rows:
            if "error" in row:
                self.unreadable += 1
                continue
            source = row["source"]
            (self.kept if row["kept"] else self.dropped)[source] += 1
            if "probability" in row:
                counts = self.histograms.setdefault(source, [0] * BINS)
                counts[min(int(row["probability"] * BINS), BINS - 1)] += 1
            self.words.setdefault(source, Counter()).update(row["caption"].lower().split())
            self.texts[source].add(row["caption"])
            by_image.setdefault(row["image"], []).append(row)
        for group in by_image.values():
            self.compare(group)
            if len(self.shown) < SHOWN:
                self.shown.append(group)

    def compare(self, rows: Sequence[Row]) -> None:
        """Count how far the synthetic texts of an image repeat its web texts."""
        web = [row["caption"].lower() for row in rows if row["source"] == "web"]
        known = {word for text in web for word in text.split()}
        for text in (row["caption"].lower() for row in rows if row["source"] == "synthetic"):
            words = set(text.split())
            self.same += text in web
            self.shared_words += len(words & known) / max(len(words | known), 1)
            self.compared += 1

    def scores(self) -> dict[str, dict[str, float]]:
        """Return counts, shares and diversity by source."""
        found = {}
        for source in sorted(set(self.kept) | set(self.dropped), reverse=True):
            kept, total = self.kept[source], self.kept[source] + self.dropped[source]
            words = self.words[source]
            found[source] = {
                "texts": total,
                "kept": kept,
                "kept (%)": 100 * kept / total,
                "distinct texts": self.texts[source].count(),
                "distinct words": len(words),
                "words a text": sum(words.values()) / total,
            }
        if self.compared:
            unseen = set(self.words["synthetic"]) - set(self.words.get("web", ()))
            found["synthetic"] |= {
                "words no web text has": len(unseen),
                "equal to the web text (%)": 100 * self.same / self.compared,
                "words shared with it (%)": 100 * self.shared_words / self.compared,
            }
        return found


class Distinct:
    """Counts distinct texts in 16 MB however many there are: exact for few, within a per cent up to ten millions."""

    def __init__(self, size: int = 1 << 24):
        self.seen = np.zeros(size, bool)

    def add(self, text: str) -> None:
        """Count a text."""
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        self.seen[int.from_bytes(digest, "big") % len(self.seen)] = True

    def count(self) -> int:
        """Return how many there were, by linear counting (Whang et al., 1990)."""
        share = self.seen.mean()
        return round(-len(self.seen) * math.log1p(-min(share, 1 - 1 / len(self.seen))))


def merge(shards: Shards, folder: Path) -> Tally:
    """Write bootstrapped.jsonl, dropped.jsonl and unreadable.jsonl from the finished shards, and count them.

    Of tar files there is no bootstrapped.jsonl: the bootstrapped tar files say as much.

    Raises:
        UserError: they could not be written.
    """
    tally, names = Tally(), ("dropped", "unreadable") if shards.tars else ("bootstrapped", "dropped", "unreadable")
    temporary = {name: folder / f"{name}.jsonl.part" for name in names}
    try:
        files = {name: open(path, "w", encoding="utf-8") for name, path in temporary.items()}  # noqa: SIM115
        for shard in range(len(shards)):
            rows = shards.rows(shard)
            tally.add(rows)
            for row in rows:
                name = "unreadable" if "error" in row else "bootstrapped" if row["kept"] else "dropped"
                if name in files:
                    write_rows(files[name], [{key: value for key, value in row.items() if key != "kept"}])
        for file in files.values():
            file.close()
        for name, path in temporary.items():
            path.replace(folder / f"{name}.jsonl")
    except OSError as error:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise UserError(
            f"the bootstrapped set could not be written to {folder} ({error.strerror}); free space and start again: "
            "finished shards are kept"
        ) from None
    return tally
