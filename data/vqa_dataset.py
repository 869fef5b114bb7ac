"""The released data/vqa_dataset.py."""

from released.datasets import vqa_collate_fn, vqa_dataset

__all__ = ["vqa_collate_fn", "vqa_dataset"]
