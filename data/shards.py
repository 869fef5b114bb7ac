"""Pairs of tar shards, streamed to every data worker.

Every data worker of every process reads shards of its own, one after the other, through a shuffle buffer. Which pairs
come in which order depends on the seed, the epoch and the number of readers only; a run that continues in the middle
of a shard reads again, without decoding, the pairs it has had.
"""

import io
import json
import random
import sys
import tarfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from data.parquet import PARQUET
from data.pretrain import MAX_WORDS, TRIES
from data.tars import PIPE, SHARD_ENDINGS, Record, contents, dropped_samples, expand, read_shard
from data.text import pre_caption
from data.transforms import BAD_IMAGE, Transform, to_rgb
from files import is_address
from utils import UserError, get_rank, get_world_size, note, on_main_process, track

SHOWN = 3  # shards of a reader whose dropped samples are shown
UNREADABLE = (OSError, tarfile.TarError, ValueError)


def count_pairs(shards: Sequence[str]) -> int:
    """Return the number of pairs in shards: from the `_stats.json` that img2dataset writes beside each, or by reading.

    A `_stats.json` that is older than its shard is not believed. Each number is kept in `<shard>.count.json` with the
    shard's size and time, and is counted again when they change. UserError if a shard is behind a pipe, at an address,
    or cannot be read.
    """

    def count() -> int:
        """Return the number of pairs, and note what is left out."""
        dropped: Counter[str] = Counter()
        total = sum(_count(shard, dropped) for shard in track(shards, "counting pairs of shards"))
        if dropped:
            note(f"samples of shards that are left out: {dropped_samples(dropped)}")
        return total

    return on_main_process(count)


def _count(shard: str, dropped: Counter[str]) -> int:
    if shard.startswith(PIPE) or is_address(shard):
        raise UserError(f"how many pairs {shard!r} gives cannot be known; set shard_pairs to the number in all shards")
    kept = Path(f"{shard}.count.json")
    ending = next(ending for ending in (*SHARD_ENDINGS, PARQUET, "") if shard.endswith(ending))
    stats = Path(shard.removesuffix(ending) + "_stats.json")
    try:
        stat = Path(shard).stat()
        version = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        number = _read_count(kept, "pairs", version)
        if number is not None:
            return number
        # a shard that has changed since it was counted may be older than its statistics
        if not kept.exists() and stats.exists() and stats.stat().st_mtime_ns >= stat.st_mtime_ns:
            number = _read_count(stats, "successes", {})
        if number is None:
            number = sum(1 for _ in read_shard(shard, dropped))
    except UNREADABLE as error:
        raise UserError(f"shard {shard} cannot be read ({error}); replace it or take it out") from None
    with suppress(OSError):  # in a folder without write permission the next run counts again
        kept.write_text(json.dumps({"pairs": number, **version}), encoding="utf-8")
    return number


def _read_count(path: Path, key: str, expected: dict[str, int]) -> int | None:
    """Return a whole number of a JSON file in which other entries are as expected; None if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or any(found.get(name) != value for name, value in expected.items()):
        return None
    number = found.get(key)
    return number if type(number) is int and number >= 0 else None


def read_in_turn(shards: Sequence[str], others: Sequence[str], problems: list[str]) -> Iterator[Record]:
    """Yield the pairs of shards over and over, or those of `others` if there are none; errors go to `problems`."""
    num_shown = 0
    while True:
        found = 0
        for shard in shards:
            dropped: Counter[str] = Counter()
            try:
                for record in read_shard(shard, dropped):
                    found += 1
                    yield record
            except UNREADABLE as error:
                problems.append(f"shard {shard} cannot be read to its end ({error})")
            if dropped and num_shown < SHOWN:
                num_shown += 1
                print(f"note: left out of shard {shard}: {dropped_samples(dropped)}", file=sys.stderr, flush=True)
        if not found and not others:
            raise UserError(f"no pair can be read from {len(shards)} shards; {contents(shards[0])}")
        if not found:
            shards, others = others, ()


def shuffle(records: Iterator[Record], size: int, rng: random.Random) -> Iterator[Record]:
    """Draw each record among `size` that are held; 1 keeps the order."""
    held: list[Record] = []
    for record in records:
        if len(held) < size:
            held.append(record)
            continue
        place = rng.randrange(size)
        yield held[place]
        held[place] = record


class TarPairs(Dataset):
    """Pairs of shards, as {"image", "caption", "bad"}.

    `data.sampler.EpochSampler` reads it without shuffling: an index is the position of a process, and the pair comes
    from the stream of the worker that asks. An unreadable image is replaced by the pair before it.

    `names` are as for `expand`, `batch_size` is that of the loader, `num_pairs` the number in all shards together (0
    counts them), `buffer` the number of pairs among which each worker draws the next.
    """

    def __init__(self, names: Sequence[str], transform: Transform, batch_size: int, num_pairs: int, buffer: int):
        self.shards, self.transform = on_main_process(lambda: expand(names)), transform
        self.batch_size, self.buffer, self.seed = batch_size, max(buffer, 1), 0
        self.num_pairs = num_pairs or count_pairs(self.shards)
        if not self.num_pairs:
            raise UserError(f"no pair in {len(self.shards)} shards; {contents(self.shards[0])}")
        self.rank, self.world_size = get_rank(), get_world_size()
        self.records: Iterator[Record] = iter(())
        self.epoch, self.position = -1, 0  # of `records`
        self.recent, self.problems = deque[Record](maxlen=TRIES), list[str]()

    def __len__(self) -> int:
        return self.num_pairs

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """Return the pair at this worker's place in an epoch; UserError if shards are too few, or none is readable."""
        batch, within = divmod(index // self.world_size, self.batch_size)
        worker = get_worker_info()
        number = worker.num_workers if worker else 1  # a loader gives a worker every number-th batch
        self._seek(epoch, batch // number * self.batch_size + within, batch % number, number)
        self._advance()
        bad = self.problems.copy()
        self.problems.clear()
        for record in self.recent:
            try:
                with Image.open(io.BytesIO(record.image)) as image:
                    tensor = self.transform(to_rgb(image, self.transform.upright))
            except BAD_IMAGE as error:
                bad.append(f"{record.name}: {error}")
                continue
            return {"image": tensor, "caption": pre_caption(record.caption, MAX_WORDS), "bad": "\n".join(bad)}
        raise UserError(f"{len(bad)} images in a row cannot be read, the first being {bad[0]}; look at its shard")

    def _advance(self) -> None:
        self.recent.appendleft(next(self.records))
        self.position += 1

    def _seek(self, epoch: int, position: int, worker: int, num_workers: int) -> None:
        """Move to a position of an epoch, from the beginning of the epoch unless it comes next."""
        if (epoch, position) == (self.epoch, self.position):
            return
        reader, readers = self.rank * num_workers + worker, self.world_size * num_workers
        order = random.Random(f"shards/{self.seed}/{epoch}").sample(self.shards, len(self.shards))
        if self.buffer == 1:
            order = self.shards
        if len(order) < readers:
            raise UserError(
                f"{len(order)} shards for {readers} readers ({self.world_size} processes with {num_workers} workers "
                "each); lower num_workers, or write more and smaller shards"
            )
        others = [shard for number in range(1, readers) for shard in order[(reader + number) % readers :: readers]]
        rng = random.Random(f"buffer/{self.seed}/{epoch}/{reader}")
        records = read_in_turn(order[reader::readers], others, self.problems)
        self.records, self.epoch, self.position = shuffle(records, self.buffer, rng), epoch, 0
        self.recent.clear()
        while self.position < position:
            self._advance()
