"""Video clips: frames over the clip, captions, and clips that cannot be read."""

import json
import struct

import numpy as np
import pytest

from data import build_datasets
from data.transforms import MEAN, STD
from data.video import frame_numbers, read_frames
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
    assert clips.txt2video == {0: 0, 1: 1, 2: 0}
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


def boxes(data, path):
    """Return where the content of an MP4 box begins, found by the names of the boxes around it."""
    start = 0
    for name in path:
        start = data.index(name.encode(), start) + 4
    return start


@pytest.mark.parametrize("told", [20, 48])
def test_a5_frames_are_spread_over_those_that_decode(tmp_path, told):
    write_clip(tmp_path / "a.mp4", 24)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].frames == 24
    place = boxes(data, ["stts"]) + 8  # one run of equal durations: its number of frames is what the header tells
    assert struct.unpack_from(">I", data, place)[0] == 24
    struct.pack_into(">I", data, place, told)
    (tmp_path / "a.mp4").write_bytes(data)
    assert numbers(dataset(tmp_path, ["a"])[0]["video"]) == frame_numbers(24, 4)


ONE = 1 << 16
MATRICES = {
    90: (0, ONE, 0, -ONE, 0, 0, 32 * ONE, 0, 1 << 30),
    180: (-ONE, 0, 0, 0, -ONE, 0, 64 * ONE, 32 * ONE, 1 << 30),
    270: (0, -ONE, 0, ONE, 0, 0, 0, 64 * ONE, 1 << 30),
}


@pytest.mark.parametrize("clockwise", MATRICES)
def test_a5_a_rotation_in_the_container_is_respected_when_asked(tmp_path, clockwise):
    path = tmp_path / "a.mp4"
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:16, :32] = 255  # the top left quarter is white
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for packet in (*stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")), *stream.encode()):
            container.mux(packet)
    data = bytearray(path.read_bytes())
    struct.pack_into(">9i", data, boxes(data, ["tkhd"]) + 40, *MATRICES[clockwise])
    path.write_bytes(data)
    expected = np.rot90(frame, -clockwise // 90)
    turned, plain = read_frames(path, 1, upright=True)[0], read_frames(path, 1)[0]
    assert (turned.size, plain.size) == (expected.shape[1::-1], (64, 32))
    assert np.abs(np.asarray(turned, int) - expected).mean() < 10 > np.abs(np.asarray(plain, int) - frame).mean()
    settings = {"ann_root": str(tmp_path), "video_root": str(tmp_path), "num_frm_test": 1, "image_size": SIZE}
    dataset(tmp_path, ["a"])  # writes the annotations
    assert build_datasets("retrieval_msrvtt", {**settings, "exif_orientation": True})["test"].upright


def test_a5_several_captions_and_empty_ones(tmp_path, capsys):
    write_clip(tmp_path / "a.mp4", 4)
    rows = [{"clip_name": "a", "caption": ["One", "two", " "]}, {"clip_name": "a", "caption": None}]
    (tmp_path / "msrvtt_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"ann_root": str(tmp_path), "video_root": str(tmp_path), "num_frm_test": 1, "image_size": SIZE}
    clips = build_datasets("retrieval_msrvtt", settings)["test"]
    assert clips.text == ["one", "two"] and clips.txt2video == {0: 0, 1: 0}
    assert "2 empty captions are left out, and 1 entries without any other" in capsys.readouterr().err


def test_missing_clips_are_named(tmp_path):
    with pytest.raises(UserError, match=r"2 of 2 files do not exist: \S*a\.mp4, \S*b\.mp4;"):
        dataset(tmp_path, ["a", "b"])
