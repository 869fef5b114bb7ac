"""Images, with or without a text, to classify: SNLI-VE's format, or a folder of images for each class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from data.annotations import check_images, entry_error, read_annotation
from data.text import pre_caption
from data.transforms import IMAGE_ENDINGS, Transform
from utils import UserError, short_repr


class Classified(Dataset):
    """Examples of classes: {"image", "text", "label"}; the label is the number of the class."""

    def __init__(self, rows: Sequence[tuple[Path, str, int]], transform: Transform):
        self.rows, self.transform = list(rows), transform

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, index: int) -> Path:
        """Return the path of an image."""
        return self.rows[index][0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, text, label = self.rows[index]
        return {"image": self.transform.read(path), "text": text, "label": label}


def read_pairs(
    annotation_file: str | Path, image_root: str | Path, classes: Sequence[str]
) -> list[tuple[Path, str, int]]:
    """Read pairs of an image and a sentence in SNLI-VE's format.

    Rows are {"image": path with or without .jpg, "sentence", "label": name of a class}; `classes` are the names in the
    order of their numbers. UserError for a bad row, a label that is no class, or missing images.
    """
    rows = []
    for number, row in enumerate(read_annotation(annotation_file, ("image", "sentence", "label"))):
        label = str(row["label"])  # JSON may have a number
        if label not in classes:
            expected = f"expected one of {', '.join(classes)} (classes in the config)"
            raise entry_error(f"label is {short_repr(row['label'])}; {expected}", annotation_file, number)
        name = row["image"] if Path(row["image"]).suffix.lower() in IMAGE_ENDINGS else f"{row['image']}.jpg"
        rows.append((name, pre_caption(row["sentence"]), list(classes).index(label)))
    check_images(image_root, (name for name, _, _ in rows), annotation_file)
    return [(Path(image_root) / name, text, label) for name, text, label in rows]


def read_folder(folder: str | Path, classes: Sequence[str], text: str = "") -> list[tuple[Path, str, int]]:
    """List the images of a folder with one subfolder for each of `classes` and no other; all images get one text."""
    rows = []
    for label, name in enumerate(classes):
        subfolder = Path(folder) / name
        found = sorted(path for path in subfolder.glob("*") if path.suffix.lower() in IMAGE_ENDINGS)
        if not found:
            raise UserError(f"class folder {subfolder} holds no image; correct its name, or classes in the config")
        rows += [(path, text, label) for path in found]
    if others := [name for name in class_names(folder) if name not in classes]:
        problem = f"holds {len(others)} folders that are no class, such as {others[0]}"
        raise UserError(f"{folder} {problem}; add them to classes in the config, or take them out")
    return rows


def class_names(folder: str | Path) -> list[str]:
    """Return the names of the subfolders of a folder, in order, without hidden ones; UserError if there is none."""
    names = sorted(path.name for path in Path(folder).glob("[!.]*") if path.is_dir())
    if not names:
        raise UserError(f"{folder} has no subfolder; expected a folder of images for each class")
    return names
