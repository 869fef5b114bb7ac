"""Video clips, decoded by PyAV."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from data.annotations import check_images, keep_captions, read_annotation
from data.text import pre_caption
from data.transforms import test_transform
from utils import UserError

MAX_WORDS = 40


class UnreadableClip(Exception):
    """A clip that cannot be decoded."""


class Clips(Dataset):
    """Clips: {"video": (frames, 3, H, W), "index", "error"}; "error" is '' for a readable clip.

    The files are within `video_root`; `annotation_file` names them, for messages. `num_frames` and `upright` are as in
    `read_frames`, `image_size` is the side of the square frames in pixels.
    """

    def __init__(
        self, files: Sequence[str], video_root: str, num_frames: int, image_size: int, upright: bool,
        annotation_file: str,
    ):  # fmt: skip
        self.files, self.root, self.num_frames, self.upright = files, Path(video_root), num_frames, upright
        self.image_size, self.transform = image_size, test_transform(image_size)
        check_images(video_root, files, annotation_file)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """Return the path of a clip."""
        return self.root / self.files[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        problem, frames = "", torch.zeros(self.num_frames, 3, self.image_size, self.image_size)
        try:
            images = read_frames(self.path(index), self.num_frames, self.upright)
            frames = torch.stack([self.transform(image) for image in images])
        except UnreadableClip as error:  # one bad clip must not end an evaluation
            problem = f"{self.path(index)}: {error}"
        return {"video": frames, "index": index, "error": problem}


class VideoDataset(Clips):
    """Clips with captions: JSON lines of {"clip_name", "caption" (a text, or a list)}; the clips are <clip_name>.mp4.

    `text` are the captions, `names` those of the clips; `txt2video` has the number of each caption's clip.
    """

    def __init__(self, annotation_file: str, video_root: str, num_frames: int, image_size: int, upright: bool = False):
        rows = keep_captions(read_annotation(annotation_file, ("clip_name", "caption")), annotation_file)
        pairs = [(row["clip_name"], caption) for row in rows for caption in row["caption"]]
        self.text = [pre_caption(caption, MAX_WORDS) for _, caption in pairs]
        numbers: dict[str, int] = {}
        self.txt2video = {i: numbers.setdefault(name, len(numbers)) for i, (name, _) in enumerate(pairs)}
        self.names = list(numbers)
        files = [f"{name}.mp4" for name in self.names]
        super().__init__(files, video_root, num_frames, image_size, upright, annotation_file)


def read_frames(path: Path, num_frames: int, upright: bool = False) -> list[Image.Image]:
    """Return frames of a clip, evenly spaced over those that can be decoded, some of them twice in a short clip.

    With `upright` they are rotated as the container says. UnreadableClip if it cannot be decoded, or has no frame.
    """
    try:
        import av
    except ImportError:
        raise UserError("reading videos needs PyAV; pip install av") from None
    try:
        with av.open(str(path)) as container:
            told = container.streams.video[0].frames if container.streams.video else 0
        wanted = frame_numbers(told, num_frames)
        frames, total = _decode(path, wanted)
        if total not in (0, told):  # the header has another number of frames, or none
            wanted = frame_numbers(total, num_frames)
            frames, _ = _decode(path, wanted)
    except (av.error.FFmpegError, OSError) as error:
        raise UnreadableClip(str(error)) from None
    if not total:
        raise UnreadableClip("no frame could be decoded")
    images = {number: frame.to_image() for number, frame in frames.items()}
    if upright:
        # the container's angle is counter-clockwise, as Pillow's
        images = {n: image.rotate(round(frames[n].rotation), expand=True) for n, image in images.items()}
    return [images[number] for number in wanted]


def _decode(path: Path, wanted: list[int]) -> tuple[dict[int, Any], int]:
    """Return the frames with the wanted numbers, and the number of all frames."""
    import av

    frames, total = {}, 0
    with av.open(str(path)) as container:
        for frame in container.decode(container.streams.video[0]) if container.streams.video else ():
            if total in wanted:
                frames[total] = frame
            total += 1
    return frames, total


def frame_numbers(total: int, num_frames: int) -> list[int]:
    """Return the numbers of `num_frames` frames of `total`: the starts of equal parts, some twice in a short clip."""
    return [i * total // num_frames for i in range(num_frames)]
