"""Downloads: by one process at a time, continued where they broke off, under a temporary name until whole."""

import fcntl
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from files import disk_is_full
from utils import ProgressLine, UserError

CHUNK = 1 << 20
TIMEOUT_SECONDS = 30
TRIES = 5
PAUSE_SECONDS = 0.5  # before the second try; doubled before each further one
LEAST_BYTES_PER_SECOND = 1000
LARGEST_BYTES = 32 << 30  # of one file; the largest released checkpoint has a quarter of it
PATIENCE_SECONDS = 60  # how long a download may stay under the least speed
# What goes wrong with a server or an address: besides OSError, a malformed answer or address.
FAILURES = (OSError, http.client.HTTPException, ValueError)


def cache_folder() -> Path:
    """Return where downloads are kept: $BLIP_CACHE, or ~/.cache/blip."""
    return Path(os.environ.get("BLIP_CACHE", Path.home() / ".cache" / "blip"))


def cached(url: str, check: Callable[[Path], str] | None = None) -> Path:
    """Return the cached copy of a URL, downloading it the first time; `check` as in `fetch`."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{url.rstrip('/').split('/')[-1].split('?')[0]}"
    return fetch(url, cache_folder() / name, check=check)


def fetch(url: str, path: Path, sha256: str | None = None, check: Callable[[Path], str] | None = None) -> Path:
    """Download a file unless it is there.

    Args:
        url: http or https.
        path: where it goes; until it is whole it is called `<path>.part`, from which a later try continues.
        sha256: checksum it must have, in hexadecimal.
        check: looks at what came and says what is wrong with it, '' for nothing; such a file is not kept.

    Raises:
        UserError: it cannot be had; says why, and where to put the file by hand.
    """
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            if not path.is_file():
                _download(url, path, sha256, check)
    except FAILURES as error:
        if disk_is_full(error):
            where = path.parent.absolute()
            raise UserError(f"{path} could not be written (the disk is full: free space in {where})") from None
        raise UserError(
            f"{url} could not be downloaded ({_reason(error)}); get it elsewhere and put it at {path}"
        ) from None
    return path


def _reason(error: BaseException) -> str:
    """Say in one line why."""
    reason = " ".join(str(getattr(error, "reason", None) or error).split())
    return f"malformed answer: {reason}" if isinstance(error, http.client.HTTPException) else reason


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process of the machine in at a time."""
    with open(path.with_name(path.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(url: str, path: Path, sha256: str | None, check: Callable[[Path], str] | None) -> None:
    part = path.with_name(path.name + ".part")
    for attempt in range(TRIES):
        try:
            _continue(url, part)
            break
        except urllib.error.HTTPError as error:
            if error.code == 416:  # what is there is already all, or more than all: begin anew
                part.unlink(missing_ok=True)
            if error.code in (401, 403, 404) or attempt == TRIES - 1:
                raise OSError(f"the server answered {error.code} {error.reason}") from None
        except FAILURES as error:
            if attempt == TRIES - 1 or isinstance(error, ValueError) or disk_is_full(error):
                raise
        time.sleep(PAUSE_SECONDS * 2**attempt)
    if sha256 and _sha256(part) != sha256:
        part.unlink()
        raise OSError("its checksum is wrong, so it is not the file it should be")
    if check and (problem := check(part)):
        part.unlink()
        raise OSError(f"what came {problem}")
    os.replace(part, path)
    _version_file(part).unlink(missing_ok=True)


def _version_file(part: Path) -> Path:
    """Where the server's tag of a half-read file is kept, so that halves of two versions are never joined."""
    return part.with_name(part.name + ".etag")


def _continue(url: str, part: Path) -> None:
    """Read what is missing of a file; raises one of FAILURES when the connection breaks or crawls."""
    have = part.stat().st_size if part.is_file() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and _version_file(part).is_file():
        headers["If-Range"] = _version_file(part).read_text()
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS) as response:
        if response.status != 206:  # the server sends the whole
            have = 0
            _note_version(part, response.headers.get("ETag") or "")
        rest = response.headers.get("Content-Length")
        total = have + int(rest) if rest else 0
        if total > LARGEST_BYTES:
            raise ValueError(f"it would have {total} bytes, and no file may have more than {LARGEST_BYTES}")
        if total - have > (free := shutil.disk_usage(part.parent).free):
            raise ValueError(f"{total - have} bytes are missing and the disk has {free} free; free space")
        line = ProgressLine(total, f"downloading {url.split('/')[-1]}, bytes")
        have = _receive(response, part, have, line)
    if total and have < total:
        raise OSError(f"the connection broke after {have} of {total} bytes")


def _note_version(part: Path, tag: str) -> None:
    if tag and not tag.startswith("W/"):  # a weak tag does not promise the same bytes
        _version_file(part).write_text(tag)
    else:
        _version_file(part).unlink(missing_ok=True)


def _receive(response: http.client.HTTPResponse, part: Path, have: int, line: ProgressLine) -> int:
    """Write an answer's body behind the first `have` bytes of a file; return how many there are then."""
    first = checked = have
    since = time.monotonic()
    with open(part, "ab" if have else "wb") as file:
        while chunk := response.read1(CHUNK):  # what has come, where `read` would wait for a whole chunk
            file.write(chunk)
            have += len(chunk)
            if have > LARGEST_BYTES:  # the server has not said how much it sends, and does not end
                part.unlink()
                raise ValueError(f"it does not end: more than {LARGEST_BYTES} bytes came")
            if line.total:  # else the server has not said how much it sends
                line.update(have, first=first)
            seconds = time.monotonic() - since
            if seconds > PATIENCE_SECONDS:
                if (have - checked) / seconds < LEAST_BYTES_PER_SECOND:
                    raise OSError(f"slower than {LEAST_BYTES_PER_SECOND} bytes per second")
                since, checked = time.monotonic(), have
    line.close()
    return have


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
