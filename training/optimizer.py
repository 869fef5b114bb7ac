"""The optimizer, and learning rates as functions of progress."""

import math

import torch
from torch import nn

from training.parallel import split_params


def cosine_lr(epoch: float, max_epoch: float, init_lr: float, min_lr: float) -> float:
    """Half a cosine from `init_lr` at 0 to `min_lr` at `max_epoch`."""
    return (init_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * epoch / max_epoch)) + min_lr


def warmup_lr(step: int, max_step: int, init_lr: float, max_lr: float) -> float:
    """Linear from `init_lr` at step 0 to `max_lr` at `max_step`, and `max_lr` from there on."""
    return min(max_lr, init_lr + (max_lr - init_lr) * step / max(max_step, 1))


def step_lr(epoch: int, init_lr: float, min_lr: float, decay_rate: float) -> float:
    """`init_lr` times `decay_rate` for every finished epoch, not under `min_lr`."""
    return max(min_lr, init_lr * decay_rate**epoch)


def create_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on every trainable parameter, with one decay, in one fused call per step."""
    params = [{"params": group} for group in split_params([p for p in model.parameters() if p.requires_grad])]
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all groups one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
