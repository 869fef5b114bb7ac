"""NLVR2: statements about two images."""

import random
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from data.annotations import check_images, entry_error, read_annotation
from data.text import exchange_left_right, pre_caption
from data.transforms import Transform
from utils import short_repr

MAX_WORDS = 40
LABELS = {"True": 1, "False": 0}


class NLVR(Dataset):
    """Statements: {"image0", "image1", "sentence", "label"}.

    The file is a JSON list of {"images": [left, right], "sentence", "label": "True" or "False"}. `swap` exchanges the
    images, and the words left and right, with probability 0.5.
    """

    def __init__(self, annotation_file: str, image_root: str, transform: Transform, swap: bool):
        self.annotation = read_annotation(annotation_file, ("images", "sentence", "label"))
        self.image_root, self.transform, self.swap = Path(image_root), transform, swap
        for number, row in enumerate(self.annotation):
            images = row["images"]
            pair = isinstance(images, list) and len(images) == 2 and all(isinstance(name, str) for name in images)
            if str(row["label"]) not in LABELS or not pair:
                got = f"label {short_repr(row['label'])}, images {short_repr(images)}"
                raise entry_error(f"{got}; expected 'True' or 'False', and two images", annotation_file, number)
        check_images(image_root, (name for row in self.annotation for name in row["images"]), annotation_file)

    def __len__(self) -> int:
        return len(self.annotation)

    def paths(self, index: int) -> list[Path]:
        """Return the paths of the left and the right image."""
        return [self.image_root / name for name in self.annotation[index]["images"]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, (left, right) = self.annotation[index], self.paths(index)
        sentence = pre_caption(row["sentence"], MAX_WORDS)
        # Differs from the released code: both words are exchanged where both occur.
        if self.swap and random.random() < 0.5:
            left, right, sentence = right, left, exchange_left_right(sentence)
        images = [self.transform.read(path) for path in (left, right)]
        return {"image0": images[0], "image1": images[1], "sentence": sentence, "label": LABELS[str(row["label"])]}
