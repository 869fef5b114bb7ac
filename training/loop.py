"""The only training loop."""

import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from launch.config import TrainConfig
from launch.run import BEST, WEIGHTS, Interrupted, Run
from models.med import TextTransformer
from models.momentum import MomentumModel
from models.precision import autocast
from training import adapters, parallel
from training.checkpoint import load_last, save_atomic, save_last
from training.optimizer import cosine_lr, create_optimizer, set_lr, warmup_lr
from training.progress import Clock, Progress
from utils import (
    Mean,
    UserError,
    all_gather_object,
    all_reduce_mean,
    get_rank,
    get_world_size,
    is_main_process,
    on_main_process,
)

Losses = dict[str, torch.Tensor]
NUM_GRAPHS = 64  # of one layer: text alone or reading, causal or not, with gradients or without, of any length


def default_schedule(config: TrainConfig, progress: Progress) -> float:
    """Cosine from init_lr to min_lr, a new rate every epoch as released, or every step."""
    if config.schedule == "epoch":
        return cosine_lr(progress.epoch, progress.max_epoch, config.init_lr, config.min_lr)
    if config.schedule != "step":
        raise UserError(f"schedule is {config.schedule!r}; expected 'epoch' or 'step'")
    if progress.step < config.warmup:
        return warmup_lr(progress.step + 1, config.warmup, 0.0, config.init_lr)
    rest = max(progress.total_steps - config.warmup, 1)
    return cosine_lr(progress.step - config.warmup, rest, config.init_lr, config.min_lr)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch's tensors to the device."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def prepare_model(model: nn.Module, config: Any, run: Run) -> nn.Module:
    """Move a model to its device; checkpoint its text layers if asked."""
    model = model.to(run.device)
    for part in model.modules():
        if isinstance(part, TextTransformer):
            part.grad_checkpointing = config.get("text_grad_ckpt", False)
    return model


def compile_blocks(model: nn.Module, **options: Any) -> int:
    """Compile the ViT's blocks and the text transformers' layers, each by itself; returns how many there are.

    Of a sharded model, as it is gathered: the layers' parts.
    """
    torch._dynamo.config.cache_size_limit = NUM_GRAPHS
    if parallel.is_sharded(model):
        return parallel.compile_units(model, **options)
    parts = [part for name, part in model.named_modules() if name.split(".")[-2:-1] in (["blocks"], ["layer"])]
    for part in parts:
        part.compile(**options)
    return len(parts)


