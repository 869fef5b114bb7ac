"""Tar shards in webdataset's layout, as img2dataset writes it: named, opened, and read sample by sample."""

import bz2
import glob
import gzip
import json
import lzma
import os
import re
import subprocess
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from data.parquet import PARQUET, has_images, read_samples
from data.text import is_blank
from data.transforms import IMAGE_ENDINGS
from files import is_address, open_store, open_to_read
from utils import UserError, note

PIPE = "pipe:"
IMAGES = tuple(ending[1:] for ending in IMAGE_ENDINGS)
READ = (*IMAGES, "txt", "json")
OPENERS = {
    ".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".tbz2": bz2.open, ".xz": lzma.open, ".txz": lzma.open
}  # fmt: skip
SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
COMMANDS = {".tar.zst": "zstd -dc", ".tar.lz4": "lz4 -dc", ".tar.lzma": "xz -dc", ".tar.Z": "gzip -dc"}
REMOTE = {"http": "curl -sfL", "https": "curl -sfL", "s3": "aws s3 cp", "gs": "gsutil cat", "hdfs": "hdfs dfs -cat"}
COUNTS = re.compile(r"\{(\d+)\.\.(\d+)\}")
BRACES = re.compile(COUNTS.pattern + r"|\{([^{}]*,[^{}]*)\}")
EXPECTED = "an image (.jpg, .png, ...) and a text (.txt, or \"caption\" in .json) under one name, one after the other"
LARGEST = 1 << 28  # bytes of a file in a shard
LONGEST_HEADER = 1 << 20  # bytes
LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)


@dataclass
class Record:
    """One sample of a shard."""

    name: str  # shard and key, for messages
    image: bytes  # encoded
    caption: str
    key: str  # common name of its files
    ending: str  # of the image
    facts: dict[str, Any]  # content of its .json


class _Header(tarfile.TarInfo):
    """A header that raises an error if it is damaged, instead of ending the archive, or if it is too long."""

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


def is_shard(name: str, setting: str = "train_file") -> bool:
    """Return True if an entry of a setting is a shard, several or a folder of them, and not a list."""
    plain = name.split("?")[0]
    if plain.endswith(PARQUET):
        return has_images(next(_expand(name, setting)))
    return name.startswith(PIPE) or plain.endswith((*SHARD_ENDINGS, *COMMANDS)) or os.path.isdir(name)


def only_shards(names: Sequence[str], setting: str) -> bool:
    """Return True if all entries of a setting are shards, False if all are lists; UserError for both kinds."""
    found = [is_shard(name, setting) for name in map(str, names)]
    if any(found) and not all(found):
        raise UserError(f"{setting} names both shards and lists; give one kind alone")
    return any(found)


def expand(names: Sequence[str], setting: str = "train_file") -> list[str]:
    """Return the shards that the names in a setting stand for, each once.

    `{00000..00131}` counts, `{a,b}` and `::` list, `*` matches files, a folder stands for the shards in it; a pipe is a
    command, in which only `{00000..00131}` is expanded. UserError if nothing matches, a file does not exist, or it can
    only be read through a pipe.
    """
    found = [shard for name in names for shard in _expand(str(name), setting)]
    shards = list(dict.fromkeys(found))
    if len(shards) < len(found):
        note(f"{setting} names {len(found) - len(shards)} shards twice; each is read once")
    return shards


def _expand(name: str, setting: str) -> Iterator[str]:
    pipe = name.startswith(PIPE)
    if "::" in name and not pipe:
        for part in filter(None, name.split("::")):
            yield from _expand(part, setting)
    elif not os.path.exists(name) and (braces := (COUNTS if pipe else BRACES).search(name)):
        for choice in _choices(*braces.groups()):
            yield from _expand(name[: braces.start()] + choice + name[braces.end() :], setting)
    elif pipe:
        yield name
    else:
        yield from _files(name, setting)


def _choices(first: str, last: str, listed: str = "") -> list[str]:
    if listed:
        return listed.split(",")
    start, end = int(first), int(last)
    step = 1 if start <= end else -1
    return [str(number).zfill(len(first)) for number in range(start, end + step, step)]


def _files(name: str, setting: str) -> list[str]:
    if is_address(name):
        return _objects(name, setting)
    if ending := next((ending for ending in COMMANDS if name.endswith(ending)), ""):  # Python's tarfile cannot read it
        raise UserError(
            f"shard {name} is compressed as {ending}; read it in {setting} with 'pipe:{COMMANDS[ending]} {name}'"
        )
    if os.path.isfile(name):
        return [name]
    if os.path.isdir(name):
        children = sorted(child for child in os.listdir(name) if not child.startswith("."))
        tars = [child for child in children if child.endswith(SHARD_ENDINGS)]
        found = [os.path.join(name, child) for child in tars or children if child.endswith((*SHARD_ENDINGS, PARQUET))]
        if not found:
            raise UserError(f"folder {name} holds no shard ({', '.join(SHARD_ENDINGS)}); correct {setting}")
        return found
    found = sorted(glob.glob(name))
    if not found:
        raise UserError(f"shard {name} does not exist; correct {setting}")
    return found


