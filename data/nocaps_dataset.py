"""The released data/nocaps_dataset.py."""

from released.datasets import nocaps_eval

__all__ = ["nocaps_eval"]
