"""Training sets mixed by ratio."""

import json
from collections import Counter

import pytest
from scripts import TINY, run, settings

from data import make_loaders
from data.mixture import Mixture, MixtureSampler
from miniature.writing import write_miniature
from utils import UserError


def sampler(ratios, lengths=(6, 10), **settings):
    return MixtureSampler(Mixture([range(length) for length in lengths], ratios), **settings)


def epoch(samplers, number):
    for one in samplers:
        one.set_position(number)
    return [index for one in samplers for _, index in one]


def test_an_epoch_has_the_ratios():
    order = epoch([sampler([3, 1])], 0)
    counts = Counter(index < 6 for index in order)
    assert (counts[True], counts[False]) == (12, 4)
    assert Counter(index for index in order if index < 6) == dict.fromkeys(range(6), 2)
    assert [index < 6 for index in order] != sorted((index < 6 for index in order), reverse=True)


def test_a_dataset_is_read_to_its_end_before_a_sample_comes_again():
    """A share of 4 of 16 samples reads the 10 samples of the second dataset in 2.5 epochs."""
    orders = [[index for index in epoch([sampler([3, 1])], number) if index >= 6] for number in range(5)]
    assert Counter(sum(orders[:2], [])).most_common(1)[0][1] == 1
    assert Counter(sum(orders, [])) == dict.fromkeys(range(6, 16), 2)
    assert orders[0] != orders[1]


def test_processes_share_an_epoch_and_a_pass_begins_anywhere():
    whole = epoch([sampler([1, 2], seed=3)], 2)
    parts = [sampler([1, 2], num_replicas=2, rank=rank, seed=3) for rank in range(2)]
    assert sorted(epoch(parts, 2)) == sorted(whole) and list(epoch(parts[:1], 2)) == whole[::2]
    parts[0].set_position(2, 3)
    assert [index for _, index in parts[0]] == whole[::2][3:]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return write_miniature(folder, 2, num_train=12, num_val=6, num_test=4, num_web=8)


def config(world, **more):
    roots = dict(image_root=world, vqa_root=world, vg_root=world, ann_root=world / "annotations", prompt="")
    return roots | dict(image_size=16, augment=False, batch_size=4, batch_size_train=4, num_workers=0) | more


@pytest.mark.parametrize(
    ("task", "mix"),
    [
        ("caption_coco", {"coco_karpathy_train.json": 1, "coco_karpathy_val.json": 3}),
        ("vqa", {"vqa_train": 1, "vg_qa": 3}),
        ("pretrain", {"pretrain_human.json": 1, "pretrain_web.json": 3}),
    ],
)
def test_every_task_mixes(world, task, mix):
    if task == "pretrain":
        mix = {str(world / "annotations" / name): ratio for name, ratio in mix.items()}
    loader = make_loaders(task, config(world, train_mix=mix), ["train"])["train"]
    first, second = loader.dataset.dataset.lengths
    order = [index for _, index in loader.sampler]
    assert len(order) == first + second
    assert sum(index < first for index in order) == pytest.approx(len(order) / 4, abs=0.51)
    batch = next(iter(loader))
    assert batch["image"].shape == (4, 3, 16, 16) and (task != "vqa" or len(batch["answer"]) == sum(batch["n"]))


@pytest.mark.parametrize("ratio", [0, -1, "much", True])
def test_a_ratio_is_a_number_above_0(world, ratio):
    with pytest.raises(UserError, match=r"train_mix has the ratio .* for vqa_train; expected a number above 0"):
        make_loaders("vqa", config(world, train_mix={"vqa_train": ratio}), ["train"])


def test_only_lists_are_mixed(world):
    mix = {str(world / "annotations/pretrain_web.json"): 1}
    with pytest.raises(UserError, match="leave laion_path and tar shards out"):
        make_loaders("pretrain", config(world, train_mix=mix, laion_path=str(world / "annotations")), ["train"])


def test_training_on_a_mixture(world, tmp_path):
    mix = "{coco_karpathy_train.json: 3, coco_karpathy_val.json: 1}"
    options = settings(
        image_root=world, ann_root=world / "annotations", coco_gt_root=world / "annotations", train_mix=mix,
        batch_size=6, java=False, max_epoch=1,
    )  # fmt: skip
    sizes = [part for value in TINY for part in ("--set", value)]
    run("train_caption.py", "--config", "configs/miniature/caption.yaml", "--output_dir", tmp_path, *sizes, *options)
    row = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert row["train_loss_lm"] < 10 and "coco_karpathy_val.json: 1" in (tmp_path / "config.yaml").read_text()
