"""Every other script by its command line on a miniature world, on one process and on two."""

import json

import pytest
import torch
from scripts import TINY, run, settings

from miniature.writing import write_miniature

SIZES = [part for value in TINY for part in ("--set", value)]
CONFIGS = "configs/miniature"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return write_miniature(folder, 3, num_train=16, num_val=6, num_test=9, num_web=12, num_videos=5)


def arguments(world, task, folder, **more):
    roots = dict(image_root=world, ann_root=world / "annotations")
    if task == "vqa":
        roots = dict(vqa_root=world, vg_root=world, ann_root=world / "annotations")
    if task == "pretrain":
        roots = dict(image_root=world, train_file=f"[{world / 'annotations/pretrain_human.json'}]")
    if task == "retrieval_msrvtt":
        roots = dict(video_root=world / "videos", ann_root=world / "annotations")
    values = roots | dict(pretrained="''") | more
    return ["--config", f"{CONFIGS}/{task}.yaml", "--output_dir", folder, *SIZES, *settings(**values)]


def scores(folder, name="log.txt"):
    return json.loads((folder / name).read_text().splitlines()[-1])


def report(folder):
    assert (folder / "report.html").stat().st_size > 1000


def evaluated_alike(script, world, task, model, folder, **more):
    """Evaluate one model on one and on two processes and compare scores and result files."""
    found = []
    for processes in (1, 2):
        out = folder / f"eval{processes}"
        args = arguments(world, task, out, **more | dict(pretrained=model))
        run(script, *args, "--evaluate", processes=processes)
        results = {path.name: json.loads(path.read_text()) for path in (out / "result").iterdir()}
        found.append((scores(out, "evaluate.txt"), results))
        report(out)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4) and found[0][0]
    assert found[0][1].keys() == found[1][1].keys()
    return found


def test_retrieval(world, tmp_path):
    sizes = dict(batch_size_train=4, max_epoch=1, queue_size=10, k_test=5, embed_dim=16)
    out = tmp_path / "out"
    run("train_retrieval.py", *arguments(world, "retrieval", out, **sizes), processes=2)
    row = scores(out)
    assert {"train_loss_itc", "train_loss_itm", "val_r_mean", "test_txt_r1", "test_img_mdR"} <= row.keys()
    model = torch.load(out / "checkpoint_best.pth", weights_only=True)["model"]
    assert model["ptr_queue"].item() == (16 * 5 // 8 * 8) % 10  # 80 pairs in 10 batches of 8, wrapped round
    report(out)
    best = out / "checkpoint_best.pth"
    for one, two in evaluated_alike("train_retrieval.py", world, "retrieval", best, tmp_path, **sizes):
        assert one["test_r_mean"] > 0 and len(two["test.json"]) == 45


def test_vqa(world, tmp_path):
    sizes = dict(batch_size_train=8, batch_size_test=4, max_epoch=1, eval_every=1)
    out = tmp_path / "out"
    run("train_vqa.py", *arguments(world, "vqa", out, **sizes), processes=2)
    assert "test_overall" in scores(out) and "test_yes/no" in scores(out)
    found = evaluated_alike("train_vqa.py", world, "vqa", out / "checkpoint_best.pth", tmp_path, **sizes)
    assert found[0][1] == found[1][1]
    answers = found[0][1]["vqa_result.json"]
    assert len(answers) == len({row["question_id"] for row in answers})
    assert set(answers[0]) == {"question_id", "answer"}
    sizes |= dict(inference="generate", pretrained=out / "checkpoint_best.pth")
    free = arguments(world, "vqa", tmp_path / "free", **sizes)
    run("train_vqa.py", *free, "--evaluate")
    report(tmp_path / "free")


def test_nlvr(world, tmp_path):
    sizes = dict(batch_size_train=4, batch_size_test=4, max_epoch=1)
    out = tmp_path / "out"
    run("train_nlvr.py", *arguments(world, "nlvr", out, **sizes), processes=2)
    assert {"val_acc", "test_acc", "test_consistency", "train_loss_nlvr"} <= scores(out).keys()
    evaluated_alike("train_nlvr.py", world, "nlvr", out / "checkpoint_best.pth", tmp_path, **sizes)


def test_nocaps(world, tmp_path):
    truth = {f"{s}_gt": world / f"annotations/nocaps_{s}_gt.json" for s in ("val", "test")}
    caption = tmp_path / "caption"
    roots = dict(coco_gt_root=world / "annotations", max_epoch=1, java="false", batch_size=8, max_length=12)
    run("train_caption.py", *arguments(world, "caption", caption, **roots))
    model = caption / "checkpoint_best.pth"
    found = evaluated_alike("eval_nocaps.py", world, "nocaps", model, tmp_path, **truth, java="false", max_length=12)
    assert found[0][1] == found[1][1]
    assert "val_overall_CIDEr" in found[0][0]
    for folder in (caption, tmp_path / "eval1"):
        assert "<small>caption</small>" in (folder / "report.html").read_text()


def test_video(world, tmp_path):
    sizes = dict(embed_dim=16, k_test=4)
    retrieval = tmp_path / "retrieval"
    train = dict(batch_size_train=8, max_epoch=1, queue_size=16, k_test=5, embed_dim=16)
    run("train_retrieval.py", *arguments(world, "retrieval", retrieval, **train))
    bad = world / "videos/video2.mp4"
    whole = bad.read_bytes()
    bad.write_bytes(b"no video")
    try:
        model = retrieval / "checkpoint_best.pth"
        found = evaluated_alike("eval_retrieval_video.py", world, "retrieval_msrvtt", model, tmp_path, **sizes)
    finally:
        bad.write_bytes(whole)
    assert len(found[0][1]["test.json"]) == 4 and "test_vid_r1" in found[0][0]
    assert "video2.mp4" in (tmp_path / "eval1/report.html").read_text()


def test_pretraining(world, tmp_path):
    sizes = dict(batch_size=8, max_epoch=1, queue_size=12, embed_dim=16, max_bad_images=1)
    out = tmp_path / "out"
    done = run("pretrain.py", *arguments(world, "pretrain", out, **sizes), processes=2)
    assert {"train_loss_itc", "train_loss_itm", "train_loss_lm"} <= scores(out).keys()
    assert "indexing" in done.stderr
    web = world / "annotations/pretrain_web.json"
    rows = json.loads(web.read_text()) + [{"image": f"gone{i}.jpg", "caption": "x"} for i in range(6)]
    (tmp_path / "web.json").write_text(json.dumps(rows))
    args = arguments(world, "pretrain", tmp_path / "bad", **sizes | dict(train_file=f"[{tmp_path / 'web.json'}]"))
    done = run("pretrain.py", *args, "--set", "max_epoch=4", check=False)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(told) == 1 and "images cannot be read, more than max_bad_images 1" in told[0]
    assert "gone" in (tmp_path / "bad/bad_images_rank0.txt").read_text()
