"""COCO, Flickr30k and nocaps: captions for training, images to caption, and collections for retrieval."""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from data.annotations import Row, check_images, keep_captions, read_annotation
from data.ids import check_image_ids, image_id, image_key, number_images
from data.text import pre_caption
from data.transforms import Transform

MAX_WORDS = 30


class Images(Dataset):
    """An annotation file whose rows have `keys`, among them "image", a path under `image_root`."""

    def __init__(self, annotation_file: str, image_root: str, transform: Transform, keys: tuple[str, ...]):
        self.annotation = read_annotation(annotation_file, keys)
        self.image_root, self.transform = Path(image_root), transform
        check_images(image_root, (row["image"] for row in self.annotation), annotation_file)

    def __len__(self) -> int:
        return len(self.annotation)

    def path(self, index: int) -> Path:
        """Return the path of a row's image."""
        return self.image_root / self.annotation[index]["image"]

    def load(self, index: int) -> Any:
        """Return a row's image as a tensor (3, H, W)."""
        return self.transform.read(self.path(index))


class CaptionTrain(Images):
    """Images with one caption each: {"image", "caption" (with the prompt), "image_id" (number of the image)}."""

    def __init__(
        self, annotation_file: str, image_root: str, transform: Transform, prompt: str = "", max_words: int = MAX_WORDS
    ):
        super().__init__(annotation_file, image_root, transform, ("image", "caption"))
        self.prompt, self.max_words = prompt, max_words
        numbers = number_images(self.annotation, annotation_file)
        rows = [{**row, "number": number} for row, number in zip(self.annotation, numbers, strict=True)]
        rows = keep_captions(rows, annotation_file)
        # validation files list all captions of an image in one row; each becomes a pair here
        self.annotation = [{**row, "caption": caption} for row in rows for caption in row["caption"]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.annotation[index]
        caption = self.prompt + pre_caption(row["caption"], self.max_words)
        return {"image": self.load(index), "caption": caption, "image_id": row["number"]}


class CaptionEval(Images):
    """Images to caption, each once however often the file lists it: {"image", "image_id"}."""

    def __init__(self, annotation_file: str, image_root: str, transform: Transform):
        super().__init__(annotation_file, image_root, transform, ("image",))
        check_image_ids(self.annotation, [image_id(row) for row in self.annotation], annotation_file)
        rows: dict[str, Row] = {}
        for row in self.annotation:
            rows.setdefault(image_key(row), row)
        self.annotation = list(rows.values())
        self.ids = [image_id(row) for row in self.annotation]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.load(index), "image_id": self.ids[index]}


class RetrievalTrain(CaptionTrain):
    """Pairs: {"image", "caption", "idx"}; pairs of one image have the same idx."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {"image": item["image"], "caption": item["caption"], "idx": item["image_id"]}


class RetrievalEval(Images):
    """A collection to search: {"image", "index"}. Rows of one image are joined.

    `text` are all captions, `image` all image names; `txt2img` has the number of each caption's image, `img2txt` the
    numbers of each image's captions.
    """

    def __init__(self, annotation_file: str, image_root: str, transform: Transform, max_words: int = MAX_WORDS):
        super().__init__(annotation_file, image_root, transform, ("image", "caption"))
        joined: dict[str, Row] = {}
        for row in keep_captions(self.annotation, annotation_file):
            joined.setdefault(image_key(row), {**row, "caption": []})["caption"] += row["caption"]
        self.annotation = list(joined.values())
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
