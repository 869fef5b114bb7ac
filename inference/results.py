"""Result rows of a command: written as they come, and continued after an interruption.

A file of JSON lines begins with a record of what made it: {"made_by": {"command", "weights", settings}}.
"""

import csv
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from files import write_whole
from inference.predictor import Row
from utils import ProgressLine, UserError, note

SHOWN_ERRORS = 5
CHOOSE = "choose another --output"
RESULT_OF = {"caption": "captions", "vqa": "answers", "match": "matches"}  # the key of a command's rows


def refuse_existing(output: str, continued: bool, overwrite: bool) -> None:
    """Raise UserError for an output that has content, and is neither continued nor to be replaced."""
    if output and not continued and not overwrite and Path(output).is_file() and Path(output).stat().st_size:
        raise UserError(f"{output} exists; continue it with --resume, replace it with --overwrite, or {CHOOSE}")


def begin(output: Path, record: Row, resume: bool = False, retry_failed: bool = False) -> set[str]:
    """Begin a file of JSON lines, or continue one; return the names of the images that it has.

    Args:
        output: the file.
        record: what makes it: "command", and all that the rows depend on.
        resume: continue a file with the same record; a last line cut off by a kill is removed.
        retry_failed: remove the rows of images that failed, so that they are tried again.

    Raises:
        UserError: it was made by something else, or it cannot be written.
    """
    record = json.loads(json.dumps(record))
    if not resume or not output.is_file() or not output.stat().st_size:
        with write_whole(output) as file:
            file.write(json.dumps({"made_by": record}) + "\n")
        return set()
    done, end, failed = set(), 0, False
    with open(output, "rb") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            try:
                row = json.loads(line)
            except ValueError:
                row = {}
            if not isinstance(row, dict) or not row.keys() & {"image", "made_by"}:
                raise UserError(f"{output} holds no results of this command; {CHOOSE}")
            if number == 0:
                _check_record(output, row, record)
            if "image" in row and not (retry_failed and "error" in row):
                done.add(row["image"])
            failed |= "error" in row
    os.truncate(output, end)
    if retry_failed and failed:
        with open(output, encoding="utf-8") as old, write_whole(output) as new:
            new.writelines(line for line in old if "error" not in json.loads(line))
    return done


def digest_of(texts: Sequence[str]) -> str:
    """Return a hash of texts, "" for none: what a record keeps of a long list."""
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).hexdigest() if texts else ""


def _check_record(output: Path, first: Row, record: Row) -> None:
    """Refuse a file whose first row, its record, differs from the one given; older files have none."""
    if "made_by" not in first:
        if "error" not in first and RESULT_OF.get(record["command"]) not in first:
            raise UserError(f"{output} holds results of another command; {CHOOSE}")
        note(f"{output} has no record of its settings; they are taken to be the same")
        return
    old = first["made_by"]
    changed = sorted(key for key in {*old, *record} if old.get(key) != record.get(key))
    if changed:
        raise UserError(
            f"{output} was made with other settings ({', '.join(changed)}); restore them, {CHOOSE}, or replace it "
            "with --overwrite"
        )


class Rows:
    """Rows that are passed on; those with an error are kept. With a title a progress line counts them."""

    def __init__(self, rows: Iterable[Row], total: int, title: str = ""):
        self.rows, self.total, self.title = rows, total, title
        self.failed: list[Row] = []

    def __iter__(self) -> Iterator[Row]:
        line, start = ProgressLine(self.total, self.title), time.monotonic()
        for done, row in enumerate(self.rows, 1):
            if "error" in row:
                self.failed.append(row)
            yield row
            if self.title:
                line.update(done, f"{done / (time.monotonic() - start):.2f} images/s")
        line.close()


def report(failed: Sequence[Row], total: int) -> None:
    """Print the first errors and their number; raises UserError if all of the rows have one."""
    for row in failed[:SHOWN_ERRORS]:
        print(row["error"], file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {total} images could not be used", file=sys.stderr)
    if failed and len(failed) >= total:
        raise UserError("no image could be used; the reasons are above")


def write_results(
    rows: Iterable[Row], output: str, append: bool = False, texts_of: Callable[[Row], list[str]] | None = None
) -> None:
    """Write rows, each as it comes, to a file of JSON lines or .csv, or to standard output ("").

    `texts_of` gives a row's captions for a .csv. Raises UserError for an output that cannot be written.
    """
    try:
        if output.endswith(".csv") and texts_of:
            with write_whole(Path(output)) as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(("image", "caption"))
                for row in rows:
                    writer.writerows((row["image"], text) for text in ([] if "error" in row else texts_of(row)))
            return
        if output:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
        with open(output, "a" if append else "w", encoding="utf-8") if output else nullcontext(sys.stdout) as file:
            for row in rows:
                print(json.dumps(row), file=file, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = output or "standard output"
        raise UserError(f"{where} could not be written ({error.strerror}); free space or {CHOOSE}") from None
