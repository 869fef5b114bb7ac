"""The released data/video_dataset.py."""

from released.datasets import ImageNorm, VideoDataset, load_jsonl

__all__ = ["ImageNorm", "VideoDataset", "load_jsonl"]
