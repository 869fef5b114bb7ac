"""Which samples a process reads, in which order, and with which random numbers.

A training sample's augmentation depends on the seed, the epoch and the sample only: not on the number of workers,
nor on where a run was interrupted.
"""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler


class EpochSampler(Sampler):
    """Training order of one process of `num_replicas`, which all take as many samples: keys (epoch, index)."""

    def __init__(self, num_items: int, num_replicas: int = 1, rank: int = 0, shuffle: bool = True, seed: int = 0):
        self.num_items, self.num_replicas, self.rank = num_items, num_replicas, rank
        self.shuffle, self.seed = shuffle, seed
        self.epoch, self.num_consumed = 0, 0

    def set_position(self, epoch: int, num_consumed: int = 0) -> None:
        """Begin the next pass in `epoch`, after the first `num_consumed` samples of this process."""
        self.epoch, self.num_consumed = epoch, num_consumed

    def __len__(self) -> int:
        return self.num_items // self.num_replicas

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = self.order(torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch))
        own = order[self.rank :: self.num_replicas][: len(self)]
        for index in own[self.num_consumed :].tolist():
            yield self.epoch, index

    def order(self, generator: torch.Generator) -> torch.Tensor:
        """Return the samples of the epoch for all processes, int64 (samples,)."""
        return torch.randperm(self.num_items, generator=generator) if self.shuffle else torch.arange(self.num_items)


class SeededDataset(Dataset):
    """A dataset read by (epoch, index), with random numbers of that sample's own.

    A dataset with a method `at(epoch, index)` is told the epoch as well, one with a `seed` is given it.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed = dataset, seed
        if hasattr(dataset, "seed"):
            dataset.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        sample_seed = hash((self.seed, epoch, index)) % 2**63
        state, torch_state = random.getstate(), torch.get_rng_state()
        try:
            random.seed(sample_seed)
            torch.default_generator.manual_seed(sample_seed)  # the CPU's alone, which is ten times faster
            return self.dataset.at(epoch, index) if hasattr(self.dataset, "at") else self.dataset[index]
        finally:
            random.setstate(state)
            torch.set_rng_state(torch_state)
