"""Training on several datasets, each drawn from in a given proportion."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset

from data.sampler import EpochSampler
from utils import UserError


class Mixture(ConcatDataset):
    """Several datasets as one; `MixtureSampler` reads them by their ratios."""

    def __init__(self, datasets: Sequence[Dataset], ratios: Sequence[float]):
        super().__init__(datasets)
        self.lengths, self.ratios = [len(dataset) for dataset in datasets], list(ratios)


def read_ratios(mix: Mapping[Any, Any]) -> dict[str, float]:
    """Return the ratios of the config's `train_mix`, by file; UserError if one is not a number above 0."""
    for file, ratio in mix.items():
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < float("inf"):
            raise UserError(f"train_mix has the ratio {ratio!r} for {file}; expected a number above 0")
    return {str(file): float(ratio) for file, ratio in mix.items()}


class MixtureSampler(EpochSampler):
    """Training order over a `Mixture`: an epoch has as many samples as all datasets together, in their ratios.

    Every dataset is read in a shuffled order from its beginning to its end, which epochs continue, and then again in
    another order: no sample comes a second time before all samples of its dataset have come.
    """

    def __init__(self, mixture: Mixture, num_replicas: int = 1, rank: int = 0, seed: int = 0):
        super().__init__(len(mixture), num_replicas, rank, True, seed)
        self.lengths = mixture.lengths
        shares = torch.tensor([0.0, *mixture.ratios], dtype=torch.float64).cumsum(0)
        # samples of each dataset in an epoch
        self.counts = (shares / shares[-1] * len(mixture)).round().long().diff().tolist()

    def order(self, generator: torch.Generator) -> torch.Tensor:
        """Return the samples of the epoch, int64 (samples,)."""
        starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        parts = [start + self.walk(number) for number, start in enumerate(starts[:-1])]
        mixed = torch.cat(parts)
        return mixed[torch.randperm(len(mixed), generator=generator)]

    def walk(self, number: int) -> torch.Tensor:
        """Return the samples of one dataset in this epoch, int64 (count,), by its own numbers."""
        length, count = self.lengths[number], self.counts[number]
        first = self.epoch * count
        passes = range(first // length, -(-(first + count) // length))
        orders = [self.shuffled(length, number, turn) for turn in passes]
        return torch.cat([torch.empty(0, dtype=torch.long), *orders])[first % length :][:count]

    def shuffled(self, length: int, number: int, turn: int) -> torch.Tensor:
        """Return the order of one pass over a dataset."""
        generator = torch.Generator().manual_seed(hash((self.seed, number, turn)) % 2**63)
        return torch.randperm(length, generator=generator)