def _objects(name: str, setting: str) -> list[str]:
    """Return the shards at an address, which may have a *."""
    scheme = name.partition("://")[0]
    try:
        store, path = open_store(name)
    except UserError as error:
        pipe = f"pipe:{REMOTE.get(scheme, 'curl -sfL')} {name}{' -' if scheme == 's3' else ''}"
        raise UserError(f"shard {error}, or read it in {setting} with {pipe!r}") from None
    if "*" not in name:
        return [name]
    found = [store.unstrip_protocol(child) for child in sorted(store.glob(path))]
    if not found:
        raise UserError(f"shard {name} does not exist; correct {setting}")
    return found


@contextmanager
def _open_shard(shard: str) -> Iterator[BinaryIO]:
    """Open a file, or run a command and read what it prints."""
    if not shard.startswith(PIPE):
        # tarfile's own decompression takes a truncated file for a whole one
        opener = next((opener for ending, opener in OPENERS.items() if shard.endswith(ending)), None)
        with open_to_read(shard) as file:
            yield opener(file, "rb") if opener else file
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


def read_shard(shard: str, dropped: Counter[str] | None = None) -> Iterator[Record]:
    """Yield a shard's samples: files that follow each other and share their name up to the first dot.

    `dropped` counts samples that are left out, by reason. OSError if the shard does not exist or its command or store
    fails, tarfile.TarError if it is damaged or ends early.
    """
    dropped = Counter() if dropped is None else dropped
    if shard.endswith(PARQUET):
        for key, ending, image, text, facts in read_samples(shard, dropped):
            yield Record(f"{shard}: {key}", image, text, key, ending, facts)
        return
    key, parts = "", {}
    with _open_tar(shard) as tar:
        for member, name, ending in _named(tar):
            if name != key or ending in parts:  # archives that were joined may repeat one name
                yield from _record(shard, key, parts, dropped)
                key, parts = name, {}
            if ending in READ and not 0 <= member.size <= LARGEST:
                problem = f"{member.name} says it has {member.size} bytes; expected at most {LARGEST}"
                raise tarfile.ReadError(problem)
            parts[ending] = tar.extractfile(member).read() if ending in READ else b""
        yield from _record(shard, key, parts, dropped)


@contextmanager
def _open_tar(shard: str) -> Iterator[tarfile.TarFile]:
    try:
        with _open_shard(shard) as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_Header) as tar:
            yield tar
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise tarfile.ReadError(f"the compressed data are damaged: {error}") from None


def _named(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Yield headers, names up to the first dot, and endings, without the hidden files that some systems add."""
    for member in tar:
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        if member.isfile() and stem and "__MACOSX" not in folder.split("/"):
            yield member, f"{folder}/{stem}".strip("/"), ending.lower()


def _record(shard: str, key: str, parts: dict[str, bytes], dropped: Counter[str]) -> Iterator[Record]:
    """Yield the sample made of files, if they hold an image and a text; count it as dropped otherwise."""
    ending = next((ending for ending in IMAGES if ending in parts), "")
    facts = _facts(parts.get("json", b""))
    try:
        text = parts.get("txt", b"").decode("utf-8-sig") or facts.get("caption")
    except UnicodeDecodeError:
        dropped["with a text that is not UTF-8"] += 1
        return
    if ending and isinstance(text, str) and not is_blank(text):
        yield Record(f"{shard}: {key}", parts[ending], text, key, ending, facts)
    elif parts:
        others = "".join(f" .{other}" for other in sorted(parts) if other not in READ)
        dropped["without text" if ending else f"without image (with{others})" if others else "without image"] += 1


def _facts(text: bytes) -> dict[str, Any]:
    """Return the content of a .json file; nothing if it is no object."""
    try:
        facts = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def dropped_samples(dropped: Counter[str]) -> str:
    """Return the samples that are left out, by reason, as text."""
    reasons = dropped.most_common(4)
    more = dropped.total() - sum(count for _, count in reasons)
    return ", ".join([f"{count} {reason}" for reason, count in reasons] + ([f"{more} others"] if more else []))


def contents(shard: str) -> str:
    """Return what a shard without a readable pair holds, and what was expected."""
    endings: Counter[str] = Counter()
    try:
        with _open_tar(shard) as tar:
            endings.update(f".{ending}" if ending else "no ending" for _, _, ending in _named(tar))
    except (OSError, tarfile.TarError, ValueError) as error:
        return f"{shard} cannot be read to its end ({error})"
    found = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(6)) or "no file"
    return f"{shard} holds {found}; expected {EXPECTED}"
