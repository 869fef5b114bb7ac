"""Video clips for retrieval, read through PyAV."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from data.annotations import check_images, read_annotation
from data.text import pre_caption
from data.transforms import test_transform
from utils import UserError

MAX_WORDS = 40


class UnreadableClip(Exception):
    """A clip that cannot be decoded."""


class VideoDataset(Dataset):
    """Clips with a caption each: {"video": (frames, 3, H, W), "index", "error"}; "error" is '' for a readable clip.

    Args:
        annotation_file: JSON lines of {"clip_name", "caption"}.
        video_root: folder of the clips, <clip_name>.mp4.
        num_frames: frames taken from each, evenly spaced.
        image_size: side of the square frames in pixels.

    Attributes:
        text: captions. A clip with several lines in the file has several.
        names: clips.
        txt2video: number of a caption -> number of its clip.
        video2txt: number of a clip -> numbers of its captions.
    """

    def __init__(self, annotation_file: str, video_root: str, num_frames: int, image_size: int):
        rows = read_annotation(annotation_file, ("clip_name", "caption"))
        self.root, self.num_frames = Path(video_root), num_frames
        self.image_size, self.transform = image_size, test_transform(image_size)
        self.text = [pre_caption(row["caption"], MAX_WORDS) for row in rows]
        numbers: dict[str, int] = {}
        self.txt2video = {i: numbers.setdefault(row["clip_name"], len(numbers)) for i, row in enumerate(rows)}
        self.names = list(numbers)
        self.video2txt: dict[int, list[int]] = {number: [] for number in numbers.values()}
        for text, video in self.txt2video.items():
            self.video2txt[video].append(text)
        check_images(video_root, (f"{name}.mp4" for name in self.names), annotation_file)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Return the path of a clip."""
        return self.root / f"{self.names[index]}.mp4"

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            frames = read_frames(self.path(index), self.num_frames)
        except UnreadableClip as error:  # one bad clip must not end an evaluation
            empty = torch.zeros(self.num_frames, 3, self.image_size, self.image_size)
            return {"video": empty, "index": index, "error": f"{self.path(index)}: {error}"}
        return {"video": torch.stack([self.transform(frame) for frame in frames]), "index": index, "error": ""}


def read_frames(path: Path, num_frames: int) -> list[Image.Image]:
    """Decode a clip once and return frames evenly spaced over it: the middles of equal parts.

    Raises:
        UnreadableClip: it cannot be decoded, or has no frame.
        UserError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise UserError("reading videos needs PyAV; pip install av") from None
    try:
        with av.open(str(path)) as container:
            frames = _decode(container, num_frames)
    except (av.error.FFmpegError, OSError) as error:
        raise UnreadableClip(str(error)) from None
    if not frames:
        raise UnreadableClip("no frame could be decoded")
    return frames + [frames[-1]] * (num_frames - len(frames))


def _decode(container: Any, num_frames: int) -> list[Image.Image]:
    """Return the wanted frames of an opened clip, or the first of them if it ends early."""
    if not container.streams.video:
        return []
    stream = container.streams.video[0]
    if not stream.frames:  # the header does not tell how many there are
        decoded = list(container.decode(stream))
        return [decoded[i].to_image() for i in frame_numbers(len(decoded), num_frames)] if decoded else []
    wanted = frame_numbers(stream.frames, num_frames)
    kept: dict[int, Image.Image] = {}
    for number, frame in enumerate(islice(container.decode(stream), wanted[-1] + 1)):
        if number in wanted:
            kept[number] = frame.to_image()
    return [kept[i] for i in wanted if i in kept]


def frame_numbers(total: int, num_frames: int) -> list[int]:
    """Return the numbers of `num_frames` frames of `total`: the starts of equal parts, some twice in a short clip."""
    return [i * total // num_frames for i in range(num_frames)]
