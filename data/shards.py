"""Pairs in tar shards, in webdataset's layout as img2dataset writes it, from disk or through a pipe.

Every data worker of every process reads shards of its own, one after the other, through a shuffle buffer. Which pairs
come in which order depends on the seed, the epoch and the number of readers only; a run that goes on in the middle of
a shard reads again, without decoding, what it has had.
"""

import glob
import io
import json
import random
import re
import subprocess
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from data.pretrain import MAX_WORDS, TRIES
from data.text import pre_caption
from data.transforms import BAD_IMAGE, Transform, to_rgb
from utils import UserError, get_rank, get_world_size, on_main_process, track

PIPE = "pipe:"
IMAGES = ("jpg", "jpeg", "png", "webp")
READ = (*IMAGES, "txt", "json")
LARGEST = 1 << 28  # bytes of a file in a shard
LONGEST_HEADER = 1 << 20  # bytes
LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)


@dataclass
class Record:
    """One sample as the shard holds it.

    Attributes:
        name: where it is from: shard and key, for messages.
        image: encoded.
        caption: its text.
        key: its files' common name.
        ending: the image's.
        facts: what its .json says.
    """

    name: str
    image: bytes
    caption: str
    key: str
    ending: str
    facts: dict[str, Any]


class _Header(tarfile.TarInfo):
    """A header of which a damaged one is an error, not the end of the archive, and a long one is not read."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        header = super().frombuf(buf, encoding, errors)
        if header.type in LONG_NAMES + PAX and not 0 <= header.size <= LONGEST_HEADER:
            raise tarfile.ReadError(f"a header says it has {header.size} bytes; expected at most {LONGEST_HEADER}")
        return header

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.InvalidHeaderError as error:
            raise tarfile.ReadError(f"{error}, or the file before it lies about its size") from None


def is_shard(name: str) -> bool:
    """Tell whether an entry of `train_file` or `pairs` names shards rather than a list."""
    return name.startswith(PIPE) or name.split("?")[0].endswith(".tar")


def only_shards(names: Sequence[str], setting: str) -> bool:
    """Tell whether the entries of a setting name shards or, all of them, lists.

    Raises:
        UserError: both.
    """
    found = [is_shard(name) for name in map(str, names)]
    if any(found) and not all(found):
        raise UserError(f"{setting} names both shards and lists; give one kind alone")
    return any(found)


def expand(names: Sequence[str], setting: str = "train_file") -> list[str]:
    """Return the shards that names stand for: `{00000..00131}` counts, `*` matches files; a pipe is a command each.

    Args:
        names: as a setting gives them.
        setting: which, for messages.

    Raises:
        UserError: nothing matches, or a file does not exist.
    """
    found: list[str] = []
    for name in names:
        counted = re.search(r"\{(\d+)\.\.(\d+)\}", name)
        if counted:
            first, last = counted.groups()
            numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
            found += expand([name[: counted.start()] + number + name[counted.end() :] for number in numbers], setting)
        elif name.startswith(PIPE):
            found.append(name)
        else:
            found += sorted(glob.glob(name)) or _missing(name, setting)
    return found


def _missing(name: str, setting: str) -> list[str]:
    raise UserError(f"shard {name} does not exist; correct {setting}")


@contextmanager
def open_shard(shard: str) -> Iterator[BinaryIO]:
    """Open a file, or run a command and read what it prints.

    Raises:
        OSError: the file cannot be read, or the command fails.
    """
    if not shard.startswith(PIPE):
        with open(shard, "rb") as file:
            yield file
        return
    with subprocess.Popen(shard.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE) as process:
        try:
            yield process.stdout
            process.stdout.read()  # the padding after the archive
        except tarfile.TarError:
            if process.stdout.read(1):  # there is more, so the archive is damaged; else the command may have failed
                process.kill()
                raise
            if not process.wait():
                raise
        except BaseException:  # the reader has had enough
            process.kill()
            raise
    if process.returncode:
        raise OSError(f"the command ended with {process.returncode}")


def read_shard(shard: str) -> Iterator[Record]:
    """Yield a shard's samples: files that follow each other and share their name up to the first dot.

    Raises:
        OSError: the shard is not there, or its command fails.
        tarfile.TarError: it is damaged, or ends early.
    """
    key, parts = "", {}
    with open_shard(shard) as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_Header) as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            if (name := f"{folder}/{stem}".strip("/")) != key:
                yield from _record(shard, key, parts)
                key, parts = name, {}
            if (ending := ending.lower()) in READ:
                parts[ending] = _content(tar, member)
        yield from _record(shard, key, parts)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return a file's bytes, if they are no more than an image may have."""
    if not 0 <= member.size <= LARGEST:
        raise tarfile.ReadError(f"{member.name} says it has {member.size} bytes; expected at most {LARGEST}")
    return tar.extractfile(member).read()


def _record(shard: str, key: str, parts: dict[str, bytes]) -> Iterator[Record]:
    """Yield the sample that its files make, if they hold an image and a text."""
    ending = next((ending for ending in IMAGES if ending in parts), "")
    facts = _facts(parts.get("json", b""))
    text = parts.get("txt", b"").decode("utf-8", "replace") or facts.get("caption")
    if ending and text and isinstance(text, str):
        yield Record(f"{shard}: {key}", parts[ending], text, key, ending, facts)


