"""AdamW, and the learning rate as a function of progress."""

import math

import torch
from torch import nn

from launch.config import TrainConfig
from training.parallel import split_params
from training.progress import Progress
from utils import UserError


def cosine_lr(epoch: float, max_epoch: float, init_lr: float, min_lr: float) -> float:
    """Half a cosine from `init_lr` at 0 to `min_lr` at `max_epoch`."""
    return (init_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * epoch / max_epoch)) + min_lr


def warmup_lr(step: int, max_step: int, init_lr: float, max_lr: float) -> float:
    """Linear from `init_lr` at step 0 to `max_lr` at `max_step`, constant after it."""
    return min(max_lr, init_lr + (max_lr - init_lr) * step / max(max_step, 1))


def step_lr(epoch: int, init_lr: float, min_lr: float, decay_rate: float) -> float:
    """`init_lr` times `decay_rate` for every finished epoch, at least `min_lr`."""
    return max(min_lr, init_lr * decay_rate**epoch)


def cosine_schedule(config: TrainConfig, progress: Progress) -> float:
    """Cosine from `init_lr` to `min_lr`: updated every epoch, as released, or every step after a linear warm-up."""
    if config.schedule == "epoch":
        return cosine_lr(progress.epoch, progress.max_epoch, config.init_lr, config.min_lr)
    if config.schedule != "step":
        raise UserError(f"schedule is {config.schedule!r}; expected 'epoch' or 'step'")
    if progress.step < config.warmup:
        return warmup_lr(progress.step + 1, config.warmup, 0.0, config.init_lr)
    num_steps = max(progress.total_steps - config.warmup, 1)
    return cosine_lr(progress.step - config.warmup, num_steps, config.init_lr, config.min_lr)


def create_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return a fused AdamW over all trainable parameters, all with the same decay, as released."""
    params = [{"params": group} for group in split_params([p for p in model.parameters() if p.requires_grad])]
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
