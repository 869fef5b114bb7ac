"""Alternating timings of several ways to one result, and the rates of the machine that set the floor."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.floor import Part
from models.cpu_products import has_onednn, multiply, pytorch_products

RATE, BANDWIDTH = "matrix rate (GFLOP/s)", "memory rate (GB/s)"
# rows, inputs and outputs of the products that the benchmarks time: of images, of texts, of single tokens
PRODUCTS = ((1154, 768, 3072), (1154, 3072, 768), (2308, 768, 768), (288, 768, 3072), (2048, 2048, 2048))
FEW_ROWS = (6, 768, 30524)  # a decoding step reads this weight for 6 rows: a rate of memory


@dataclass
class Timing:
    """Seconds of alternating runs, and the best rates measured between them."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    torch_products: list[float] = field(default_factory=list)  # ours with PyTorch's own products
    rate: float = 0.0  # GFLOP/s
    bandwidth: float = 0.0  # GB/s

    def summary(self, floor: Sequence[Part], width: int = 4) -> dict[str, Any]:
        """Return the figures of a row, given the stages of the least work and the bytes of a parameter."""
        ours, theirs, plainly = map(statistics.median, (self.ours, self.theirs, self.torch_products))
        ratios = [other / own for own, other in zip(self.ours, self.theirs, strict=True)]
        least = sum(part.seconds(self.rate, self.bandwidth, width) for part in floor)
        return {
            "ours (s)": ours,
            "theirs (s)": theirs,
            "ratio": theirs / ours,
            "lowest ratio": min(ratios),
            "highest ratio": max(ratios),
            "torch products": theirs / plainly,
            RATE: self.rate,
            BANDWIDTH: self.bandwidth,
            "floor (GFLOP)": sum(part.gflop for part in floor),
            "floor (GB)": sum(part.gigabytes(width) for part in floor),
            "floor (s)": least,
            "times the floor": ours / least,
        }


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
    return min(ways, key=lambda name: [seconds(ways[name]) for _ in range(2)][1])


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds of a call, including the device's work."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def products(
    shape: tuple[int, int, int], device: str, dtype: torch.dtype
) -> Iterator[tuple[Callable[[], torch.Tensor], float]]:
    """Yield each way to multiply, with and without bias, by PyTorch's product and by oneDNN's, and its GFLOP."""
    rows, inputs, outputs = shape
    sizes = ((rows, inputs), (outputs, inputs), (outputs,))
    x, weight, bias = (torch.randn(size, device=device, dtype=dtype) for size in sizes)
    kinds = (F.linear, multiply) if device == "cpu" and dtype == torch.float32 and has_onednn() else (F.linear,)
    for kind in kinds:
        for args in ((x, weight, bias), (x, weight)):
            yield lambda kind=kind, args=args: kind(*args), 2 * rows * weight.numel() / 1e9


def best_seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Return the shortest of a few calls."""
    return min(seconds(work) for _ in range(repeats))


@torch.no_grad()
def matrix_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Return the GFLOP/s of the fastest product, over the shapes that occur and the ways at hand."""
    found = (product for shape in PRODUCTS for product in products(shape, device, dtype))
    return max(gflop / best_seconds(work) for work, gflop in found)


@torch.no_grad()
def memory_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Return the GB/s of the fastest read of a large weight, by a product of few rows or a sum."""
    weight = torch.randn(FEW_ROWS[1:], device=device, dtype=dtype)
    reads = [weight.sum, *(work for work, _ in products(FEW_ROWS, device, dtype))]
    return weight.nbytes / 1e9 / min(map(best_seconds, reads))


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
