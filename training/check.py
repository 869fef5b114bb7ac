"""The check between backward and the optimizer's step, which never waits for the device."""

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from utils import UserError, all_gather_object, all_reduce, get_rank


class StepCheck:
    """Finds losses and gradients that are not finite, and reasons to stop, on all ranks.

    `update` keeps what it finds on the device; `read` waits for it. From the first bad step on every update of the
    weights is skipped, so that they stay as they were before it, however late it is read. With `overflow_is_normal`
    gradients that are not finite only skip their step (fp16 with a gradient scaler).
    """

    def __init__(self, device: torch.device, overflow_is_normal: bool = False):
        self.device, self.overflow_is_normal = device, overflow_is_normal
        self.bad_step = torch.full((), -1.0, device=device)  # of all ranks; -1: none
        self.stop = torch.zeros((), device=device)  # a rank has a reason to stop
        self.names: list[str] = []
        self.values: torch.Tensor | None = None  # this rank's losses and gradient norm of the first bad step
        self.stop_requested, self.problem = False, ""

    @torch.no_grad()
    def update(self, losses: dict[str, torch.Tensor], grad_norm: torch.Tensor, step: int) -> torch.Tensor:
        """Check a step's losses and gradient norm; return 1.0 on the device to skip its update, else 0.0."""
        self.names = [*losses, "the gradient norm"]
        values = torch.stack([value.detach().float() for value in (*losses.values(), grad_norm)])
        counted = values[:-1] if self.overflow_is_normal else values
        bad = 1.0 - torch.isfinite(counted).all().float()
        stop = torch.full_like(bad, float(self.stop_requested or bool(self.problem)))
        flags = all_reduce(torch.stack((bad, stop)), "MAX")
        is_first = (self.bad_step < 0) & (flags[0] > 0)
        self.bad_step = torch.where(is_first, float(step), self.bad_step)
        self.values = values if self.values is None else torch.where(is_first, values, self.values)
        self.stop = torch.maximum(self.stop, flags[1])
        overflow = 1.0 - torch.isfinite(values[-1]).float()
        return torch.maximum((self.bad_step >= 0).float(), overflow)

    def read(self) -> bool:
        """Return True if the run was asked to stop, or raise UserError; waits for the device, on all ranks together."""
        if self.values is None:
            return False
        bad_step, stop, *values = torch.cat((torch.stack((self.bad_step, self.stop)), self.values)).tolist()
        if bad_step >= 0:
            self._raise_bad_step(int(bad_step), values)
        if not stop:
            return False
        problems = [text for text in all_gather_object(self.problem) if text]
        if problems:
            raise UserError("; ".join(problems))
        return True

    def _raise_bad_step(self, step: int, values: list[float]) -> None:
        pairs = zip(self.names, values, strict=True)
        own = [f"{name} is {value} on rank {get_rank()}" for name, value in pairs if not math.isfinite(value)]
        found = [text for texts in all_gather_object(own) for text in texts]
        losses = [text for text in found if not text.startswith("the gradient norm")]
        raise UserError(
            f"{', '.join(losses or found)} at step {step}; the weights were left as they were before it: "
            "lower init_lr, set clip_grad, or look at the data of that step"
        )


@contextmanager
def stop_on_sigterm(check: StepCheck) -> Iterator[None]:
    """Turn SIGTERM into a request to stop after the current step."""

    def request(*_: Any) -> None:
        """Ask for the stop."""
        check.stop_requested = True

    previous = signal.signal(signal.SIGTERM, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
