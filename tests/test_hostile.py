"""Hostile files: checkpoints that want to run code or lie about their sizes, and paths that leave the image folder."""

import copy
import json
import os
import pickle
import re
import struct
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from bootstrap.shards import Shards
from bootstrap.tars import list_source
from data.annotations import inside, leaves
from data.coco_flickr import CaptionEval, CaptionTrain, RetrievalEval
from data.nlvr import NLVR
from data.pretrain import PairDataset, open_lists
from data.transforms import test_transform as square
from data.video import VideoDataset
from data.vqa import VQATrain
from models.architecture import settings_of
from models.pretrained import load_pretrained
from models.weights import read_file
from training.checkpoint import load_last
from utils import UserError

CPU = torch.device("cpu")
READERS = {
    "weights": read_file,
    "settings": lambda path: settings_of(str(path)),
    "model": lambda path: load_pretrained(torch.nn.Linear(1, 1), str(path), "caption"),
    "resume": lambda path: load_last(path, CPU),
}


# Checkpoints.


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def plain_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def old_format(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [torch.save, old_format, plain_pickle])
@pytest.mark.parametrize("reader", READERS)
def test_code_in_a_pickle_does_not_run(tmp_path, write, reader):
    path = tmp_path / "model.pth"
    write({"model": {"a": torch.zeros(1)}, "rng": [], "config": Bomb(tmp_path / "ran")}, path)
    with pytest.raises(UserError, match="model.pth") as error:
        READERS[reader](path)
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # so it would have shown


def deflated(path, zeros, content=None):
    """A checkpoint whose entries are compressed, the pickle followed by so many zeros."""
    torch.save(content or {"model": {"a": torch.zeros(1)}, "rng": []}, path.with_name("plain.pth"))
    with zipfile.ZipFile(path.with_name("plain.pth")) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name in plain.namelist():
            with out.open(name, "w") as entry:
                entry.write(plain.read(name))
                for _ in range(zeros >> 20 if name.endswith("data.pkl") else 0):
                    entry.write(bytes(1 << 20))


def overlapping(path, zeros):
    """A checkpoint with many entries that share their bytes."""
    torch.save({"model": {"a": torch.zeros(1 << 18)}, "rng": []}, path)
    with zipfile.ZipFile(path, "a") as archive:
        (entry,) = [entry for entry in archive.filelist if entry.filename.endswith("data/0")]
        for number in range(1, zeros >> 20):
            archive.filelist.append(copy.copy(entry))
            archive.filelist[-1].filename = entry.filename[:-1] + str(number)
        archive.writestr(entry.filename[:-1] + "last", b"")  # so that the list is written


@pytest.mark.parametrize("write", [deflated, overlapping])
@pytest.mark.parametrize("reader", READERS)
def test_archives_that_unpack_to_more_than_they_are(tmp_path, write, reader):
    path = tmp_path / "model.pth"
    write(path, 256 << 20)
    assert path.stat().st_size < 2 << 20
    with peak_below(64), pytest.raises(UserError, match=r"model\.pth is compressed \(2\d{8} bytes in") as error:
        READERS[reader](path)
    assert "\n" not in str(error.value)


def test_an_archive_that_was_compressed_again_is_not_read_as_weights(tmp_path):
    """torch maps its bytes from disk and takes them for numbers."""
    content = {"a": torch.randn(1000), "b": torch.randn(2000)}
    deflated(tmp_path / "model.pth", 0, content)
    assert not torch.equal(torch.load(tmp_path / "model.pth", mmap=True)["a"], content["a"])
    with pytest.raises(UserError, match="is compressed"):
        read_file(tmp_path / "model.pth")
    assert torch.equal(read_file(tmp_path / "plain.pth")[0]["a"], content["a"])


@contextmanager
def peak_below(mebibytes):
    """Hold that this process's memory does not grow by more, not even for a moment."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is read from Linux's /proc")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the earlier peak
    before = peak()
    yield
    assert peak() - before < mebibytes


def peak():
    """MiB of this process at its most."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) / 1024


def safetensors(header, body=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape, *offsets, kind="F32"):
    return {"a": {"dtype": kind, "shape": shape, "data_offsets": list(offsets)}}


