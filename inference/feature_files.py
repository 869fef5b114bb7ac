"""Features on disk: appended row by row, continued after an interruption, and made one file at the end."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from files import to_json, why_not_written, write_whole
from inference.predictor import Row
from inference.results import begin, refuse_existing
from utils import UserError

MOST_NAMES = 50 << 20  # bytes of names in the header of a .safetensors file, which readers limit to 100 MB


class FeatureFile:
    """Features of named items, float32, in a .safetensors or .npy file.

    Until it is complete, `<output>.rows` holds the features, and `<output>.rows.jsonl` the items that are done, after
    the record of what makes them, as for `inference.results.begin`. A .safetensors file has "features" and "names" in
    its metadata; the names of a .npy file are in .names.json beside it.

    Raises UserError for another ending, an output that exists, or an interrupted run that had another record.
    """

    def __init__(
        self, output: Path, record: Row, items: Sequence[str], resume: bool = False, retry_failed: bool = False,
        overwrite: bool = False,
    ):  # fmt: skip
        if output.suffix not in (".safetensors", ".npy"):
            raise UserError(f"--output is {str(output)!r}; expected a file ending in .safetensors or .npy")
        if output.suffix == ".safetensors" and sum(map(len, items)) > MOST_NAMES:
            raise UserError(f"{len(items)} names do not fit into a .safetensors file; choose one ending in .npy")
        self.output, self.rows = output, output.with_name(f"{output.name}.rows")
        self.log = output.with_name(f"{output.name}.rows.jsonl")
        refuse_existing(str(output), False, overwrite)
        refuse_existing(str(self.log), resume, overwrite)
        self.done = begin(self.log, record, resume, retry_failed)
        self.names: list[str] = []  # of the features that are there, each of this shape
        self.shape: list[int] = []
        with open(self.log, encoding="utf-8") as file:
            for row in map(json.loads, file):
                if "shape" in row:
                    self.names.append(row["image"])
                    self.shape = row["shape"]
        size = len(self.names) * 4 * int(np.prod(self.shape))
        with open(self.rows, "ab") as file:
            if file.tell() < size:
                raise UserError(f"{self.rows} is shorter than {self.log} says; begin again with --overwrite")
            file.truncate(size)

    def write(self, rows: Iterable[Row]) -> None:
        """Append rows of {"image" or "text", "features"}, or with an "error"; raises UserError where it cannot."""
        try:
            with open(self.rows, "ab") as features, open(self.log, "a", encoding="utf-8") as log:
                for row in rows:
                    self._write_row(row, features, log)
        except OSError as error:
            raise UserError(why_not_written(self.rows, error)) from None

    def _write_row(self, row: Row, features: IO[bytes], log: IO[str]) -> None:
        name = row["image"] if "image" in row else row["text"]
        line: Row = {"image": name, "error": row["error"]} if "error" in row else {"image": name}
        if "error" not in row:
            values = np.ascontiguousarray(row["features"], np.dtype("<f4"))
            features.write(values.tobytes())
            features.flush()  # before the log, which is believed
            self.names.append(name)
            self.shape = line["shape"] = list(values.shape)
        print(to_json(line), file=log, flush=True)

    def finish(self) -> None:
        """Make the output of all rows; if it cannot be written, the rows are kept for --resume."""
        shape = (len(self.names), *self.shape)
        if self.output.suffix == ".npy":
            with write_whole(self.output.with_suffix(".names.json")) as file:
                file.write(to_json(self.names))
        with write_whole(self.output, "wb") as file, open(self.rows, "rb") as rows:
            if self.output.suffix == ".npy":
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            else:
                file.write(safetensors_header(shape, os.path.getsize(self.rows), {"names": to_json(self.names)}))
            shutil.copyfileobj(rows, file, 1 << 20)
        self.rows.unlink()
        self.log.unlink()


def safetensors_header(shape: Sequence[int], size: int, metadata: dict[str, str]) -> bytes:
    """Return the beginning of a .safetensors file of one tensor, "features", in float32."""
    tensor = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": metadata, "features": tensor}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
