"""The released data/utils.py."""

from data.text import pre_caption, pre_question
from released.utils import coco_caption_eval, save_result

__all__ = ["coco_caption_eval", "pre_caption", "pre_question", "save_result"]
