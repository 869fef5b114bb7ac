"""Augmentations against the golden images, and the randomness of training samples."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from data import make_loader, randaugment
from data.randaugment import OPERATIONS, RandomAugment, apply_operation
from data.sampler import EpochSampler, SeededDataset
from data.transforms import MEAN, STD, to_tensor, train_transform
from formula import arrays


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name, sign):
    image = arrays()["aug/picture"]
    found = np.asarray(apply_operation(Image.fromarray(image), name, 5, sign)).astype(int)
    assert np.abs(found - arrays()[f"aug/{name}{sign:+d}"].astype(int)).max() <= 1  # the frame's edge included


@pytest.mark.parametrize("offset", [0.0, 5.0, -5.0, 3.0, 70.0, 2.5])
def test_whole_pixels_are_moved_as_by_interpolation(offset):
    image = Image.fromarray(arrays()["aug/picture"])
    for move, place in ((randaugment.translate_x, (offset, 0)), (randaugment.translate_y, (0, offset))):
        expected = randaugment.affine(image, 1, 0, place[0], 0, 1, place[1])
        assert np.array_equal(np.asarray(move(image, offset)), np.asarray(expected))


def test_level_5_neither_brightens_nor_sharpens():
    """Its factor is 1, with which Pillow returns an equal image."""
    image = Image.fromarray(arrays()["aug/picture"])
    for name, operation in (("Brightness", randaugment.brightness), ("Sharpness", randaugment.sharpness)):
        assert apply_operation(image, name, 5, 1) is image
        assert np.array_equal(np.asarray(operation(image, 1.0)), np.asarray(image))
        assert not np.array_equal(np.asarray(apply_operation(image, name, 6, 1)), np.asarray(image))


def test_tensors_are_those_of_torchvision():
    values = np.arange(256 * 3, dtype=np.int64).reshape(32, 8, 3) * 7919 % 256  # each value in each channel
    image = Image.fromarray(values.astype(np.uint8))
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    assert torch.equal(to_tensor(image), theirs(image))  # bit for bit


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
        counts["changed"] += RandomAugment(level=4)(image) is not image
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
    shards = [list(make_loader(range(7), 2, False, processes=(3, rank)).sampler) for rank in range(3)]
    assert shards == [[0, 3, 6], [1, 4], [2, 5]]
