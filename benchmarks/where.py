"""Where the time of ours goes, by operation: python -m benchmarks.where captioning reranking"""

import argparse
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.results import write_section
from benchmarks.rows import ROWS

SHOWN = 6
PRODUCTS = ("mkldnn::_linear_pointwise", "aten::addmm", "aten::mm", "aten::bmm")


def measured(name: str, device: str) -> Any:
    """Return the profiler's averages of one run of ours, after one that warms up."""
    ours = ROWS[name].make(device).ours
    ours()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=kinds) as found:
        ours()
    return found.key_averages()


def microseconds(event: Any, device: str) -> float:
    """Return an operation's own time."""
    return event.self_device_time_total if device == "cuda" else event.self_cpu_time_total


def lines(name: str, device: str) -> list[str]:
    """Return a paragraph and a table of the costliest operations."""
    events = sorted(measured(name, device), key=lambda event: -microseconds(event, device))
    total = sum(microseconds(event, device) for event in events)
    spent = sum(microseconds(event, device) for event in events if event.key in PRODUCTS)
    share = f"{100 * spent / total:.0f}% in products"
    told = [f"**{ROWS[name].title}**: {total / 1e6:.2f} s with the profiler, {share}", ""]
    told += ["| operation | calls | s | share |", "|---|---|---|---|"]
    for event in events[:SHOWN]:
        own = microseconds(event, device)
        told.append(f"| {event.key} | {event.count} | {own / 1e6:.3f} | {100 * own / total:.0f}% |")
    return [*told, ""]


def main() -> int:
    """Profile the rows that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=ROWS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    text = "\n".join(line for name in args.rows for line in lines(name, args.device))
    print(text)
    write_section("Where the time of a row goes: `python -m benchmarks.where`", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
