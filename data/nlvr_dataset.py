"""The released data/nlvr_dataset.py."""

from released.datasets import nlvr_dataset

__all__ = ["nlvr_dataset"]
