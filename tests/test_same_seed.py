"""Two runs of one seed are equal, bit for bit, on a CPU; every script."""

import pytest
from faults import SCRIPTS, arguments, differences
from scripts import TINY, run_here, settings

from miniature.writing import write_miniature

EVALUATIONS = {"eval_nocaps.py": "nocaps", "eval_retrieval_video.py": "retrieval_msrvtt"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return write_miniature(folder, 3, num_train=8, num_val=4, num_test=6, num_web=10, num_videos=3)


def evaluation(script, world, folder):
    tiny = [part for value in TINY for part in ("--set", value)]
    values = dict(image_root=world, ann_root=world / "annotations", java="false", max_length=8)
    values |= {f"{split}_gt": world / f"annotations/nocaps_{split}_gt.json" for split in ("val", "test")}
    if script == "eval_retrieval_video.py":
        values = dict(video_root=world / "videos", ann_root=world / "annotations", embed_dim=16, k_test=2)
    path = ["--config", f"configs/miniature/{EVALUATIONS[script]}.yaml", "--output_dir", folder]
    return [*path, *tiny, *settings(**values, pretrained="''")]


@pytest.mark.parametrize("script", [*SCRIPTS, *EVALUATIONS])
def test_two_runs_are_equal(world, tmp_path, script):
    for name in ("one", "other"):
        make = evaluation if script in EVALUATIONS else arguments
        words = make(script, world, tmp_path / name)
        if script in SCRIPTS[:5]:
            words += settings(max_epoch=1, augment="true")
        code, told = run_here(script, *words)
        assert code == 0, told
    assert differences(tmp_path / "one", tmp_path / "other") == []
    if script in SCRIPTS[:5]:
        words = [*arguments(script, world, tmp_path / "third"), *settings(max_epoch=1), "--seed", "43"]
        if script == "train_nlvr.py":  # one is enough
            assert run_here(script, *words)[0] == 0
            assert "checkpoint_last.pth differs" in differences(tmp_path / "third", tmp_path / "one")
