"""The training loop of every script."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from launch.config import TrainConfig
from launch.run import Interrupted, Run
from models.precision import autocast
from training import parallel
from training.check import stop_on_sigterm
from training.checkpoint import check_space, restore, save, save_best
from training.optimizer import cosine_schedule, set_lr
from training.progress import Progress
from training.state import TrainState, create_state
from utils import UserError, get_world_size, on_main_process

Batch = dict[str, Any]
Losses = dict[str, torch.Tensor]
Scores = dict[str, float]
READ_EVERY_STEP = ("cpu",)  # devices where reading is free; values of others are read when the log is due


@dataclass(frozen=True)
class Task:
    """What a script adds to the training loop.

    Attributes:
        train_step: (model, batch on the device, progress) -> named losses, scalars; their sum is minimised. With
            `candidates`, the fourth argument is this batch's element of the list that `candidates` returns.
        evaluate: (model) -> named scores, equal on all ranks, such as "val_..." and "test_..."; None: none.
        best_metric: (scores) -> what the best checkpoint maximises; None: the latest is the best.
        schedule: (config, progress) -> learning rate of a step.
        candidates: (model, batches of a step) -> what the contrastive loss of each compares it with, where several
            batches are contrasted as one (`itc_cached`); None: each batch by itself.
        inspect_batch: (batch) -> a reason to end the run, "" to go on; on any rank, it ends all.
        inspect_losses: (mean losses since the last call, progress) -> a warning, "" for none.
    """

    train_step: Callable[..., Losses]
    evaluate: Callable[[nn.Module], Scores] | None = None
    best_metric: Callable[[Scores], float] | None = None
    schedule: Callable[[Any, Progress], float] = cosine_schedule
    candidates: Callable[[nn.Module, list[Batch]], list[Any]] | None = None
    inspect_batch: Callable[[Batch], str] = lambda batch: ""
    inspect_losses: Callable[[dict[str, float], Progress], str] = lambda means, progress: ""


def fit(run: Run, config: TrainConfig, model: nn.Module, loader: DataLoader, task: Task) -> Scores:
    """Train a model: log and save every epoch, evaluate every `eval_every` epochs, keep the best and last weights.

    The sampler of the loader is a `data.sampler.EpochSampler`. Return the best epoch's scores, with "epoch" and
    "quality", the value of `best_metric`. UserError if a loss or a gradient is not finite, the data do not fill a step,
    or saving failed; Interrupted if SIGTERM came, after the run has been saved.
    """
    state = create_state(run, config, model, len(loader))
    on_main_process(lambda: check_space(state, run.output_dir))
    if run.resume:
        restore(state, run, run.resume)
    config, model, progress, log = state.config, state.model, state.progress, state.log
    with stop_on_sigterm(state.check):
        while progress.epoch < config.max_epoch:
            model.train()
            batches = read_batches(state, run, loader, task)
            while not progress.epoch_is_done:
                run.watchdog.enter("data loading", progress.step)
                step_batches = [next(batches) for _ in range(config.grad_accum)]
                run.watchdog.enter("a step", progress.step)
                lr = task.schedule(config, progress)
                set_lr(state.optimizer, lr)
                values = take_step(state, task, step_batches)
                log.update({**values, "lr": lr})
                progress.finish_step()
                log_and_save(state, run, task)
            save(state, run)  # first, so that a kill during evaluation loses nothing
            scores = evaluate_epoch(state, run, task)
            keep_best(state, run, task, scores)
            log.write_epoch(scores)
            progress.finish_epoch()
            save(state, run)
    log.close()
    run.watchdog.enter("the report", progress.step)
    return state.best


def take_step(state: TrainState, task: Task, batches: list[Batch]) -> Losses:
    """Update the weights from `grad_accum` batches; return losses, their sum if several, and gradient norm."""
    config, device, num_batches = state.config, state.check.device, len(batches)
    if hasattr(state.model, "begin_step"):
        state.model.begin_step()  # momentum encoders and temperature change once per step
    extras: list[tuple] = [()] * num_batches
    if task.candidates is not None:
        with autocast(config.amp, device):
            extras = [(candidates,) for candidates in task.candidates(state.model, batches)]
    losses: Losses = {}
    for number, (batch, extra) in enumerate(zip(batches, extras, strict=True), 1):
        with state.gradient_sync(is_last=number == num_batches):
            with autocast(config.amp, device):
                parts = task.train_step(state.wrapped, batch, state.progress, *extra)
            state.scaler.scale(sum(parts.values()) / num_batches).backward()
        for name, value in parts.items():
            losses[name] = losses.get(name, 0.0) + value.detach().float() / num_batches
    grad_norm = state.update_weights(state.progress.step, losses)  # check, clip, step
    total = {"loss": sum(losses.values())} if len(losses) > 1 else {}
    return {**losses, **total, "grad_norm": grad_norm}


def read_batches(state: TrainState, run: Run, loader: DataLoader, task: Task) -> Iterator[Batch]:
    """Return the batches of the epoch that are left, on the device, and start the epoch's log."""
    progress, batch_size, accum = state.progress, loader.batch_size or 1, state.config.grad_accum
    loader.sampler.set_position(progress.epoch, progress.step_in_epoch * accum * batch_size)
    state.log.begin_epoch(progress, batch_size * accum * get_world_size())

    def inspect(batch: Batch) -> Batch:
        """Note a reason to end the run, and move a batch to the device."""
        state.check.problem = state.check.problem or task.inspect_batch(batch)
        return to_device(batch, run.device)

    return map(inspect, state.log.time_data(loader))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch's tensors to the device."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def log_and_save(state: TrainState, run: Run, task: Task) -> None:
    """Log, check and save, where each is due."""
    progress, config = state.progress, state.config
    log_is_due = progress.step % config.log_every == 0 or progress.epoch_is_done
    stop = (log_is_due or run.device.type in READ_EVERY_STEP) and state.check.read()
    if log_is_due:
        warning = task.inspect_losses(state.log.write_step(), progress)
        if warning:
            run.note(f"warning: {warning}")
        if state.scaler.is_enabled() and state.scaler.get_scale() < 1:
            raise UserError("gradients overflow in fp16 at any scale; set amp: bf16 or '', or lower init_lr")
    if stop:
        save(state, run)
        raise Interrupted(f"stopped and saved at step {progress.step}; continue with: {command_to_continue(run)}")
    if config.save_every and progress.step % config.save_every == 0:
        save(state, run)


def command_to_continue(run: Run) -> str:
    """Return the command that continues the run."""
    command = run.command.replace(" --overwrite", "")
    return command if " --resume" in command else f"{command} --resume"


def evaluate_epoch(state: TrainState, run: Run, task: Task) -> Scores:
    """Return the scores after an epoch, none if evaluation is not due; random numbers are left as they were."""
    epoch, config = state.progress.epoch + 1, state.config
    if task.evaluate is None or (epoch % config.eval_every and epoch != config.max_epoch):
        return {}
    state.model.eval()
    run.epoch = state.progress.epoch
    run.watchdog.enter("evaluation", state.progress.step)
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), autocast(config.amp, run.device):
        return task.evaluate(parallel.plain(state.model))


def keep_best(state: TrainState, run: Run, task: Task, scores: Scores) -> None:
    """Save the weights if they are the best so far."""
    if task.best_metric and not scores:
        return
    quality = task.best_metric(scores) if task.best_metric else state.progress.epoch
    if not state.best or quality > state.best["quality"]:
        state.best = {"quality": quality, "epoch": state.progress.epoch, **scores}
        save_best(state, run)
