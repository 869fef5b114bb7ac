"""Files, and objects of any store that fsspec knows, are written whole or not at all; a full disk is named."""

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from utils import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
ATOMIC = ("s3", "gs", "gcs", "abfs", "az", "hf")  # stores that show an object only when all of it has come
CLIENTS = ("aiohttp", "azure", "botocore", "gcsfs", "google", "huggingface_hub")  # their errors are no OSError


def is_address(name: str | Path) -> bool:
    """Return True for an address of a store that fsspec may know, such as s3://bucket/folder."""
    return isinstance(name, str) and ADDRESS.match(name) is not None


def open_store(address: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address or path, and the path in it; UserError if it is unknown."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UserError(f"{address} cannot be opened ({error}); install what this store needs") from None


@contextmanager
def open_to_read(name: str | Path) -> Iterator[IO[bytes]]:
    """Open a file or an address; what a store's client raises becomes an OSError."""
    if not is_address(name):
        with open(name, "rb") as file:
            yield file
        return
    store, path = open_store(name)
    try:
        with store.open(path, "rb") as file:
            yield file
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in CLIENTS:
            raise
        raise OSError(f"{type(error).__name__}: {error}") from None


@contextmanager
def write_to_store(address: str) -> Iterator[IO[bytes]]:
    """Open a local file that replaces the object at an address when it is whole; UserError if it cannot."""
    store, path = open_store(address)
    with tempfile.NamedTemporaryFile() as file:
        yield file
        file.flush()
        temporary = path if address.startswith(tuple(f"{kind}:" for kind in ATOMIC)) else f"{path}.part{os.getpid()}"
        try:
            store.put_file(file.name, temporary)
            if temporary != path:
                store.mv(temporary, path)
        except Exception as error:  # each store has errors of its own
            raise UserError(f"{address} could not be written ({type(error).__name__}: {error})") from None


@contextmanager
def write_whole(path: Path | str, mode: str = "w", shared: bool = False) -> Iterator[IO[Any]]:
    """Open a file ("w", in UTF-8, or "wb") under a temporary name; it replaces `path` when it is whole on the disk.

    `path` may be an address, as for `write_to_store`, with "wb"; its folder is made if it does not exist. If other
    processes may write the same file (`shared`), the temporary name has the process id, and the caller deletes what
    killed processes left. Otherwise the next write replaces it. UserError if it could not be written, for instance
    because the disk is full; an earlier file is unchanged.
    """
    if is_address(path):
        with write_to_store(path) as file:
            yield file
        return
    temporary = path.with_name(f"{path.name}.part{os.getpid() if shared else ''}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer hides a full disk behind a RuntimeError
        if isinstance(error, RuntimeError) and not disk_is_full(error):
            raise
        raise UserError(why_not_written(path, error)) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def append(path: Path, text: str) -> None:
    """Add text to the end of a file, whole or not at all."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, size)
        raise UserError(why_not_written(path, error)) from None


def write_json(path: Path, content: Any) -> Path:
    """Write a result file."""
    with write_whole(path) as file:
        file.write(to_json(content))
    return path


def to_json(content: Any) -> str:
    """Return JSON in UTF-8, or in ASCII where a text holds lone surrogates, which UTF-8 cannot encode."""
    text = json.dumps(content, ensure_ascii=False)
    return text if text.encode(errors="ignore").decode() == text else json.dumps(content)


def read_json(path: Path) -> Any:
    """Read a result file that `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[Any]:
    """Return the rows of a JSON-lines file that this project wrote."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def why_not_written(path: Path, error: BaseException) -> str:
    """Return the message for a file that could not be written."""
    kept = "the previous one is intact" if path.exists() else "nothing was left behind"
    reason = f"the disk is full: {to_free(path.parent)}" if disk_is_full(error) else " ".join(str(error).split())
    return f"{path} could not be written ({reason}; {kept})"


def to_free(folder: Path) -> str:
    """Return what to do where a disk is full."""
    return f"free space in {folder.absolute()}, then continue with --resume"


def disk_is_full(error: BaseException | None) -> bool:
    """Return True if an error comes from a full disk; torch's writer raises an error of its own after it."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__context__
    return False
