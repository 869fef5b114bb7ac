"""Puts the project and its test helpers on the path; one thread, as in the processes that the tests start."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; small tensors gain nothing from threads
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

LONGEST = (
    "parallel", "start", "training", "benchmarks", "golden_models", "scripts", "onnx", "metrics", "compile", "page",
    "properties", "convert", "capfilt", "bootstrap", "faults", "fake_cuda", "hub", "same_seed", "predict", "watchdog",
    "released_interface", "imports", "adapters", "miniature",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Start with the files that take longest, so that two workers end together."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
