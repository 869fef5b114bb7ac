"""AdamW, and the learning rate as a function of progress."""

import math

import torch
from torch import nn

from launch.config import TrainConfig
from training.parallel import split_params
from training.progress import Progress


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
    if progress.step < config.warmup:
        return warmup_lr(progress.step + 1, config.warmup, 0.0, config.init_lr)
    num_steps = max(progress.steps_per_epoch * progress.max_epoch - config.warmup, 1)
    return cosine_lr(progress.step - config.warmup, num_steps, config.init_lr, config.min_lr)


def create_optimizer(
    model: nn.Module, lr: float, weight_decay: float, decay_norms: bool = True, lr_layer_decay: float = 1.0
) -> torch.optim.AdamW:
    """Return a fused AdamW over all trainable parameters.

    Without `decay_norms` biases and norms, parameters of one dimension, have no weight decay. The learning rate of a
    ViT block has the factor `lr_layer_decay` to the power of its distance from the output.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if decay_norms or parameter.dim() > 1 else 0.0
            scale = lr_layer_decay ** distance_from_output(name, model) if lr_layer_decay != 1.0 else 1.0
            groups.setdefault((decay, scale), []).append(parameter)
    params = [
        {"params": part, "weight_decay": decay, "lr": lr * scale, "lr_scale": scale}
        for (decay, scale), group in groups.items()
        for part in split_params(group)
    ]
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)


def distance_from_output(name: str, model: nn.Module) -> int:
    """Return the number of ViT blocks from a parameter to the output of the ViT, 0 for parameters of other parts."""
    encoder, *rest = name.split(".")
    if not encoder.startswith("visual_encoder"):
        return 0
    depth = len(getattr(model, encoder).blocks)
    if rest[0] == "blocks":
        return depth - int(rest[1])
    return 0 if rest[0] == "norm" else depth + 1


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups, each times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
