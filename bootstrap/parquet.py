"""The bootstrapped set in Parquet: a row for each image, with its texts and their scores."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from PIL import Image

from bootstrap.shards import Row
from bootstrap.tars import Sample, TarOutput, Write
from utils import UserError


class ParquetOutput(TarOutput):
    """Parquet files of the bootstrapped set, one for each shard of the input.

    Columns: "image" (its path in a list; null for shards), "key", "url", "sha256", "width", "height", the texts "web"
    and "synthetic" with their probabilities "web_scores" and "synthetic_scores" (empty without a filter), and
    "caption", the texts that are kept. A file made from lists is itself a list for `pretrain.py`.
    """

    ending = ".parquet"

    @contextmanager
    def writer(self, file: IO[bytes], shard: int) -> Iterator[Write]:
        """Write the images of a shard to its file."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError("parquet: true needs pyarrow; pip install pyarrow, or parquet: false") from None
        texts, scores = pyarrow.list_(pyarrow.string()), pyarrow.list_(pyarrow.float32())
        kinds = dict.fromkeys(("image", "key", "url", "sha256"), pyarrow.string())
        kinds |= dict.fromkeys(("width", "height"), pyarrow.int32())
        kinds |= {"web": texts, "web_scores": scores, "synthetic": texts, "synthetic_scores": scores, "caption": texts}
        schema = pyarrow.schema(kinds)
        with pyarrow.parquet.ParquetWriter(file, schema) as table:

            def write(samples: Sequence[Sample], rows: Sequence[Row]) -> None:
                """Add a group of rows."""
                found = image_rows(samples, rows)
                if found:
                    table.write_table(pyarrow.Table.from_pylist(found, schema))

            yield write


def image_rows(samples: Sequence[Sample], rows: Sequence[Row]) -> list[Row]:
    """Return a row for each image that could be read, from its texts' rows."""
    own: dict[str, list[Row]] = {}
    for row in rows:
        if "error" not in row:
            own.setdefault(row["image"], []).append(row)
    return [_image_row(sample, own[sample.name]) for sample in samples if sample.name in own]


def _image_row(sample: Sample, rows: list[Row]) -> dict[str, Any]:
    content = sample.image if isinstance(sample.image, bytes) else sample.image.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
    found: dict[str, Any] = {"sha256": hashlib.sha256(content).hexdigest(), "width": width, "height": height}
    if sample.record:
        found |= {"key": sample.record.key, "url": sample.record.facts.get("url")}
    else:
        found |= {"key": sample.name, "image": sample.name}
    for source in ("web", "synthetic"):
        of_source = [row for row in rows if row["source"] == source]
        found[source] = [row["caption"] for row in of_source]
        found[f"{source}_scores"] = [row["probability"] for row in of_source if "probability" in row]
    return found | {"caption": [row["caption"] for row in rows if row["kept"]]}