def _facts(text: bytes) -> dict[str, Any]:
    """Return what a .json says; nothing where it is not what it should be."""
    try:
        facts = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def count_pairs(shards: Sequence[str]) -> int:
    """Return how many pairs shards hold: by the `_stats.json` that img2dataset writes beside each, else by reading.

    What was read is noted in such files, so that it is read once.

    Raises:
        UserError: a shard is behind a pipe or cannot be read.
    """
    return on_main_process(lambda: sum(_count(shard) for shard in track(shards, "counting pairs of shards")))


def _count(shard: str) -> int:
    if shard.startswith(PIPE):
        raise UserError(f"how many pairs {shard!r} gives cannot be known; set shard_pairs to the number in all shards")
    stats = Path(shard.removesuffix(".tar") + "_stats.json")
    try:
        return int(json.loads(stats.read_text())["successes"])
    except (OSError, ValueError, KeyError):
        pass
    try:
        number = sum(1 for _ in read_shard(shard))
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"shard {shard} cannot be read ({error}); replace it or take it out") from None
    with suppress(OSError):  # where it may not be written the next run counts again
        stats.write_text(json.dumps({"successes": number}))
    return number


class Stream:
    """One reader's pairs of one epoch, in order, begun again when they are not enough.

    Args:
        shards: this reader's, at least one.
        buffer: pairs among which the next is drawn; 1 keeps the order.
        rng: of the buffer.
    """

    def __init__(self, shards: Sequence[str], buffer: int, rng: random.Random):
        self.shards, self.buffer, self.rng = shards, max(buffer, 1), rng
        self.problems: list[str] = []
        self.position = 0
        self.records = self._shuffled()

    def _in_order(self) -> Iterator[Record]:
        while True:
            found = 0
            for shard in self.shards:
                try:
                    for record in read_shard(shard):
                        found += 1
                        yield record
                except (OSError, tarfile.TarError, ValueError) as error:
                    self.problems.append(f"shard {shard} cannot be read to its end ({error})")
            if not found:
                raise UserError(f"no pair can be read from {len(self.shards)} shards, the first being {self.shards[0]}")

    def _shuffled(self) -> Iterator[Record]:
        held: list[Record] = []
        for record in self._in_order():
            if len(held) < self.buffer:
                held.append(record)
                continue
            place = self.rng.randrange(self.buffer)
            yield held[place]
            held[place] = record

    def next(self) -> Record:
        """Return the next pair."""
        self.position += 1
        return next(self.records)


class TarPairs(Dataset):
    """Pairs of shards, as {"image", "caption", "bad"}.

    It is read by `data.sampler.EpochSampler` without shuffling: an index says how far a process is, and the pair
    comes from the stream of the worker that asks. In place of an unreadable image comes the pair before it.

    Args:
        names: shards, as `expand` takes them.
        transform: of every image.
        batch_size: of the loader.
        num_pairs: of all shards together; 0 counts them.
        buffer: pairs among which each worker draws the next.
    """

    def __init__(self, names: Sequence[str], transform: Transform, batch_size: int, num_pairs: int, buffer: int):
        self.shards, self.transform = on_main_process(lambda: expand(names)), transform
        self.batch_size, self.buffer, self.seed = batch_size, buffer, 0
        self.num_pairs = num_pairs or count_pairs(self.shards)
        self.rank, self.world_size = get_rank(), get_world_size()
        self.stream: Stream | None = None
        self.epoch, self.recent = -1, deque[Record](maxlen=TRIES)

    def __len__(self) -> int:
        return self.num_pairs

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """Return the pair at this worker's place in an epoch.

        Raises:
            UserError: more readers than shards, or nothing readable.
        """
        batch, within = divmod(index // self.world_size, self.batch_size)
        worker = get_worker_info()
        number = worker.num_workers if worker else 1  # a loader gives a worker every number-th batch
        self._seek(epoch, batch // number * self.batch_size + within, batch % number, number)
        self.recent.appendleft(self.stream.next())
        bad, self.stream.problems = self.stream.problems, []
        for record in self.recent:
            try:
                with Image.open(io.BytesIO(record.image)) as image:
                    tensor = self.transform(to_rgb(image, self.transform.upright))
            except BAD_IMAGE as error:
                bad.append(f"{record.name}: {error}")
                continue
            return {"image": tensor, "caption": pre_caption(record.caption, MAX_WORDS), "bad": "\n".join(bad)}
        raise UserError(f"{len(bad)} images in a row cannot be read, the first being {bad[0]}; look at its shard")

    def _seek(self, epoch: int, position: int, worker: int, num_workers: int) -> None:
        """Stand before a position of an epoch, from the epoch's beginning if need be."""
        if self.stream is None or epoch != self.epoch or position != self.stream.position:
            self.stream, self.epoch = self._open(epoch, worker, num_workers), epoch
            self.recent.clear()
            for _ in range(position):
                self.recent.appendleft(self.stream.next())

    def _open(self, epoch: int, worker: int, num_workers: int) -> Stream:
        reader, readers = self.rank * num_workers + worker, self.world_size * num_workers
        order = random.Random(f"shards/{self.seed}/{epoch}").sample(self.shards, len(self.shards))
        if self.buffer <= 1:
            order = self.shards
        if len(order) < readers:
            raise UserError(
                f"{len(order)} shards for {readers} readers ({self.world_size} processes with {num_workers} workers "
                "each); lower num_workers, or write more and smaller shards"
            )
        return Stream(order[reader::readers], self.buffer, random.Random(f"buffer/{self.seed}/{epoch}/{reader}"))
