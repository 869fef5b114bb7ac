"""How far a run is, how fast it goes, and the line that shows it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from utils import ProgressLine, memory_used


@dataclass
class Progress:
    """How far a training run is."""

    steps_per_epoch: int
    max_epoch: int
    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0

    @property
    def epoch_fraction(self) -> float:
        """Epochs done, as a float."""
        return self.epoch + self.step_in_epoch / self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.max_epoch


class Clock:
    """Measures an epoch and shows its progress line.

    Args:
        progress: of the run; read whenever the line is shown.
        global_batch: images per step, over all processes.
        device: whose memory is shown.
    """

    def __init__(self, progress: Progress, global_batch: int, device: torch.device):
        self.progress, self.global_batch, self.device = progress, global_batch, device
        self.first = progress.step_in_epoch
        self.line = ProgressLine(progress.steps_per_epoch, f"epoch {progress.epoch + 1}/{progress.max_epoch}", 5.0)
        self.start, self.waited, self.steps = time.monotonic(), 0.0, self.first

    def time_data(self, loader: DataLoader) -> Iterator[dict[str, Any]]:
        """Yield the batches of a loader, measuring how long each was waited for."""
        batches, end = iter(loader), object()
        while True:
            before = time.monotonic()
            batch = next(batches, end)
            self.waited += time.monotonic() - before
            if batch is end:
                return
            yield batch

    def show(self, means: dict[str, float]) -> None:
        """Show losses, learning rate, images per second, share of time spent waiting for data, and memory."""
        now, done = time.monotonic(), self.progress.step_in_epoch
        seconds = max(now - self.start, 1e-9)
        rate = (done - self.steps) * self.global_batch / seconds
        losses = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        memory = memory_used(self.device)
        details = f"{losses}  {rate:.1f} images/s  data {self.waited / seconds:.0%}  {memory:.1f} GiB"
        self.line.update(done, details, self.first)
        self.start, self.waited, self.steps = now, 0.0, done

    def close(self) -> None:
        """End the line."""
        self.line.close()
