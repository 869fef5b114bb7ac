"""pretrain.py on tar shards: the losses of a list in the same order, and a kill in the middle of a shard."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from scripts import TINY, lines, run_and_signal, run_here, settings

from miniature.writing import write_miniature

SEED = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two shards of 12 pairs, and the list of them that the seed's first epoch shuffles into the shards' order."""
    folder = write_miniature(tmp_path_factory.mktemp("world"), 1, num_train=24, num_val=2, num_test=2, num_web=0)
    rows = json.loads((folder / "annotations" / "pretrain_human.json").read_text())[:24]
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number, row in enumerate(rows[12 * shard :][:12]):
                text = folder / "text"
                text.write_text(row["caption"])
                tar.add(folder / row["image"], f"{number:03d}{Path(row['image']).suffix}")
                tar.add(text, f"{number:03d}.txt")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(SEED * 1_000_003))
    shuffled = [row for _, row in sorted(zip(order.tolist(), rows, strict=True), key=lambda pair: pair[0])]
    (folder / "list.json").write_text(json.dumps(shuffled))
    return folder


def arguments(world, output, name, **more):
    sizes = [part for value in TINY for part in ("--set", value)]
    values = dict(image_root=world, train_file=f"[{world / name}]", batch_size=2, queue_size=16, log_every=1) | more
    return ["--config", "configs/miniature/pretrain.yaml", "--output_dir", output, "--seed", SEED, *sizes,
            *settings(**values)]  # fmt: skip


def test_a_list_and_shards_give_the_same_losses_in_the_same_order(world, tmp_path):
    for name in ("list.json", "*.tar"):
        words = arguments(world, tmp_path / name[0], name, max_epoch=1, shuffle_buffer=1)
        assert run_here("pretrain.py", *words)[0] == 0
    curves = [(tmp_path / folder / "curve.jsonl").read_text() for folder in "l*"]
    assert curves[0] == curves[1] and len(curves[0].splitlines()) == 12


def test_killed_in_the_middle_of_a_shard_and_continued(world, tmp_path):
    more = dict(max_epoch=2, shuffle_buffer=4, augment=True, num_workers=1, save_every=1)
    whole, broken = (arguments(world, tmp_path / name, "*.tar", **more) for name in ("whole", "broken"))
    assert run_here("pretrain.py", *whole)[0] == 0
    run_and_signal("pretrain.py", *broken, when=lambda: lines(tmp_path / "broken" / "curve.jsonl") >= 2)
    saved = torch.load(tmp_path / "broken" / "checkpoint_last.pth", weights_only=True)
    assert 1 <= saved["progress"]["step"] < 24
    assert run_here("pretrain.py", *broken, "--resume")[0] == 0
    one, other = (torch.load(tmp_path / f / "checkpoint_last.pth", weights_only=True) for f in ("whole", "broken"))
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    assert (tmp_path / "whole" / "curve.jsonl").read_text() == (tmp_path / "broken" / "curve.jsonl").read_text()
