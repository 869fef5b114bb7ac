"""train_caption.py by its command line: two processes, kills and continuations, evaluation, mistakes."""

import json
import shutil
import signal

import pytest
import torch
from scripts import TINY, lines, run, run_and_signal, run_here, settings

from miniature.writing import write_miniature

SCRIPT = "train_caption.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_miniature(tmp_path_factory.mktemp("world"), 1, num_train=8, num_val=4, num_test=6, num_web=0)


@pytest.fixture(scope="module")
def arguments(world):
    annotations = world / "annotations"
    roots = settings(image_root=world, ann_root=annotations, coco_gt_root=annotations)
    tiny = [part for value in TINY for part in ("--set", value)]
    sizes = settings(java="false", eval_every=1, log_every=5)
    sizes += settings(batch_size=4, max_epoch=2, save_every=3, max_length=12, warmup=2)
    return ["--config", "configs/miniature/caption.yaml", *roots, *tiny, *sizes]


def weights(folder, name="checkpoint_last.pth"):
    return torch.load(folder / name, weights_only=True)["model"]


def assert_same_run(folder, other):
    mine, theirs = weights(folder), weights(other)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    for name in ("log.txt", "curve.jsonl", "result/test_epoch1.json"):
        assert (folder / name).read_text() == (other / name).read_text(), name


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """A run never interrupted, on one process with a data worker."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(SCRIPT, *arguments, "--output_dir", folder, *settings(num_workers=1))
    return folder, done


def test_a_run_leaves_what_it_promises(whole):
    folder, done = whole
    rows = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert {"train_loss_lm", "train_lr", "val_CIDEr", "test_Bleu_4"} <= rows[0].keys()
    assert rows[1]["train_loss_lm"] < rows[0]["train_loss_lm"]
    for name in ("config.yaml", "checkpoint_best.pth", "report.html", "scores.png", "curve.png"):
        assert (folder / name).stat().st_size > 0, name
    assert set(torch.load(folder / "checkpoint_best.pth", weights_only=True)) == {"model", "config", "epoch"}
    assert len(json.loads((folder / "result/test_epoch1.json").read_text())) == 6
    assert "images/s" in done.stderr and "GiB" in done.stderr
    assert "SPICE: needs" in done.stdout and "report:" in done.stdout


@pytest.mark.parametrize("number", [1, 2])
def test_a_killed_run_continues_to_the_same_end(arguments, whole, tmp_path, number):
    folder = tmp_path / "killed"
    reached = lambda: lines(folder / "curve.jsonl") >= number  # noqa: E731
    code, _ = run_and_signal(SCRIPT, *arguments, "--output_dir", folder, *settings(num_workers=1), when=reached)
    assert code == -signal.SIGKILL
    run(SCRIPT, *arguments, "--output_dir", folder, "--resume")  # workers make no difference
    assert_same_run(folder, whole[0])


def test_two_processes_and_sigterm(arguments, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(SCRIPT, *arguments, "--output_dir", whole, processes=2)
    reached = lambda: lines(stopped / "curve.jsonl") >= 1  # noqa: E731
    code, output = run_and_signal(
        SCRIPT, *arguments, "--output_dir", stopped, when=reached, number=signal.SIGTERM, processes=2, fresh=True
    )
    assert code != 0 and "stopped and saved at step" in output and "--resume" in output
    run(SCRIPT, *arguments, "--output_dir", stopped, "--resume", processes=2)
    assert_same_run(stopped, whole)


def test_evaluation_alone(arguments, whole, tmp_path):
    folder, weights_file = tmp_path / "eval", whole[0] / "checkpoint_last.pth"
    more = settings(pretrained=weights_file, java="true", splits="[test]")
    run(SCRIPT, *arguments, "--output_dir", folder, "--evaluate", *more)
    scores = json.loads((folder / "evaluate.txt").read_text())
    row = json.loads((whole[0] / "log.txt").read_text().splitlines()[-1])
    assert scores["test_CIDEr"] == pytest.approx(row["test_CIDEr"], rel=0.02)  # another tokenizer
    assert "test_METEOR" in scores
    assert not (folder / "checkpoint_best.pth").exists() and not (folder / "log.txt").exists()
    assert (folder / "report.html").exists()


def test_mixed_precision_accumulation_clipping_and_text_ids(arguments, world, tmp_path):
    """Own data by path, with text ids, and the settings of a step."""
    truth = json.loads((world / "annotations/coco_karpathy_val_gt.json").read_text())
    rows = json.loads((world / "annotations/coco_karpathy_val.json").read_text())
    for number, (row, image) in enumerate(zip(rows, truth["images"], strict=True)):
        for annotation in truth["annotations"]:
            if annotation["image_id"] == image["id"]:
                annotation["image_id"] = f"pic-{number}"
        row["id"] = image["id"] = f"pic-{number}"
    (tmp_path / "val.json").write_text(json.dumps(rows))
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    own = {name: tmp_path / "val.json" for name in ("train_file", "val_file", "test_file")}
    own |= {"val_gt": tmp_path / "gt.json", "test_gt": tmp_path / "gt.json"}
    steps = dict(amp="bf16", grad_accum=2, clip_grad=1.0, max_epoch=1, batch_size=2, tensorboard="true")
    run(SCRIPT, *arguments, "--output_dir", tmp_path / "out", *settings(**own, **steps))
    results = json.loads((tmp_path / "out/result/test_epoch0.json").read_text())
    assert [row["image_id"] for row in results] == ["pic-0", "pic-1", "pic-2", "pic-3"]
    assert list((tmp_path / "out/tensorboard").iterdir())


def refused(arguments, *more):
    """The one line of a refused run."""
    code, told = run_here(SCRIPT, *arguments, *more)
    told = [line for line in told.splitlines() if line.strip()]
    assert code == 2 and len(told) == 1 and told[0].startswith("error: "), told
    return told[0]


def test_mistakes(arguments, world, whole, tmp_path):
    out = ["--output_dir", tmp_path / "out"]
    assert "config nowhere.yaml does not exist" in refused(["--config", "nowhere.yaml"], *out)
    assert "did you mean 'batch_size'?" in refused(arguments, *out, "--set", "batchsize=3")
    many = settings(batch_size="many")
    assert "batch_size is a text ('many'); expected a whole number" in refused(arguments, *out, *many)
    assert not (tmp_path / "out").exists()
    assert "holds a run; continue it with --resume" in refused(arguments, "--output_dir", whole[0])
    bad = tmp_path / "bad.json"
    for text, message in (
        ("[{", "is not JSON: line 1"),
        ('[{"image": "a.jpg"}]', ": lacks 'caption'"),
        (json.dumps([{"image": f"{i}.jpg", "caption": "x"} for i in range(5)]), "5 of 5 files do not exist: "),
    ):
        bad.write_text(text)
        assert message in refused(arguments, *out, *settings(train_file=bad))
    other = whole[0] / "checkpoint_best.pth"
    wider = settings(vit="{embed_dim: 64, depth: 2, num_heads: 2, patch_size: 16}", pretrained=other)
    assert "of another architecture" in refused(arguments, *out, *wider)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_truncated_image(arguments, world, tmp_path, num_workers):
    shutil.copytree(world / "images", tmp_path / "images")
    image = tmp_path / "images/train/0000003.jpg"
    image.write_bytes(image.read_bytes()[:300])
    roots = settings(image_root=tmp_path, num_workers=num_workers)
    done = run(SCRIPT, *arguments, "--output_dir", tmp_path / "out", *roots, check=False)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(told) == 1 and "Traceback" not in done.stderr
    assert "0000003.jpg cannot be read" in told[0]
