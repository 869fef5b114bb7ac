"""COCO, Flickr30k and NoCaps: captions to train on, images to caption, pairs and collections for retrieval."""

import re
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from data.annotations import as_list, check_images, read_annotation, shorten
from data.text import pre_caption
from data.transforms import Transform
from utils import UserError

MAX_WORDS = 30
COCO_NAME = re.compile(r"(?:COCO_\w+_)?(\d+)")  # of 2014 and of 2017, without .jpg
ImageId = int | str


class Images(Dataset):
    """An annotation file whose entries name an image each.

    Args:
        annotation_file: JSON list of entries with at least `keys`.
        image_root: what the image paths start from.
        transform: RGB image -> tensor.
        keys: what every entry must have.
    """

    def __init__(self, annotation_file: str, image_root: str, transform: Transform, keys: tuple[str, ...]):
        self.annotation = read_annotation(annotation_file, keys)
        self.image_root, self.transform = Path(image_root), transform
        check_images(image_root, (row["image"] for row in self.annotation), annotation_file)

    def __len__(self) -> int:
        return len(self.annotation)

    def path(self, index: int) -> Path:
        """Return the path of an entry's image."""
        return self.image_root / self.annotation[index]["image"]

    def load(self, index: int) -> Any:
        """Return an entry's image as a tensor (3, H, W)."""
        return self.transform.read(self.path(index))


class CaptionTrain(Images):
    """Images with one caption each: {"image", "caption" (with the prompt), "image_id" (number of the image)}."""

    def __init__(
        self, annotation_file: str, image_root: str, transform: Transform, prompt: str = "", max_words: int = MAX_WORDS
    ):
        super().__init__(annotation_file, image_root, transform, ("image", "caption"))
        # validation files list all captions of an image in one entry; each becomes a pair here
        self.annotation = [
            {**row, "caption": caption} for row in self.annotation for caption in as_list(row["caption"])
        ]
        self.prompt, self.max_words = prompt, max_words
        numbers: dict[str, int] = {}
        names = (str(row.get("image_id", row["image"])) for row in self.annotation)
        self.numbers = [numbers.setdefault(name, len(numbers)) for name in names]

    def __getitem__(self, index: int) -> dict[str, Any]:
        caption = self.prompt + pre_caption(self.annotation[index]["caption"], self.max_words)
        return {"image": self.load(index), "caption": caption, "image_id": self.numbers[index]}


class CaptionEval(Images):
    """Images to caption, each once however often the file lists it: {"image", "image_id"}."""

    def __init__(self, annotation_file: str, image_root: str, transform: Transform):
        super().__init__(annotation_file, image_root, transform, ("image",))
        first: dict[str, dict[str, Any]] = {}
        for row in self.annotation:
            first.setdefault(row["image"], row)
        self.annotation = list(first.values())
        self.ids = [image_id(row) for row in self.annotation]
        self._check_ids(annotation_file)

    def _check_ids(self, annotation_file: str) -> None:
        first: dict[str, str] = {}
        for row, number in zip(self.annotation, self.ids, strict=True):
            if not isinstance(number, ImageId) or first.setdefault(str(number), row["image"]) != row["image"]:
                raise UserError(
                    f"annotation file {annotation_file}: the id of {row['image']} is {shorten(number)}, which is "
                    "another image's or no number or text; give every image an 'image_id' of its own"
                )

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.load(index), "image_id": self.ids[index]}


def image_id(entry: dict[str, Any]) -> ImageId:
    """Return an entry's id: its own, or the number that ends a COCO file name, or the file name without its ending."""
    for key in ("image_id", "img_id", "id"):
        if key in entry:
            return entry[key]
    stem = Path(entry["image"]).stem
    number = COCO_NAME.fullmatch(stem)
    return int(number[1]) if number else stem


class RetrievalTrain(CaptionTrain):
    """Pairs: {"image", "caption", "idx"}; pairs of one image have one idx."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {"image": item["image"], "caption": item["caption"], "idx": item["image_id"]}


class RetrievalEval(Images):
    """A collection to search: {"image", "index"}. Entries of one image are joined.

    Attributes:
        text: all captions.
        image: all image names.
        txt2img: number of a caption -> number of its image.
        img2txt: number of an image -> numbers of its captions.
    """

    def __init__(self, annotation_file: str, image_root: str, transform: Transform, max_words: int = MAX_WORDS):
        super().__init__(annotation_file, image_root, transform, ("image", "caption"))
        self.annotation = join_captions(self.annotation)
        self.text: list[str] = []
        self.image = [row["image"] for row in self.annotation]
        self.txt2img: dict[int, int] = {}
        self.img2txt: dict[int, list[int]] = {}
        for number, row in enumerate(self.annotation):
            captions = [pre_caption(caption, max_words) for caption in row["caption"]]
            self.img2txt[number] = list(range(len(self.text), len(self.text) + len(captions)))
            self.txt2img |= dict.fromkeys(self.img2txt[number], number)
            self.text += captions

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.load(index), "index": index}


def join_captions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each image, with the captions of all its entries as a list."""
    joined: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = joined.setdefault(row["image"], {**row, "caption": []})
        entry["caption"] += as_list(row["caption"])
    return list(joined.values())