def fit(
    run: Run,
    config: TrainConfig,
    model: nn.Module,
    loader: DataLoader,
    train_step: Callable[[nn.Module, dict[str, Any], Progress], Losses],
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    best_metric: Callable[[dict[str, float]], float] | None = None,
    schedule: Callable[[TrainConfig, Progress], float] = default_schedule,
    watch: Callable[[dict[str, float], Progress], str] | None = None,
    prepare: Callable[[nn.Module, list[dict[str, Any]], torch.device], list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Train a model; save, log and evaluate after every epoch; keep the best and the last.

    Args:
        run: the run's device, folder and log.
        config: settings of the training.
        model: on any device.
        loader: its sampler is a `data.sampler.EpochSampler`.
        train_step: returns named losses of one batch; their sum is minimised.
        evaluate: returns named scores, equal on all ranks; "val_..." and "test_..." by convention.
        best_metric: picks from the scores what the best checkpoint maximises; None keeps the last.
        schedule: learning rate at a progress.
        watch: sees each reading of the mean losses; a text that it returns is printed as a warning.
        prepare: sees all batches of a step before the first, and returns what train_step gets of them.

    Returns:
        The best epoch's scores, with "epoch".

    Raises:
        UserError: a loss is not finite, the data are fewer than a batch, or saving failed.
        Interrupted: SIGTERM came; the run has been saved.
    """
    return Loop(run, config, model, loader, train_step, evaluate, best_metric, schedule, watch, prepare).run_all()


class Loop:
    """State and steps of one training run; `fit` is its interface."""

    def __init__(self, run, config, model, loader, train_step, evaluate, best_metric, schedule, watch, prepare):
        config = adapters.prepare(model, config, run)
        self.run, self.config, self.loader = run, config, loader
        self.train_step, self.evaluate, self.best_metric = train_step, evaluate, best_metric
        self.schedule, self.watch, self.prepare = schedule, watch, prepare
        self.model = prepare_model(model, config, run)
        self.wrapped = parallel.wrap(self.model, config.parallel, run.device)
        if config.compile:
            compile_blocks(self.model)
        self.optimizer = create_optimizer(model, config.init_lr, config.weight_decay)
        if len(loader) < config.grad_accum:
            raise UserError(
                f"the training data fill {len(loader)} batches and a step needs {config.grad_accum}; "
                "use a smaller batch size, or more data"
            )
        self.progress = Progress(len(loader) // config.grad_accum, config.max_epoch)
        self.meters: dict[str, Mean] = {}
        self.recent: dict[str, Mean] = {}
        self.best: dict[str, Any] = {}
        self.stop_asked = False
        self.writer = self._tensorboard()

    def _tensorboard(self) -> Any:
        if not self.config.tensorboard or not is_main_process():
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("tensorboard: true needs the package; pip install tensorboard, or set it false") from None
        return SummaryWriter(str(self.run.output_dir / "tensorboard"))

    # The run.

    def run_all(self) -> dict[str, Any]:
        """Train the epochs that are left."""
        if self.run.resume:
            self.restore(self.run.resume)
        previous = signal.signal(signal.SIGTERM, self._ask_to_stop)
        try:
            while self.progress.epoch < self.config.max_epoch:
                self.run_epoch()
                self.finish_epoch()
        finally:
            signal.signal(signal.SIGTERM, previous)
        if self.writer is not None:
            self.writer.close()
        self.run.watchdog.enter("the report", self.progress.step)
        return self.best

    def _ask_to_stop(self, *_: Any) -> None:
        self.stop_asked = True

    def run_epoch(self) -> None:
        """Take the steps of an epoch that are left."""
        progress, accum = self.progress, self.config.grad_accum
        done = progress.step_in_epoch * accum * (self.loader.batch_size or 1)
        self.loader.sampler.set_position(progress.epoch, done)
        self.model.train()
        batch = (self.loader.batch_size or 1) * accum * get_world_size()
        clock = Clock(progress, batch, self.run.device)
        batches = iter(clock.time_data(self.loader))
        while progress.step_in_epoch < progress.steps_per_epoch:
            lr = self.schedule(self.config, progress)
            set_lr(self.optimizer, lr)
            self.run.watchdog.enter("data loading", progress.step)
            read = [next(batches) for _ in range(accum)]
            self.run.watchdog.enter("a step", progress.step)
            self.step(read)
            progress.step += 1
            progress.step_in_epoch += 1
            self._meter("lr", lr)
            self.after_step(clock)
        clock.close()

    def step(self, batches: list[dict[str, Any]]) -> None:
        """One update of the weights from one or several batches."""
        total: Losses = {}
        if isinstance(self.model, MomentumModel):
            self.model.begin_step()
        if self.prepare is not None:
            with autocast(self.config.amp, self.run.device):
                batches = self.prepare(self.model, batches, self.run.device)
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            context = nullcontext() if last or self.wrapped is self.model else self.wrapped.no_sync()
            with context:
                with autocast(self.config.amp, self.run.device):
                    losses = self.train_step(self.wrapped, to_device(batch, self.run.device), self.progress)
                (sum(losses.values()) / len(batches)).backward()
            for name, value in losses.items():
                total[name] = total.get(name, 0.0) + value.detach().float() / len(batches)
        self.update(total)

    def update(self, losses: Losses) -> None:
        """Clip and take the optimizer's step, unless a loss of any rank is not finite or a stop was asked for."""
        flags = torch.stack([1.0 - torch.isfinite(value).float() for value in losses.values()])
        asked = torch.tensor([float(self.stop_asked)], device=flags.device)
        self.flags = torch.cat((flags, asked))
        if get_world_size() > 1:
            dist.all_reduce(self.flags, dist.ReduceOp.MAX)
        if self.run.device.type == "cuda":
            # the device itself skips updates after a bad loss, so nothing has to wait for it
            self.optimizer.found_inf = self.flags[:-1].max().reshape(())
            self.optimizer.grad_scale = None
        elif self.flags[:-1].any():
            self.stop_at_bad_loss(losses)
        parallel.finish_gradients(self.model, self.config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, value in losses.items():
            self._meter(name, value)
        if len(losses) > 1:
            self._meter("loss", sum(losses.values()))

    def _meter(self, name: str, value: torch.Tensor | float) -> None:
        for meters in (self.meters, self.recent):
            meters.setdefault(name, Mean()).update(value)

    def stop_at_bad_loss(self, losses: Losses) -> None:
        """Say which losses of which ranks are not finite, before any weight has changed."""
        mine = [f"{name} is {value.item()} on rank {get_rank()}" for name, value in losses.items()
                if not torch.isfinite(value)]  # fmt: skip
        found = ", ".join(text for texts in all_gather_object(mine) for text in texts)
        raise UserError(
            f"{found or 'a loss was not finite'} at step {self.progress.step}; the weights were left as they were: "
            "lower init_lr, set clip_grad, or look at the data of that step"
        )

    def after_step(self, clock: "Clock") -> None:
        """Read losses, save and stop, each when it is due."""
        progress = self.progress
        due = progress.step % self.config.log_every == 0 or progress.step_in_epoch == progress.steps_per_epoch
        if due:
            self.read_losses(clock)
        if (self.run.device.type == "cpu" or due) and self.flags[-1] > 0:
            self.save()
            raise Interrupted(f"stopped and saved at step {progress.step}; continue with: {self.how_to_continue()}")
        if self.config.save_every and progress.step % self.config.save_every == 0:
            self.save()

    def how_to_continue(self) -> str:
        """Return the command that continues the run."""
        command = self.run.command.replace(" --overwrite", "")
        return command if " --resume" in command else f"{command} --resume"

    def read_losses(self, clock: "Clock") -> None:
        """Write the mean losses since the last reading to the curve, the progress line and TensorBoard."""
        means = {name: meter.value() for name, meter in self.recent.items()}
        if self.run.device.type == "cuda" and self.flags[:-1].any():
            self.stop_at_bad_loss({name: torch.tensor(value) for name, value in means.items()})
        self.recent = {}
        row = {f"train_{name}": round_to(value) for name, value in means.items()}
        self.run.log({"step": self.progress.step, "epoch": self.progress.epoch, **row}, "curve.jsonl")
        clock.show(means)
        if self.writer is not None:
            for name, value in means.items():
                self.writer.add_scalar(f"train/{name}", value, self.progress.step)
        if self.watch is not None and (warning := self.watch(means, self.progress)):
            self.run.note(f"warning: {warning}")

    # Between epochs.

    def finish_epoch(self) -> None:
        """Save, evaluate, log, keep the best, and begin the next epoch."""
        self.save()  # first, so that a kill during evaluation loses nothing
        epoch = self.progress.epoch
        scores = self._scores()
        means = {f"train_{name}": all_reduce_mean(torch.tensor(m.value())).item() for name, m in self.meters.items()}
        row = {**{name: round_to(value) for name, value in {**means, **scores}.items()}, "epoch": epoch}
        self._keep_best(scores)
        self.run.log(row)
        if self.writer is not None:
            for name, value in scores.items():
                self.writer.add_scalar(name.replace("_", "/", 1), value, self.progress.step)
        self.progress.epoch, self.progress.step_in_epoch, self.meters = epoch + 1, 0, {}
        self.save()

    def _scores(self) -> dict[str, float]:
        epoch = self.progress.epoch + 1
        due = epoch % self.config.eval_every == 0 or epoch == self.config.max_epoch
        if self.evaluate is None or not due:
            return {}
        self.model.eval()
        self.run.epoch = self.progress.epoch
        self.run.watchdog.enter("evaluation", self.progress.step)
        with torch.random.fork_rng(), torch.no_grad(), autocast(self.config.amp, self.run.device):
            return self.evaluate(parallel.plain(self.model))

    def _keep_best(self, scores: dict[str, float]) -> None:
        """Save the weights if they are the best so far: by the metric, or without one the latest."""
        if self.best_metric and not scores:
            return
        quality = self.best_metric(scores) if self.best_metric else self.progress.epoch
        if self.best and quality <= self.best["quality"]:
            return
        self.best = {"quality": quality, "epoch": self.progress.epoch, **scores}
        weights = {"model": adapters.merged_state(self.model, self.config), "config": asdict(self.config)}
        content = {**weights, "epoch": self.progress.epoch}
        on_main_process(lambda: save_atomic(content, self.run.output_dir / BEST))
        on_main_process(lambda: save_atomic(weights, self.run.output_dir / WEIGHTS))
        if self.config.adapter_rank:
            content = adapters.adapter_file(self.model, self.config)
            on_main_process(lambda: save_atomic(content, self.run.output_dir / adapters.FILE))

    def save(self) -> None:
        """Save all that continuing bit for bit needs."""
        self.run.watchdog.enter("saving", self.progress.step)
        content = {
            "model": parallel.full_state(self.model),
            "optimizer": parallel.full_optimizer_state(self.model, self.optimizer),
            "config": asdict(self.config),
            "epoch": self.progress.epoch,
            "progress": asdict(self.progress),
            "meters": all_gather_object(
                [{name: meter.state() for name, meter in meters.items()} for meters in (self.meters, self.recent)]
            ),
            "best": self.best,
        }
        save_last(self.run.output_dir, content, self.run.device)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint that `save` wrote."""
        content = load_last(path, self.run.device)
        saved = Progress(**content["progress"])
        if saved.steps_per_epoch != self.progress.steps_per_epoch and saved.step_in_epoch:
            raise UserError(
                f"{path} was saved within an epoch of {saved.steps_per_epoch} steps and this run's have "
                f"{self.progress.steps_per_epoch}; continue with the same data and batch size"
            )
        try:
            parallel.load_full_state(self.model, content["model"])
        except RuntimeError as error:
            problem = " ".join(str(error).split())[:200]
            raise UserError(f"{path} holds another model ({problem}); continue with the run's own config") from None
        parallel.load_full_optimizer_state(self.model, self.optimizer, content["optimizer"])
        saved.max_epoch, saved.steps_per_epoch = self.progress.max_epoch, self.progress.steps_per_epoch
        self.progress, self.best = saved, content["best"]
        states = content["meters"][get_rank()]
        self.meters, self.recent = ({name: mean_of(state) for name, state in group.items()} for group in states)
        self.run.trim_log(lambda row: row["epoch"] < saved.epoch)
        self.run.trim_log(lambda row: row["step"] <= saved.step, "curve.jsonl")
        self.run.print(f"continuing from {path}: epoch {saved.epoch}, step {saved.step}")


def mean_of(state: tuple[float, int]) -> Mean:
    """Return a meter with a saved state."""
    meter = Mean()
    meter.load(state)
    return meter


def round_to(value: float, digits: int = 6) -> float:
    """Round to significant digits, so that nothing small becomes 0."""
    return float(f"{value:.{digits}g}")
