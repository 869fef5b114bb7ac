"""What a training run shows and writes of its steps: meters, the progress line, curve.jsonl and TensorBoard."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from launch.run import Run
from training.progress import Progress
from utils import (
    Mean,
    ProgressLine,
    UserError,
    all_gather_object,
    all_reduce_mean,
    get_rank,
    is_main_process,
    memory_used,
)

SHOW_SECONDS = 5.0  # between two progress lines where there is no terminal
Meters = dict[str, Mean]


class TrainLog:
    """Means of named values over an epoch and since the last reading, and where they are written."""

    def __init__(self, run: Run, tensorboard: bool = False):
        self.run = run
        self.epoch_means: Meters = {}
        self.recent_means: Meters = {}
        self.writer = open_tensorboard(run) if tensorboard and is_main_process() else None

    def begin_epoch(self, progress: Progress, images_per_step: int) -> None:
        """Start the progress line and the timing of an epoch."""
        self.progress, self.images_per_step, self.first_step = progress, images_per_step, progress.step_in_epoch
        title = f"epoch {progress.epoch + 1}/{progress.max_epoch}"
        self.line = ProgressLine(progress.steps_per_epoch, title, SHOW_SECONDS)
        self.start, self.data_seconds, self.last_step = time.monotonic(), 0.0, self.first_step

    def time_data(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield batches, measuring the time spent waiting for them."""
        iterator, end = iter(batches), object()
        while True:
            before = time.monotonic()
            batch = next(iterator, end)
            self.data_seconds += time.monotonic() - before
            if batch is end:
                return
            yield batch

    def update(self, values: dict[str, torch.Tensor | float]) -> None:
        """Add a step's values; tensors stay on the device."""
        for name, value in values.items():
            for meters in (self.epoch_means, self.recent_means):
                meters.setdefault(name, Mean()).update(value)

    def write_step(self) -> dict[str, float]:
        """Write the means since the last call and return them; waits for the device."""
        means = {name: meter.value() for name, meter in self.recent_means.items()}
        self.recent_means = {}
        row = {f"train_{name}": round_to(value) for name, value in means.items()}
        self.run.log({"step": self.progress.step, "epoch": self.progress.epoch, **row}, "curve.jsonl")
        self._show(means)
        if self.writer is not None:
            for name, value in means.items():
                self.writer.add_scalar(f"train/{name}", value, self.progress.step)
        return means

    def _show(self, means: dict[str, float]) -> None:
        now, done = time.monotonic(), self.progress.step_in_epoch
        seconds = max(now - self.start, 1e-9)
        rate = (done - self.last_step) * self.images_per_step / seconds
        values = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        memory = memory_used(self.run.device)
        details = f"{values}  {rate:.1f} images/s  data {self.data_seconds / seconds:.0%}  {memory:.1f} GiB"
        self.line.update(done, details, self.first_step)
        self.start, self.data_seconds, self.last_step = now, 0.0, done

    def write_epoch(self, scores: dict[str, float]) -> None:
        """Write a row of log.txt: the epoch's means over all ranks, and the scores. All ranks call it."""
        self.line.close()
        device = self.run.device
        values = torch.tensor([meter.value() for meter in self.epoch_means.values()], device=device)
        means = dict(zip((f"train_{name}" for name in self.epoch_means), all_reduce_mean(values).tolist(), strict=True))
        row = {name: round_to(value) for name, value in {**means, **scores}.items()}
        self.run.log({**row, "epoch": self.progress.epoch})
        if self.writer is not None:
            for name, value in scores.items():
                self.writer.add_scalar(name.replace("_", "/", 1), value, self.progress.step)
        self.epoch_means = {}

    def close(self) -> None:
        """Close TensorBoard's files."""
        if self.writer is not None:
            self.writer.close()

    def state(self) -> list[Any]:
        """Return the meters of all ranks, for a checkpoint; all ranks call it."""
        return all_gather_object(
            [{name: meter.state() for name, meter in group.items()} for group in (self.epoch_means, self.recent_means)]
        )

    def load_state(self, states: list[Any]) -> None:
        """Take the meters that `state` returned."""
        self.epoch_means, self.recent_means = (
            {name: Mean(*saved) for name, saved in group.items()} for group in states[get_rank()]
        )


def open_tensorboard(run: Run) -> Any:
    """Return TensorBoard's writer for a run."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard: true needs the package; pip install tensorboard, or set it false") from None
    return SummaryWriter(str(run.output_dir / "tensorboard"))


def round_to(value: float) -> float:
    """Round to 6 significant digits, so that nothing small becomes 0."""
    return float(f"{value:.6g}")
