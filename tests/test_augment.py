"""Augmentations against the golden images, and the randomness of training samples."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from data import randaugment
from data.randaugment import OPERATIONS, RandomAugment, apply_operation
from data.sampler import EpochSampler, SeededDataset, ShardSampler
from data.transforms import train_transform
from formula import arrays


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name, sign):
    image = arrays()["aug/picture"]
    found = np.asarray(apply_operation(Image.fromarray(image), name, 5, sign)).astype(int)
    assert np.abs(found - arrays()[f"aug/{name}{sign:+d}"].astype(int)).max() <= 1  # the frame's edge included


class Images:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        noise = np.random.RandomState(index).randint(0, 255, (40, 40, 3), np.uint8)
        return train_transform(32)(Image.fromarray(noise))


def test_a_sample_depends_on_seed_epoch_and_index_only():
    first = SeededDataset(Images(), 1)
    state, torch_state = random.getstate(), torch.get_rng_state()
    sample = first[0, 3]
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)
    random.random(), torch.rand(1)
    assert torch.equal(first[0, 3], sample)
    assert not torch.equal(first[1, 3], sample)
    assert not torch.equal(SeededDataset(Images(), 2)[0, 3], sample)


def test_half_of_the_drawn_operations_are_applied():
    random.seed(0)
    counts = {"changed": 0}
    image = Image.fromarray(arrays()["aug/picture"])
    for _ in range(400):
        counts["changed"] += RandomAugment()(image) is not image
    # untouched: twice (not applied, or Identity, which returns the image itself): (1/2 + 1/2 * 1/10) ** 2 = 0.3025
    assert counts["changed"] / 400 == pytest.approx(1 - 0.3025, abs=0.07)


def test_geometric_operations_go_both_ways(monkeypatch):
    offsets = set()
    operation = lambda image, by, fill: offsets.add(by) or image  # noqa: E731
    monkeypatch.setattr(randaugment, "OPERATIONS", {"TranslateX": (operation, 10.0)})
    for _ in range(40):
        RandomAugment()(None)
    assert offsets == {5.0, -5.0}


def test_epoch_sampler():
    samplers = [EpochSampler(11, 2, rank, seed=3) for rank in range(2)]
    whole = [list(sampler) for sampler in samplers]
    assert len(whole[0]) == len(whole[1]) == len(samplers[0]) == 5
    assert len({index for rows in whole for _, index in rows}) == 10
    samplers[0].set_position(0, 2)
    assert list(samplers[0]) == whole[0][2:]
    samplers[0].set_position(1)
    again = list(samplers[0])
    assert all(epoch == 1 for epoch, _ in again) and [i for _, i in again] != [i for _, i in whole[0]]


def test_shards_are_a_partition():
    shards = [list(ShardSampler(7, 3, rank)) for rank in range(3)]
    assert shards == [[0, 3, 6], [1, 4], [2, 5]]
