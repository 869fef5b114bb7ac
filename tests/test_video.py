"""Video clips: frames over the clip, captions, and clips that cannot be read."""

import json

import numpy as np
import pytest

from data import build_datasets
from data.transforms import MEAN, STD
from data.video import frame_numbers
from utils import UserError

av = pytest.importorskip("av")
SIZE = 16


def write_clip(path, num_frames, form=None):
    """Write a clip that grows brighter by 8 a frame."""
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 8 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def dataset(folder, names, num_frames=4):
    rows = [{"clip_name": name, "caption": f"Caption {i}!"} for i, name in enumerate(names)]
    (folder / "msrvtt_test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings = {"ann_root": str(folder), "video_root": str(folder), "num_frm_test": num_frames, "image_size": SIZE}
    return build_datasets("retrieval_msrvtt", settings)["test"]


def numbers(video):
    """Which frames of the clip the normalised tensors show."""
    return [round(float((frame[0] * STD[0] + MEAN[0]).mean() * 255 / 8)) for frame in video]


def test_frames_and_captions(tmp_path):
    write_clip(tmp_path / "a.mp4", 24)
    write_clip(tmp_path / "b.mp4", 3)
    clips = dataset(tmp_path, ["a", "b", "a"])
    assert clips.names == ["a", "b"] and clips.text == ["caption 0", "caption 1", "caption 2"]
    assert clips.txt2video == {0: 0, 1: 1, 2: 0} and clips.video2txt == {0: [0, 2], 1: [1]}
    item = clips[0]
    assert item["video"].shape == (4, 3, SIZE, SIZE) and (item["index"], item["error"]) == (0, "")
    assert numbers(item["video"]) == frame_numbers(24, 4)
    assert numbers(clips[1]["video"]) == frame_numbers(3, 4)  # shorter than the frames asked for


def test_frame_numbers_are_even_and_inside():
    assert frame_numbers(5, 5) == [0, 1, 2, 3, 4] and frame_numbers(1, 3) == [0, 0, 0]
    assert frame_numbers(8, 4) == [0, 2, 4, 6]
    steps = np.diff(frame_numbers(100, 8))
    assert steps.min() >= 12 and steps.max() <= 13 and 0 <= frame_numbers(100, 8)[0] <= 12


def test_a_header_without_a_number_of_frames(tmp_path):
    write_clip(tmp_path / "a.mp4", 24, "mpegts")  # the content counts, not the name
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].frames == 0
    assert numbers(dataset(tmp_path, ["a"])[0]["video"]) == frame_numbers(24, 4)


@pytest.mark.parametrize("fault", ["garbage", "empty", "half", "hole"])
def test_a_bad_clip_is_named_and_ends_nothing(tmp_path, fault):
    write_clip(tmp_path / "a.mp4", 24)
    whole = (tmp_path / "a.mp4").read_bytes()
    bad = {"garbage": b"no clip" * 99, "empty": b"", "half": whole[: len(whole) // 2]}
    hole = whole[:200] + bytes(len(whole) // 2) + whole[200 + len(whole) // 2 :]
    (tmp_path / "a.mp4").write_bytes(bad.get(fault, hole))
    item = dataset(tmp_path, ["a"])[0]
    assert item["video"].shape == (4, 3, SIZE, SIZE) and not item["video"].any()
    assert item["error"].startswith(f"{tmp_path / 'a.mp4'}: ")


def test_missing_clips_are_named(tmp_path):
    with pytest.raises(UserError, match=r"2 of 2 files do not exist: \S*a\.mp4, \S*b\.mp4;"):
        dataset(tmp_path, ["a", "b"])
