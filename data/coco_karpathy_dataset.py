"""The released data/coco_karpathy_dataset.py."""

from released.datasets import coco_karpathy_caption_eval, coco_karpathy_retrieval_eval, coco_karpathy_train

__all__ = ["coco_karpathy_caption_eval", "coco_karpathy_retrieval_eval", "coco_karpathy_train"]
