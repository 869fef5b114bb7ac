"""Ranges and choices of the settings in launch/config.py, checked before a run does anything else."""

import operator
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from utils import UserError

RANGES = {
    "adapter_alpha": "> 0",
    "adapter_rank": ">= 0",
    "alpha": ">= 0 and <= 1",
    "batch_size": ">= 1",
    "batch_size_test": ">= 1",
    "batch_size_train": ">= 1",
    "clip_grad": ">= 0",
    "drop_path_rate": ">= 0 and < 1",
    "embed_dim": ">= 1",
    "eval_every": ">= 1",
    "grad_accum": ">= 1",
    "hang_minutes": ">= 0",
    "image_size": ">= 1",
    "init_lr": ">= 0",
    "k_test": ">= 1",
    "log_every": ">= 1",
    "lr_decay_rate": "> 0 and <= 1",
    "lr_layer_decay": "> 0 and <= 1",
    "max_bad_images": ">= 0",
    "max_epoch": ">= 1",
    "max_length": ">= 1",
    "min_length": ">= 0",
    "min_lr": ">= 0",
    "num_beams": ">= 1",
    "num_captions": ">= 1",
    "num_frm_test": ">= 1",
    "num_workers": ">= 0",
    "queue_size": ">= 1",
    "repetition_penalty": "> 0",
    "save_every": ">= 0",
    "shard_pairs": ">= 0",
    "shard_size": ">= 1",
    "shuffle_buffer": ">= 1",
    "temperature": "> 0",
    "threshold": ">= 0 and <= 1",
    "top_p": "> 0 and <= 1",
    "vit_ckpt_layer": ">= 0",
    "warmup": ">= 0",
    "warmup_lr": ">= 0",
    "warmup_steps": ">= 0",
    "weight_decay": ">= 0",
}
CHOICES = {
    "amp": ("", "bf16", "fp16", "auto"),
    "cpu_products": ("auto", "onednn", "torch"),
    "dataset": ("coco", "flickr"),
    "grad_ckpt": ("torch", "fairscale"),
    "inference": ("rank", "generate", "choices"),
    "init": ("released", "random"),
    "parallel": ("ddp", "fsdp"),
    "schedule": ("epoch", "step"),
    "scoring": ("vqa", "aokvqa", "exact"),
    "stage": ("both", "caption", "filter"),
}
MAX_NUMBER = 1e15
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def check_ranges(config: Any, places: Mapping[str, str]) -> None:
    """Check the numbers and choices of a configuration.

    Args:
        config: a dataclass of settings.
        places: where each key was set, for the message; a key that was not set has its default.

    Raises:
        UserError: a value is out of its range, or not finite, or none of its choices.
    """
    for key in (field.name for field in fields(config)):
        value, place = config[key], f"{places.get(key, 'default')}: {key}"
        if isinstance(value, int | float) and not isinstance(value, bool) and not in_range(value, RANGES[key]):
            raise UserError(f"{place} is {value}; expected a number {RANGES[key]}")
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{place} is {value!r}; expected one of {', '.join(map(repr, CHOICES[key]))}")
    if config.get("min_length", 0) > config.get("max_length", MAX_NUMBER):
        place = places.get("min_length") or places.get("max_length")
        lengths = f"min_length is {config.min_length} and max_length {config.max_length}"
        raise UserError(f"{place}: {lengths}; raise max_length")


def in_range(value: float, text: str) -> bool:
    """Return True if a finite number is in a range such as "> 0 and <= 1"."""
    parts = (part.split() for part in text.split(" and "))
    return abs(value) < MAX_NUMBER and all(COMPARISONS[sign](value, float(bound)) for sign, bound in parts)
