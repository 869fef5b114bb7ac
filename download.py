"""Downloads: by one process at a time, continued after a break, under a temporary name until whole."""

import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from files import disk_is_full
from utils import ProgressLine, UserError

CHUNK = 1 << 20
TIMEOUT_SECONDS = 30
TRIES = 5
PAUSE_SECONDS = 0.5  # before the second try; doubled before each further one
LEAST_BYTES_PER_SECOND = 1000
LARGEST_BYTES = 32 << 30  # of one file; four times the largest released checkpoint
PATIENCE_SECONDS = 60  # time that a download may stay below the least speed
# Errors of a server or an address: besides OSError, a malformed answer or address.
FAILURES = (OSError, http.client.HTTPException, ValueError)


def cache_folder() -> Path:
    """Return where downloads are kept: $BLIP_CACHE, or ~/.cache/blip."""
    return Path(os.environ.get("BLIP_CACHE", Path.home() / ".cache" / "blip"))


def cached(url: str, check: Callable[[Path], str] | None = None) -> Path:
    """Return the cached copy of a URL, downloading it the first time; `check` as in `fetch`."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{url.rstrip('/').split('/')[-1].split('?')[0]}"
    return fetch(url, cache_folder() / name, check=check)


def fetch(url: str, path: Path, check: Callable[[Path], str] | None = None) -> Path:
    """Download a file unless it exists; one process or thread at a time.

    A partial download is called `<path>.part`, and a later call continues it. `check` returns what is wrong with a
    downloaded file, '' for nothing; a wrong file is deleted. UserError if the download failed; the message has the
    reason, and the path for a file from elsewhere.
    """
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                _download(url, path, check)
    except FAILURES as error:
        if disk_is_full(error):
            where = path.parent.absolute()
            raise UserError(f"{path} could not be written (the disk is full: free space in {where})") from None
        malformed = "malformed answer: " if isinstance(error, http.client.HTTPException) else ""
        reason = malformed + " ".join(str(getattr(error, "reason", None) or error).split())
        raise UserError(f"{url} could not be downloaded ({reason}); get it elsewhere and put it at {path}") from None
    return path


def _download(url: str, path: Path, check: Callable[[Path], str] | None) -> None:
    part = path.with_name(path.name + ".part")
    version = part.with_name(part.name + ".etag")
    for attempt in range(TRIES):
        try:
            _continue(url, part, version)
            break
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the partial file is complete, or longer than the server's: begin anew
                part.unlink(missing_ok=True)
            if error.code in (401, 403, 404) or attempt == TRIES - 1:
                raise OSError(f"the server answered {error.code} {error.reason}") from None
        except FAILURES as error:
            if attempt == TRIES - 1 or isinstance(error, ValueError) or disk_is_full(error):
                raise
        time.sleep(PAUSE_SECONDS * 2**attempt)
    if check and (problem := check(part)):
        part.unlink()
        raise OSError(f"what came {problem}")
    os.replace(part, path)
    version.unlink(missing_ok=True)


def _continue(url: str, part: Path, version: Path) -> None:
    """Download the rest of a file; raises one of FAILURES when the connection breaks or crawls.

    The file `version` holds the server's tag or time of the partial file, without which the download begins anew, so
    that parts of two versions are never joined.
    """
    have = part.stat().st_size if part.is_file() and version.is_file() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": version.read_text(encoding="utf-8")} if have else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS) as response:
        if response.status != 206:  # the server sends the whole
            have = 0
            version.unlink(missing_ok=True)
            tag = response.headers.get("ETag", "W/")
            if tag.startswith("W/"):  # a weak tag does not promise the same bytes
                tag = response.headers.get("Last-Modified", "")
            if tag:
                version.write_text(tag, encoding="utf-8")
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


def _receive(response: http.client.HTTPResponse, part: Path, have: int, line: ProgressLine) -> int:
    """Write a response's body behind the first `have` bytes of a file; return the new size in bytes."""
    first = checked = have
    since = time.monotonic()
    with open(part, "ab" if have else "wb") as file:
        while chunk := response.read1(CHUNK):  # at once; `read` would wait for a whole chunk
            file.write(chunk)
            have += len(chunk)
            if have > LARGEST_BYTES:  # only if the server has not announced a size
                part.unlink()
                raise ValueError(f"it does not end: more than {LARGEST_BYTES} bytes came")
            if line.total:  # 0 if the server has not announced a size
                line.update(have, first=first)
            if (seconds := time.monotonic() - since) > PATIENCE_SECONDS:
                if (have - checked) / seconds < LEAST_BYTES_PER_SECOND:
                    raise OSError(f"slower than {LEAST_BYTES_PER_SECOND} bytes per second")
                since, checked = time.monotonic(), have
    line.close()
    return have
