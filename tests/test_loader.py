"""Loaders: the same samples for any number of workers, from any point of an epoch."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from data import collate, make_loader, prefetch
from data.transforms import open_image, train_transform
from utils import UserError, user_message


class Noise:
    """Augmented images of noise."""

    def __init__(self, length=11):
        self.length, self.transform = length, train_transform(16)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        noise = np.random.RandomState(index).randint(0, 255, (24, 24, 3), np.uint8)
        return {"image": self.transform(Image.fromarray(noise)), "index": index}


def loader(num_workers=0, shuffle=True, dataset=None, rank=0, world=1):
    return make_loader(dataset or Noise(), 2, shuffle, num_workers, seed=7, processes=(world, rank))


def read(batches):
    return [(batch["index"].tolist(), batch["image"]) for batch in batches]


def same(first, second):
    pairs = list(zip(first, second, strict=True))
    return all(i == j and torch.equal(x, y) for (i, x), (j, y) in pairs)


def test_workers_resume_and_epochs():
    plain, working = loader(), loader(num_workers=2)
    epochs = []
    for epoch in range(2):
        for one in (plain, working):
            one.sampler.set_position(epoch)
        epochs.append(read(plain))
        assert len(epochs[-1]) == len(plain) == 5  # the eleventh sample is dropped
        assert same(epochs[-1], read(working))
    assert not same(*epochs)
    for one in (plain, working):  # the workers are those of before
        one.sampler.set_position(0, num_consumed=4)
        assert same(read(one), epochs[0][2:])


def test_an_epoch_that_is_left_halfway_leaves_nothing_behind():
    working = loader(num_workers=1)
    next(iter(working))
    working.sampler.set_position(1)
    plain = loader()
    plain.sampler.set_position(1)
    assert same(read(working), read(plain))


def test_loading_leaves_the_global_random_numbers_alone():
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    read(loader())
    read(loader(num_workers=1))
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()


def test_processes_share_an_epoch_and_an_evaluation():
    seen = [i for rank in range(2) for numbers, _ in read(loader(rank=rank, world=2)) for i in numbers]
    assert len(seen) == len(set(seen)) == 8
    shards = [[i for numbers, _ in read(loader(shuffle=False, rank=r, world=2)) for i in numbers] for r in range(2)]
    assert shards == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9]]


class Missing:
    """One image that is not there."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"image": open_image(self.path)}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_error_of_a_worker_is_one_line(tmp_path, num_workers, shuffle):
    state = random.getstate()
    batches = iter(loader(num_workers, shuffle, Missing(tmp_path / "absent.jpg")))
    with pytest.raises(UserError) as error:
        next(batches)
    if num_workers:  # else the collector of cycles ends them, which takes 5 s
        batches._shutdown_workers()
    expected = f"image {tmp_path / 'absent.jpg'} does not exist; correct its path, or image_root"
    assert user_message(error.value) == expected
    assert random.getstate() == state


def test_collate():
    row = {"image": torch.ones(3, 2, 2), "idx": 1, "text": "a", "image_id": 5, "long": 2**70}
    batch = collate([row, {**row, "idx": 2, "image_id": "x"}])
    assert batch["image"].shape == (2, 3, 2, 2)
    assert batch["idx"].dtype == torch.int64 and batch["idx"].tolist() == [1, 2]
    assert (batch["text"], batch["image_id"], batch["long"]) == (["a", "a"], [5, "x"], [2**70] * 2)


def test_prefetch_yields_every_batch_once_and_leaves_ids_on_the_host():
    images = [torch.full((2, 3), float(i)) for i in range(3)]
    batches = [{"image": x, "image_id": torch.tensor([i, i]), "text": ["a"]} for i, x in enumerate(images)]
    pulled = []
    found = []
    for batch in prefetch((pulled.append(i) or b for i, b in enumerate(batches)), torch.device("meta")):
        found.append((batch["image"].device.type, batch["image_id"].device.type, batch["image_id"][0].item()))
        assert pulled[-1] == min(len(found), 2), "the next batch is on its way"
    assert found == [("meta", "cpu", i) for i in range(3)]
    assert list(prefetch([], torch.device("cpu"))) == []
