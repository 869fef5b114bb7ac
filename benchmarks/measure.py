"""Alternating timings of two ways to one result, and what the machine can do."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

MATRIX = 2048  # side of the matrices by which the machine is known


@dataclass
class Timing:
    """Seconds of alternating runs.

    Attributes:
        ours, theirs: every run's seconds.
    """

    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """How many times faster ours is, by medians."""
        return statistics.median(self.theirs) / statistics.median(self.ours)

    @property
    def ratios(self) -> list[float]:
        """The same for each pair of neighbouring runs."""
        return [other / own for own, other in zip(self.ours, self.theirs, strict=True)]


def alternate(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> Timing:
    """Run both once to warm up, then in turn."""
    ours(), theirs()
    timing = Timing([], [])
    for _ in range(repeats):
        timing.theirs.append(seconds(theirs))
        timing.ours.append(seconds(ours))
    return timing


def seconds(work: Callable[[], Any]) -> float:
    """Return how long a call takes, the device's work included."""
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_rate(device: str, dtype: torch.dtype = torch.float32, repeats: int = 10) -> float:
    """Return the rate of large matrix products in GFLOP/s, a multiplication and an addition counting two."""
    a, b = (torch.randn(MATRIX, MATRIX, device=device, dtype=dtype) for _ in range(2))
    a @ b
    times = [seconds(lambda: a @ b) for _ in range(repeats)]
    return 2 * MATRIX**3 / statistics.median(times) / 1e9


def machine(device: str) -> dict[str, Any]:
    """Return what a reader needs to compare these figures with others."""
    import transformers

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, CPU",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matrix rate (GFLOP/s)": round(matrix_rate(device)),
    }


def summary(timing: Timing, rate: float, gflop: float) -> dict[str, Any]:
    """Return a row's figures.

    Args:
        timing: the runs.
        rate: of matrix products, GFLOP/s.
        gflop: the least that must be computed; 0 where that is not counted.
    """
    ours = statistics.median(timing.ours)
    found = {"ours (s)": ours, "theirs (s)": statistics.median(timing.theirs), "ratio": timing.ratio}
    found |= {"lowest ratio": min(timing.ratios), "highest ratio": max(timing.ratios)}
    if gflop:
        found |= {"floor (GFLOP)": gflop, "floor (s)": gflop / rate, "times the floor": ours * rate / gflop}
    return found | asdict(timing)
