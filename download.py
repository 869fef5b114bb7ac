"""Downloads: by one process at a time, continued where they broke off, under a temporary name until whole."""

import fcntl
import hashlib
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import ProgressLine, UserError

CHUNK = 1 << 20
TIMEOUT_SECONDS = 30
TRIES = 5
LEAST_BYTES_PER_SECOND = 1000
PATIENCE_SECONDS = 60  # how long a download may stay under the least speed


def cache_folder() -> Path:
    """Return where downloads are kept: $BLIP_CACHE, or ~/.cache/blip."""
    return Path(os.environ.get("BLIP_CACHE", Path.home() / ".cache" / "blip"))


def cached(url: str) -> Path:
    """Return the cached copy of a URL, downloading it the first time."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{url.rstrip('/').split('/')[-1].split('?')[0]}"
    return fetch(url, cache_folder() / name)


def fetch(url: str, path: Path, sha256: str | None = None) -> Path:
    """Download a file unless it is there.

    Args:
        url: http or https.
        path: where it goes; until it is whole it is called `<path>.part`, from which a later try continues.
        sha256: checksum it must have, in hexadecimal.

    Raises:
        UserError: it cannot be had; says why, and where to put the file by hand.
    """
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            if not path.is_file():
                _download(url, path, sha256)
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or str(error)
        raise UserError(f"{url} could not be downloaded ({reason}); get it elsewhere and put it at {path}") from None
    return path


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process of the machine in at a time."""
    with open(path.with_name(path.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(url: str, path: Path, sha256: str | None) -> None:
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
        except OSError:
            if attempt == TRIES - 1:
                raise
        time.sleep(min(2**attempt, 10) * 0.2)
    if sha256 and _sha256(part) != sha256:
        part.unlink()
        raise OSError("its checksum is wrong, so it is not the file it should be")
    os.replace(part, path)


def _continue(url: str, part: Path) -> None:
    """Read what is missing of a file; raises OSError when the connection breaks or crawls."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        if response.status != 206:  # the server sends the whole
            have = 0
        rest = response.headers.get("Content-Length")
        total = have + int(rest) if rest else 0
        line = ProgressLine(total or 1, f"downloading {url.split('/')[-1]}, bytes")
        began, first = time.monotonic(), have
        with open(part, "ab" if have else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                line.update(have, first=first)
                seconds = time.monotonic() - began
                if seconds > PATIENCE_SECONDS and (have - first) / seconds < LEAST_BYTES_PER_SECOND:
                    raise OSError(f"slower than {LEAST_BYTES_PER_SECOND} bytes per second")
        line.close()
    if total and have < total:
        raise OSError(f"the connection broke after {have} of {total} bytes")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