LIES = {
    "a header of exabytes": safetensors(entry([4], 0, 16), length=2**62),
    "a header longer than the file": safetensors(entry([4], 0, 16), length=10**6),
    "a shape of terabytes": safetensors(entry([2**40], 0, 16)),
    "a shape beyond 64 bits": safetensors(entry([2**40, 2**40], 0, 16)),
    "data behind the end": safetensors(entry([2**38], 0, 2**40)),
    "data before the beginning": safetensors(entry([4], 16, 0)),
    "less data than said": safetensors(entry([4], 0, 16), body=b""),
    "overlapping tensors": safetensors(entry([4], 0, 16) | {"b": entry([4], 0, 16)["a"]}),
    "an unknown type": safetensors(entry([4], 0, 16, kind="X99")),
    "no object": safetensors(b"[1]"),
    "no text": safetensors(b"\xff\xfe{"),
    "deep nesting": safetensors(b'{"a":' * 10_000),
}


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_that_lie(tmp_path, lie):
    path = tmp_path / "model.safetensors"
    path.write_bytes(LIES[lie])
    with peak_below(64):
        for reader in ("weights", "settings", "model"):
            with pytest.raises(UserError, match=r"model\.safetensors cannot be read") as error:
                READERS[reader](path)
            assert "\n" not in str(error.value)
    path.write_bytes(safetensors(entry([4], 0, 16)))
    assert read_file(path)[0]["a"].tolist() == [0] * 4  # so the format is not what was refused


# Paths.


@pytest.fixture
def folders(tmp_path):
    """An image folder with a image, a image outside, and a link to that from inside."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for path in (root / "a.jpg", root / "sub" / "b.jpg", tmp_path / "secret.jpg"):
        Image.new("RGB", (4, 4)).save(path)
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    return root


OUTSIDE = ["../secret.jpg", "sub/../../secret.jpg", "../../../../../../etc/passwd", "/etc/passwd", "sub/../a.jpg"]
INSIDE = ["a.jpg", "./a.jpg", "sub/b.jpg", "sub//b.jpg", "a..b.jpg", "..a.jpg", "link.jpg"]


def test_what_leaves_a_folder(folders, monkeypatch):
    for root in (folders, str(folders), f"{folders}/", os.path.relpath(folders)):
        assert all(leaves(root, name) for name in [*OUTSIDE, "..", f"{folders}2/a.jpg", f"{folders}/../secret.jpg"])
        assert not any(leaves(root, name) for name in [*INSIDE, f"{folders}/a.jpg"])
    assert not any(leaves("", name) for name in [*OUTSIDE, *INSIDE])  # no folder, no outside
    assert inside("", "/etc/passwd") == Path("/etc/passwd")
    assert inside("/", str(folders / "a.jpg")) == folders / "a.jpg"


DATASETS = {
    "caption": lambda file, root, name: CaptionTrain(file(image=name, caption="x"), root, square(8)),
    "caption_eval": lambda file, root, name: CaptionEval(file(image=name), root, square(8)),
    "retrieval": lambda file, root, name: RetrievalEval(file(image=name, caption="x"), root, square(8)),
    "vqa": lambda file, root, name: VQATrain(
        [file(image=name, question="x", question_id=1, answer="x")], {"vqa": root}, square(8)
    ),
    "nlvr": lambda file, root, name: NLVR(
        file(images=["a.jpg", name], sentence="x", label="True"), root, square(8), True
    ),
    "video": lambda file, root, name: VideoDataset(file(clip_name=name, caption="x"), root, 1, 8),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_annotations_stay_in_their_folder(folders, tmp_path, kind):
    def file(**row):
        (tmp_path / "rows.json").write_text(json.dumps([row]))
        return str(tmp_path / "rows.json")

    for name in OUTSIDE:
        said = r"rows\.json: 1 of \d paths leave the folder .*set the folder to ''"
        with pytest.raises(UserError, match=said) as error:
            DATASETS[kind](file, str(folders), name)
        assert "\n" not in str(error.value)
    if kind == "video":
        (folders / "a.jpg.mp4").write_bytes(b"")
    for name in ("a.jpg", str(folders / "a.jpg")):
        assert len(DATASETS[kind](file, str(folders), name)) == 1
    if kind not in ("video", "nlvr"):  # the latter's other image is not here
        secret = str(tmp_path / "secret.jpg")
        assert len(DATASETS[kind](file, "", secret)) == 1 and len(DATASETS[kind](file, "/", secret)) == 1


def test_lists_of_pairs_stay_in_their_folder(folders, tmp_path):
    """A image outside counts as unreadable, in pretraining and in CapFilt."""
    secret = str(tmp_path / "secret.jpg")
    names = ["a.jpg", "../secret.jpg", secret, "link.jpg"]
    (tmp_path / "pairs.json").write_text(json.dumps([{"image": name, "caption": "x"} for name in names]))
    pairs = PairDataset([tmp_path / "pairs.json"], str(folders), square(8))
    assert ["leaves the folder" in pairs.at(0, i)["bad"] for i in range(4)] == [False, True, True, False]
    free = PairDataset([tmp_path / "pairs.json"], "", square(8))
    assert free.at(0, 2)["bad"] == "" and "does not exist" in free.at(0, 0)["bad"]
    shards = Shards(open_lists([tmp_path / "pairs.json"]), 10, tmp_path / "shards")
    ((samples, errors),) = list_source(shards, str(folders))(0)
    assert [sample.name for sample in samples] == ["a.jpg", "link.jpg"]
    assert [row["image"] for row in errors] == ["../secret.jpg", secret]
