"""Files are written whole or not at all; after a full disk, one line says where to free space."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from utils import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def write_whole(path: Path, mode: str = "w", shared: bool = False) -> Iterator[IO[Any]]:
    """Open a file ("w", in UTF-8, or "wb") under a temporary name; it replaces `path` when it is whole on the disk.

    If other processes may write the same file (`shared`), the temporary name has the process id, and the caller deletes
    what killed processes left. Otherwise the next write replaces it.

    Raises:
        UserError: it could not be written, for instance because the disk is full; an earlier file is unchanged.
    """
    temporary = path.with_name(f"{path.name}.part{os.getpid() if shared else ''}")
    try:
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(why_not_written(path, error)) from None
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
