"""Captions as text files beside their images, as programs that train image generators read them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.images import is_url
from files import write_whole
from inference.predictor import Row
from utils import UserError


@dataclass(frozen=True)
class Sidecars:
    """Which text files are written, and how."""

    ending: str = ".txt"  # in place of the image's
    mode: str = "skip"  # leaves out images whose text file exists; or "overwrite", or "append"
    prefix: str = ""  # before each caption
    suffix: str = ""
    best_only: bool = False  # an image's first caption only, instead of one a line
    prompt: str = ""
    keep_prompt: bool = False  # before each caption, the image's own prompt if its row has one

    def path(self, image: str | Path) -> Path:
        """Return the text file of an image."""
        return Path(image).with_suffix("." + self.ending.lstrip("."))

    def left(self, images: Sequence[Path | str]) -> list[Path | str]:
        """Return the images that need a text file; raises UserError if two have the same one, or one is no file."""
        owners: dict[Path, str | Path] = {}
        for image in images:
            if is_url(str(image)):
                raise UserError(f"{image} has no folder for a text file; leave out --sidecar, or give files")
            other = owners.setdefault(self.path(image), image)
            if other != image:
                raise UserError(
                    f"{other} and {image} have the same text file {self.path(image)}; rename one of them, or "
                    "write --output captions.csv"
                )
        return [image for image in images if self.mode != "skip" or not self.path(image).is_file()]

    def texts(self, row: Row) -> list[str]:
        """Return the texts of a row of captions."""
        captions = row["captions"][:1] if self.best_only else row["captions"]
        prefix = self.prefix + (row.get("prompt", self.prompt) if self.keep_prompt else "")
        return [f"{prefix}{found['caption']}{self.suffix}" for found in captions]

    def write(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Write the text file of each row, as `files.write_whole`, and pass the row on."""
        for row in rows:
            if "error" not in row:
                path, lines = self.path(row["image"]), self.texts(row)
                if self.mode == "append" and path.is_file():
                    lines = [path.read_text(encoding="utf-8-sig").rstrip("\n"), *lines]
                with write_whole(path) as file:
                    file.write("\n".join(lines) + "\n")
            yield row
