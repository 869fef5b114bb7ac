"""Alternating timings of two ways to one result, and what the machine can do."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.floor import Part
from models.cpu_products import pytorch_products, use_cpu_products

RATE, RATE_BF16 = "matrix rate (GFLOP/s)", "matrix rate in bfloat16 (GFLOP/s)"
PLAIN_RATE = "by PyTorch's own product"
BANDWIDTH = "memory rate (GB/s)"
MATRIX = 2048  # side of the matrices by which the machine is known


@dataclass
class Timing:
    """Seconds of alternating runs.

    Attributes:
        ours, theirs: every run's seconds.
        no_onednn: of ours with PyTorch's own products.
    """

    ours: list[float]
    theirs: list[float]
    no_onednn: list[float]

    @property
    def ratio(self) -> float:
        """How many times faster ours is, by medians."""
        return statistics.median(self.theirs) / statistics.median(self.ours)

    @property
    def ratios(self) -> list[float]:
        """The same for each pair of neighbouring runs."""
        return [other / own for own, other in zip(self.ours, self.theirs, strict=True)]


def alternate(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> Timing:
    """Run each once to warm up, then in turn: theirs by PyTorch's own products, ours by oneDNN's and by them."""
    timing = Timing([], [], [])
    plainly = pytorch_products()
    ways = {"theirs": plainly(theirs), "ours": ours, "no_onednn": plainly(ours)}
    for way in ways.values():
        way()
    for _ in range(repeats):
        for name, way in ways.items():
            getattr(timing, name).append(seconds(way))
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
    maps = use_cpu_products(torch.nn.Linear(MATRIX, MATRIX, bias=False, device=device, dtype=dtype))
    maps.requires_grad_(False)
    rows = torch.randn(MATRIX, MATRIX, device=device, dtype=dtype)
    maps(rows)
    times = [seconds(lambda: maps(rows)) for _ in range(repeats)]
    return 2 * MATRIX**3 / statistics.median(times) / 1e9


def memory_rate(device: str, megabytes: int = 256, repeats: int = 5) -> float:
    """Return the rate at which large tensors are read, in GB/s."""
    block = torch.ones(megabytes * 2**18, device=device)
    block.sum()
    return block.numel() * 4 / statistics.median(seconds(block.sum) for _ in range(repeats)) / 1e9


def machine(device: str) -> dict[str, Any]:
    """Return what a reader needs to compare these figures with others."""
    import transformers

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, CPU",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        RATE: round(matrix_rate(device)),
        PLAIN_RATE: round(pytorch_products()(matrix_rate)(device)),
        RATE_BF16: round(matrix_rate(device, torch.bfloat16)),
        BANDWIDTH: round(memory_rate(device), 1),
    }


def summary(timing: Timing, floor: Sequence[Part], rate: float, bandwidth: float, width: int = 4) -> dict[str, Any]:
    """Return a row's figures.

    Args:
        timing: the runs.
        floor: stages of the least that must be done.
        rate: of matrix products, GFLOP/s.
        bandwidth: of memory, GB/s.
        width: bytes of a parameter.
    """
    ours, least = statistics.median(timing.ours), sum(part.seconds(rate, bandwidth, width) for part in floor)
    return {
        "ours (s)": ours,
        "theirs (s)": statistics.median(timing.theirs),
        "ratio": timing.ratio,
        "lowest ratio": min(timing.ratios),
        "highest ratio": max(timing.ratios),
        "without oneDNN": statistics.median(timing.theirs) / statistics.median(timing.no_onednn),
        "floor (GFLOP)": sum(part.gflop for part in floor),
        "floor (GB)": sum(part.gigabytes(width) for part in floor),
        "floor (s)": least,
        "times the floor": ours / least,
        **asdict(timing),
    }
