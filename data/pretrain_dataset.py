"""The released data/pretrain_dataset.py."""

from released.datasets import pretrain_dataset

__all__ = ["pretrain_dataset"]
