"""Every released config on miniature data, with `vit: base` and two processes, until its second step."""

import os
import shutil

import pytest
from scripts import ROOT, lines, run, run_and_signal, settings

from miniature.writing import write_miniature

SLOW = pytest.mark.skipif("BLIP_SLOW" not in os.environ, reason="10 GB of memory, 10 minutes; BLIP_SLOW=1 runs it")
TRAINED = {
    "caption_coco": "train_caption.py",
    "caption_coco_large": "train_caption.py",
    "nlvr": "train_nlvr.py",
    "pretrain": "pretrain.py",
    "pretrain_large": "pretrain.py",
    "retrieval_coco": "train_retrieval.py",
    "retrieval_coco_large": "train_retrieval.py",
    "retrieval_flickr": "train_retrieval.py",
    "retrieval_flickr_large": "train_retrieval.py",
    "vqa": "train_vqa.py",
}
EVALUATED = {
    "nocaps": "eval_nocaps.py",
    "nocaps_large": "eval_nocaps.py",
    "retrieval_msrvtt": "eval_retrieval_video.py",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_miniature(
        tmp_path_factory.mktemp("world"), 2, num_train=8, num_val=6, num_test=6, num_web=2, num_videos=2
    )


def arguments(world, name, folder):
    """A config with the paths of the miniature world, no weights to start from, and a small batch."""
    annotations = world / "annotations"
    values = dict(image_root=world, ann_root=annotations, pretrained="''", vit="base", num_workers=0)
    if "caption" in name:
        values |= dict(coco_gt_root=annotations, batch_size=1)
    elif name == "vqa":
        values = dict(values, vqa_root=world, vg_root=world, batch_size_train=1)
    elif name.startswith("pretrain"):
        values |= dict(train_file=f"[{annotations / 'pretrain_human.json'}]", init="random", batch_size=2)
    elif name == "retrieval_msrvtt":
        values |= dict(video_root=world / "videos")
    elif name.startswith("retrieval"):
        values |= dict(batch_size_train=2)
    elif name == "nlvr":
        values |= dict(batch_size_train=1)
    if name in TRAINED:
        values["log_every"] = 1
    return ["--config", ROOT / "configs" / f"{name}.yaml", "--output_dir", folder, *settings(**values)]


def test_every_config_is_here():
    found = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    not_released = {"capfilt", "okvqa", "snli_ve", "visdial", "msrvtt_qa", "msvd_qa"}
    assert found - not_released == set(TRAINED) | set(EVALUATED)


@SLOW
@pytest.mark.parametrize("name", TRAINED)
def test_training_reaches_its_second_step(world, tmp_path, name):
    curve = tmp_path / "out" / "curve.jsonl"
    words = arguments(world, name, tmp_path / "out")
    run_and_signal(TRAINED[name], *words, when=lambda: lines(curve) >= 2, processes=2, limit=600)
    print(curve.read_text())
    shutil.rmtree(tmp_path / "out")


@SLOW
@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_writes_its_results(world, tmp_path, name):
    run(EVALUATED[name], *arguments(world, name, tmp_path / "out"), processes=2)
    assert list((tmp_path / "out" / "result").iterdir())
