"""Convert annotation files of COCO, Karpathy, VQA v2, NLVR2, nocaps and Flickr30k to the rows that training reads.

    python -m data.convert dataset_coco.json --output annotation
    python -m data.convert v2_OpenEnded_mscoco_val2014_questions.json v2_mscoco_val2014_annotations.json --output vqa

The new files are written into the folder --output, and their paths are printed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from data.annotations import read_text
from data.publishers import convert
from files import write_json
from utils import UserError, run_command

PREFIX = """folder of the images under image_root (default: the publisher's); of VQA v2 also their names, with a place
for the number: images/{:07d}.jpg"""


def read_published(path: Path) -> Any:
    """Return a parsed JSON file, the rows of a JSON lines file, or the text of another file."""
    text = read_text(path)
    for parse in (json.loads, lambda text: [json.loads(line) for line in text.split("\n") if line.strip()]):
        try:
            return parse(text)
        except (ValueError, RecursionError):
            continue
    return text


def write_tables(paths: list[Path], output: Path, prefix: str | None = None, overwrite: bool = False) -> list[Path]:
    """Convert publishers' files as `convert`, write the tables into the folder `output`, and return their paths.

    UserError for an unknown format, an existing file, or a folder that cannot be written.
    """
    _, tables = convert([read_published(path) for path in paths], prefix)
    files = {output / f"{name or paths[0].stem}.json": content for name, content in tables.items()}
    for path in files:
        if path.exists() and (not overwrite or path.resolve() in [p.resolve() for p in paths]):
            raise UserError(f"{path} exists; choose another --output folder, or replace it with --overwrite")
    return [write_json(path, content) for path, content in files.items()]


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="file to convert; for VQA v2 questions and annotations")
    parser.add_argument("--output", type=Path, default=Path("annotation"), help="folder to write (default: annotation)")
    parser.add_argument("--image_prefix", help=PREFIX)
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args()
    for path in write_tables(args.files, args.output, args.image_prefix, args.overwrite):
        print(path)


if __name__ == "__main__":
    sys.exit(run_command(main))
