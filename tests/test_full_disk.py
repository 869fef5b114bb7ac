"""A disk that fills at any write: what was there is whole, one line says where to free space, and the run goes on."""

import contextlib
import json
import resource
import signal

import numpy as np
import pytest
import torch
from faults import differences
from PIL import Image
from scripts import TINY, run_here, settings

import launch.watchdog
import pretrain
from bootstrap.merging import merge_shards
from bootstrap.shards import Shards, open_folder, run_shards
from data.pretrain import build_index
from files import append, disk_is_full, write_json, write_whole
from inference.explain import save_image
from inference.feature_files import FeatureFile
from launch.config import NLVRConfig
from launch.run import Run
from launch.settings_file import save_config
from miniature.writing import write_miniature
from report.page import write_report
from training.checkpoint import save_atomic
from utils import UserError

OLD = '{"epoch": 0, "a": "old"}\n'


@contextlib.contextmanager
def full_disk(size=5):
    """No file of this process may grow beyond so many bytes: a write ends as on a full disk, after some bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def bad_images(path):
    found = pretrain.BadImages(10, Run(path.parent, torch.device("cpu")))
    found.path = path
    found.inspect({"bad": ["a.jpg: cannot be read"]})


def features(path):
    file = FeatureFile(path, {"command": "features"}, ["a"], overwrite=True)
    file.write([{"image": "a", "features": np.zeros(9)}])
    file.finish()


def report(path):
    write_report(path.parent, "Title", {"cider": 1.0}, (), [], ["note"])


def merged(path):
    class Done(Shards):
        """One finished shard that is on no disk."""

        def rows(self, shard):
            return [{"image": "a.jpg", "caption": "text", "source": "web", "kept": True}]

    merge_shards(Done([[("a.jpg", "text")]], 1, path.parent), path.parent)


def one_shard(path):
    path.rename(path.parent / "kept")
    try:
        run_shards(Shards([[("a.jpg", "text")]], 1, path.parent), lambda shard: [{"image": "a.jpg"}], "shards")
    finally:
        (path.parent / "kept").rename(path)


RUN = [
    ("checkpoint.pth", lambda path: save_atomic({"a": torch.zeros(100)}, path)),
    ("log.txt", lambda path: Run(path.parent, torch.device("cpu")).log({"epoch": 1})),
    ("curve.jsonl", lambda path: Run(path.parent, torch.device("cpu")).trim_log(lambda row: True, "curve.jsonl")),
    ("result.json", lambda path: write_json(path, [1, 2, 3, 4])),
    ("config.yaml", lambda path: save_config(NLVRConfig(), path)),
    ("scores.png", report),
    ("bad_images.txt", bad_images),
    ("settings.json", lambda path: open_folder(path.parent, {"threshold": 0.5})),
]
OTHERS = [
    ("0000000.jsonl", one_shard),
    ("bootstrapped.jsonl", merged),
    ("map.png", lambda path: save_image(Image.new("RGB", (8, 8)), path)),
    ("features.npy", features),
]


@pytest.mark.parametrize(("name", "write"), RUN + OTHERS, ids=[name for name, _ in RUN + OTHERS])
def test_what_was_there_is_whole(tmp_path, name, write):
    path = tmp_path / name
    path.write_text(OLD)
    with pytest.raises(UserError) as error, full_disk(len(OLD) - 3 if name == "curve.jsonl" else 5):
        write(path)
    told = str(error.value)
    assert "\n" not in told and "free space" in told and str(tmp_path) in told, told
    if (name, write) in RUN:
        assert f"the disk is full: free space in {tmp_path}, then continue with --resume" in told
    assert path.read_text() == OLD
    assert [one.name for one in tmp_path.iterdir() if ".part" in one.name] == []


def test_a_page_is_whole_too(tmp_path):
    report(tmp_path / "report.html")
    whole = (tmp_path / "report.html").read_bytes()
    with pytest.raises(UserError, match="report.html could not be written .the disk is full"), full_disk(600):
        write_report(tmp_path, "Other", {}, (), [], ["note"])
    assert (tmp_path / "report.html").read_bytes() == whole


def test_a_row_that_fits_partly_is_taken_back(tmp_path):
    path = tmp_path / "log.txt"
    append(path, OLD)
    with pytest.raises(UserError, match="the disk is full"), full_disk(len(OLD) + 4):
        append(path, OLD)
    assert path.read_text() == OLD


def test_an_index_leaves_nothing(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"image": "a.jpg", "caption": "text"}]))
    with pytest.raises(UserError, match="free space beside"), full_disk():
        build_index(path, tmp_path / "pairs.index")
    assert [one.name for one in tmp_path.iterdir()] == ["pairs.json"]


def test_other_errors_are_no_full_disk(tmp_path):
    with pytest.raises(UserError, match="Is a directory") as error, write_whole(tmp_path / "a") as file:
        file.write("a")
        (tmp_path / "a").mkdir()
    assert "disk is full" not in str(error.value) and not disk_is_full(OSError("else"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_miniature(tmp_path_factory.mktemp("world"), 1, num_train=8, num_val=4, num_test=6, num_web=0)


def arguments(world, folder):
    tiny = [part for value in TINY for part in ("--set", value)]
    values = dict(image_root=world, ann_root=world / "annotations", pretrained="''", max_epoch=2, eval_every=1)
    values |= dict(log_every=1, save_every=2, batch_size_train=4)
    return ["--config", "configs/miniature/nlvr.yaml", "--output_dir", folder, *tiny, *settings(**values)]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run_here("train_nlvr.py", *arguments(world, folder))[0] == 0
    return folder


@pytest.mark.parametrize("phase", ["a step", "evaluation", "saving", "the report"])
def test_a_run_whose_disk_fills_goes_on_to_the_same_end(world, whole, tmp_path, monkeypatch, phase):
    """From its fifth step on, or the next time it evaluates, saves or reports, nothing can be written."""
    folder = tmp_path / "out"
    disk = contextlib.ExitStack()
    begin = launch.watchdog.Watchdog.enter

    def enter(self, name, step):
        begin(self, name, step)
        if name == phase and (step == 5 or step > 5 and phase != "a step") and not hasattr(disk, "full"):
            disk.full = disk.enter_context(full_disk())

    monkeypatch.setattr(launch.watchdog.Watchdog, "enter", enter)
    with disk:
        code, told = run_here("train_nlvr.py", *arguments(world, folder))
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in told
    assert f"the disk is full: free space in {folder}" in errors[0]
    assert run_here("train_nlvr.py", *arguments(world, folder), "--resume")[0] == 0
    assert differences(folder, whole) == []
