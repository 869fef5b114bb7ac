"""The position of a training run: epochs and steps."""

from dataclasses import dataclass


@dataclass
class Progress:
    """How far a training run is, in finished epochs and steps."""

    steps_per_epoch: int
    max_epoch: int
    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0  # of the run

    @property
    def epoch_fraction(self) -> float:
        """Finished epochs, as a float."""
        return self.epoch + self.step_in_epoch / self.steps_per_epoch

    @property
    def epoch_is_done(self) -> bool:
        """Return True if no step of the current epoch is left."""
        return self.step_in_epoch >= self.steps_per_epoch

    def continue_from(self, saved: "Progress") -> None:
        """Continue after the same share of an epoch, also if epochs have another number of steps now."""
        self.epoch, self.step_in_epoch, self.step = saved.epoch, saved.step_in_epoch, saved.step
        if saved.steps_per_epoch != self.steps_per_epoch:
            self.step_in_epoch = saved.step_in_epoch * self.steps_per_epoch // saved.steps_per_epoch
            self.step = self.epoch * self.steps_per_epoch + self.step_in_epoch

    def finish_step(self) -> None:
        """Count a step."""
        self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1

    def finish_epoch(self) -> None:
        """Count an epoch."""
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
