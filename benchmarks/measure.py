"""Alternating timings of several ways to one result, and the rates of the machine that set the floor."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.floor import Part
from models.cpu_products import has_onednn, multiply, pytorch_products

RATE, BANDWIDTH = "matrix rate (GFLOP/s)", "memory rate (GB/s)"
# rows, inputs and outputs of the products that the benchmarks time: of images, of texts, of single tokens
PRODUCTS = ((1154, 768, 3072), (1154, 3072, 768), (2308, 768, 768), (288, 768, 3072), (2048, 2048, 2048))
FEW_ROWS = (6, 768, 30524)  # a decoding step reads this weight for 6 rows: a rate of memory
PROBE_REPEATS = 3


@dataclass
class Timing:
    """Seconds of alternating runs, and the best rates measured between them.

    Attributes:
        ours, theirs: seconds of every run.
        torch_products: the same of ours with PyTorch's own products.
        rate, bandwidth: highest GFLOP/s and GB/s.
    """

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    torch_products: list[float] = field(default_factory=list)
    rate: float = 0.0
    bandwidth: float = 0.0

    @property
    def ratio(self) -> float:
        """How many times faster ours is, by medians."""
        return statistics.median(self.theirs) / statistics.median(self.ours)

    @property
    def ratios(self) -> list[float]:
        """The same for each pair of neighbouring runs."""
        return [other / own for own, other in zip(self.ours, self.theirs, strict=True)]


def alternate(
    ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int, device: str, dtype: torch.dtype
) -> Timing:
    """Time both ways in turn, after one run to warm up, with the machine's rates between them.

    Theirs always uses PyTorch's own products; ours is also timed with them.
    """
    timing, plainly = Timing(), pytorch_products()
    ways = {"theirs": plainly(theirs), "ours": ours, "torch_products": plainly(ours)}
    for way in ways.values():
        way()
    for _ in range(repeats):
        for name, way in ways.items():
            getattr(timing, name).append(seconds(way))
            timing.rate = max(timing.rate, matrix_rate(device, dtype))
            timing.bandwidth = max(timing.bandwidth, memory_rate(device, dtype))
    return timing


def fastest(ways: dict[str, Callable[[], Any]]) -> str:
    """Return the name of the fastest way, by the second run of each."""
    times = {}
    for name, way in ways.items():
        way()
        times[name] = seconds(way)
    return min(times, key=times.get)


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds of a call, including the device's work."""
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Wait for the GPU if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def products(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Iterator[Callable[[], torch.Tensor]]:
    """Yield each way to multiply: with and without bias, by PyTorch's product and by oneDNN's."""
    yield lambda: F.linear(x, weight, bias)
    yield lambda: F.linear(x, weight)
    if x.device.type == "cpu" and x.dtype == torch.float32 and has_onednn():
        yield lambda: multiply(x, weight, bias)
        yield lambda: multiply(x, weight)


def best_seconds(work: Callable[[], Any], repeats: int = PROBE_REPEATS) -> float:
    """Return the shortest of a few calls."""
    return min(seconds(work) for _ in range(repeats))


def random_product(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return rows, weight and bias of a product."""
    rows, inputs, outputs = shape
    sizes = ((rows, inputs), (outputs, inputs), (outputs,))
    return tuple(torch.randn(size, device=device, dtype=dtype) for size in sizes)


@cache
def fastest_product(device: str, dtype: torch.dtype) -> tuple[Callable[[], torch.Tensor], float]:
    """Return the product with the highest rate, over the shapes that occur and the ways at hand, and its GFLOP."""
    rates = []
    for shape in PRODUCTS:
        gflop = 2 * shape[0] * shape[1] * shape[2] / 1e9
        for product in products(*random_product(shape, device, dtype)):
            product()
            rates.append((gflop / seconds(product), product, gflop))
    _, product, gflop = max(rates, key=lambda found: found[0])
    return product, gflop


@torch.no_grad()
def matrix_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Return the GFLOP/s of the fastest product."""
    product, gflop = fastest_product(device, dtype)
    return gflop / best_seconds(product)


@cache
def fastest_read(device: str, dtype: torch.dtype) -> tuple[Callable[[], torch.Tensor], float]:
    """Return the fastest way to read a large weight, by a product of few rows or a sum, and its GB."""
    x, weight, bias = random_product(FEW_ROWS, device, dtype)
    reads = [*products(x, weight, bias), weight.sum]
    return min(reads, key=best_seconds), weight.nbytes / 1e9


@torch.no_grad()
def memory_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Return the GB/s of the fastest read."""
    read, gigabytes = fastest_read(device, dtype)
    return gigabytes / best_seconds(read)


def machine(device: str) -> dict[str, Any]:
    """Return the facts that a reader needs to compare results."""
    import transformers

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu_name() -> str:
    """Return the name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def summary(timing: Timing, floor: Sequence[Part], width: int = 4) -> dict[str, Any]:
    """Return the figures of a row.

    Args:
        timing: the runs.
        floor: stages of the least work.
        width: bytes of a parameter.
    """
    ours = statistics.median(timing.ours)
    least = sum(part.seconds(timing.rate, timing.bandwidth, width) for part in floor)
    return {
        "ours (s)": ours,
        "theirs (s)": statistics.median(timing.theirs),
        "ratio": timing.ratio,
        "lowest ratio": min(timing.ratios),
        "highest ratio": max(timing.ratios),
        "torch products": statistics.median(timing.theirs) / statistics.median(timing.torch_products),
        RATE: timing.rate,
        BANDWIDTH: timing.bandwidth,
        "floor (GFLOP)": sum(part.gflop for part in floor),
        "floor (GB)": sum(part.gigabytes(width) for part in floor),
        "floor (s)": least,
        "times the floor": ours / least,
    }
