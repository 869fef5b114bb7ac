"""The released data/flickr30k_dataset.py."""

from released.datasets import flickr30k_retrieval_eval, flickr30k_train

__all__ = ["flickr30k_retrieval_eval", "flickr30k_train"]
