"""Evaluating a split needs that split's files alone, and wrong ground truth is said before the first step."""

import json
import shutil

import pytest
from scripts import ROOT, TINY, run_here, settings

from miniature.writing import write_miniature

SIZES = [part for value in TINY for part in ("--set", value)]
SCRIPTS = {
    "train_caption.py": ("caption", "coco_karpathy_{}.json", "coco_karpathy_{}_gt.json"),
    "train_retrieval.py": ("retrieval", "coco_karpathy_{}.json", None),
    "train_vqa.py": ("vqa", "vqa_{}.json", None),
    "train_nlvr.py": ("nlvr", "nlvr_{}.json", None),
    "train_classification.py": ("classification", "ve_{}.json", None),
    "train_dialogue.py": ("dialogue", "visdial_1.0_{}.json", None),
    "eval_nocaps.py": ("nocaps", "nocaps_{}.json", "nocaps_{}_gt.json"),
}


@pytest.fixture
def world(tmp_path):
    return write_miniature(tmp_path / "world", 3, num_train=8, num_val=4, num_test=4, num_web=0)


def arguments(script, world, *splits, **more):
    """A script's command line with nothing but the files of splits at hand, under names of their own."""
    task, file, truth = SCRIPTS[script]
    own = world.parent / "own"
    own.mkdir(exist_ok=True)
    named = {}
    for split in splits:
        stem = "dev" if task in ("nlvr", "classification") and split == "val" else split
        shutil.copy(world / "annotations" / file.format(stem), own / f"my_{split}.json")
        named[f"{split}_file"] = own / f"my_{split}.json"
        if truth:
            shutil.copy(world / "annotations" / truth.format(split), own / f"my_{split}_gt.json")
            named[f"{split}_gt"] = own / f"my_{split}_gt.json"
    roots = dict(vqa_root=world, vg_root=world) if task == "vqa" else dict(image_root=world)
    if task == "vqa":
        named["answer_list"] = world / "annotations" / "answer_list.json"
    if task in ("caption", "nocaps"):
        named["java"] = "false"
    values = dict(ann_root=world.parent / "absent", pretrained="''", **roots, **named, **more)
    config = ROOT / f"configs/miniature/{task}.yaml"
    return ["--config", config, "--output_dir", world.parent / "out", *SIZES, *settings(**values)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_b_the_test_split_alone_needs_nothing_else(world, script, monkeypatch):
    monkeypatch.setattr("data.annotations.fetch", lambda *_, **__: pytest.fail("a file was asked for"))
    shutil.rmtree(world / "images" / "train")
    shutil.rmtree(world / "images" / "val")
    more = {} if script == "train_vqa.py" else {"splits": "[test]"}
    more |= {"train_retrieval.py": {"k_test": 2}, "train_dialogue.py": {"test_dense": "''"}}.get(script, {})
    code, told = run_here(script, *arguments(script, world, "test", **more), "--evaluate")
    assert code == 0, told
    found = json.loads((world.parent / "out/evaluate.txt").read_text())
    assert found and all(name.startswith("test_") for name in found)


def test_b_unknown_splits_are_refused(world):
    for splits in ("[train]", "[]", "tset"):
        args = arguments("train_nlvr.py", world, "test", splits=splits)
        code, told = run_here("train_nlvr.py", *args, "--evaluate")
        assert code == 2 and "expected val, test or both" in told


def change(path, rows):
    truth = json.loads(path.read_text())
    path.write_text(json.dumps({**truth, "annotations": rows(truth["annotations"])}))


@pytest.mark.parametrize("script", ["train_caption.py", "eval_nocaps.py"])
@pytest.mark.parametrize(
    "rows, said",
    [
        (lambda rows: [], "is not in the COCO caption format"),
        (lambda rows: [{**row, "image_id": f"x{row['image_id']}"} for row in rows], "have no caption in the results"),
        (lambda rows: [*rows, {"image_id": 1, "caption": 3}], "has the caption 3; expected a text"),
    ],
)
def test_c_wrong_ground_truth_is_said_before_the_first_step(world, script, rows, said):
    args = arguments(script, world, "val", "test")
    if script == "train_caption.py":
        args += settings(train_file=world / "annotations/coco_karpathy_train.json")
    change(world.parent / "own/my_test_gt.json", rows)
    code, told = run_here(script, *args)
    assert code == 2 and said in told, told
    assert not (world.parent / "out/log.txt").exists() and not list((world.parent / "out").glob("*.pth"))
    assert not (world.parent / "out/result").exists()  # nor has anything been captioned

