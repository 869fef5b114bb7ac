"""What a training run holds: the model, its optimizer, the check of its steps, its progress and its meters."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from launch.config import TrainConfig
from launch.run import Run
from models.cpu_products import use_cpu_products
from models.med import TextDecoder
from training import adapters, parallel
from training.check import StepCheck
from training.grad_checkpoint import set_grad_checkpointing
from training.log import TrainLog
from training.optimizer import create_optimizer
from training.progress import Progress
from utils import UserError

MAX_GRAPHS = 64  # of one layer: text alone or with an image, causal or not, with gradients or without


@dataclass
class TrainState:
    """A training run."""

    config: TrainConfig  # as given, with the settings of loaded adapters
    model: nn.Module  # on its device
    wrapped: nn.Module  # what computes the losses: the model, or the model in DistributedDataParallel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of gradients; does nothing unless `amp` is fp16
    check: StepCheck
    log: TrainLog
    progress: Progress
    best: dict[str, Any] = field(default_factory=dict)  # "quality", "epoch" and scores of the best epoch so far

    def gradient_sync(self, is_last: bool) -> AbstractContextManager:
        """Return the context of a batch: gradients are averaged over processes with the last batch of a step."""
        return nullcontext() if is_last or self.wrapped is self.model else self.wrapped.no_sync()

    @torch.no_grad()
    def update_weights(self, step: int, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """Check losses and gradients, clip, step; return the norm before clipping, 0 where fp16 has overflowed."""
        self.scaler.unscale_(self.optimizer)
        grad_norm = parallel.finish_gradients(self.model, self.config.clip_grad)
        # fused AdamW skips the update on the device where found_inf is 1
        self.optimizer.grad_scale, self.optimizer.found_inf = None, self.check.update(losses, grad_norm, step)
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm.nan_to_num(0.0, 0.0) if self.scaler.is_enabled() else grad_norm


def create_state(run: Run, config: TrainConfig, model: nn.Module, num_batches: int) -> TrainState:
    """Prepare a model, on any device, for training with so many batches an epoch; UserError if settings do not fit."""
    if num_batches < config.grad_accum:
        raise UserError(
            f"the training data fill {num_batches} batches and a step needs {config.grad_accum}; "
            "use a smaller batch size, or more data"
        )
    if config.amp == "fp16" and config.parallel == "fsdp":
        raise UserError("amp: fp16 does not go with parallel: fsdp; set amp: bf16, or parallel: ddp")
    config = adapters.freeze_and_adapt(model, config, run)
    model = prepare_model(model, config, run.device)
    wrapped = parallel.wrap(model, config.parallel, run.device)
    if config.compile:
        compile_blocks(model)
    use_scaler = config.amp == "fp16"
    return TrainState(
        config,
        model,
        wrapped,
        create_optimizer(model, config.init_lr, config.weight_decay, config.decay_norms, config.lr_layer_decay),
        torch.amp.GradScaler(run.device.type, enabled=use_scaler),
        StepCheck(run.device, overflow_is_normal=use_scaler),
        TrainLog(run, config.tensorboard),
        Progress(num_batches // config.grad_accum, config.max_epoch),
    )


def prepare_model(model: nn.Module, config: Any, device: torch.device) -> nn.Module:
    """Move a model to its device; set gradient checkpointing and the matrix products of a CPU."""
    model = model.to(device)
    set_grad_checkpointing(model, config)
    return use_cpu_products(model, config.cpu_products)


def compile_blocks(model: nn.Module, **options: Any) -> int:
    """Compile the ViT's blocks and the text layers, or a sharded model's units, each by itself; return their number."""
    torch._dynamo.config.cache_size_limit = MAX_GRAPHS
    if parallel.is_sharded(model):
        return parallel.compile_units(model, **options)
    for part in model.modules():
        if isinstance(part, TextDecoder):
            part.static_cache = True  # one graph for all lengths
    parts = [part for name, part in model.named_modules() if name.split(".")[-2:-1] in (["blocks"], ["layer"])]
    for part in parts:
        part.compile(**options)
    return len(parts)
