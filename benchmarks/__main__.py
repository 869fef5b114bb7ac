"""Time this project against the released algorithm and other libraries, in turn and in one run.

python -m benchmarks                    all rows; writes benchmarks/results.json and benchmarks/RESULTS.md
python -m benchmarks --rows reranking   one row, which replaces its last result
python -m benchmarks --profile          where the time of each row goes, by operation
"""

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.case import Case, Row
from benchmarks.measure import BANDWIDTH, RATE, alternate, fastest, machine, summary
from benchmarks.results import write_section
from benchmarks.rows import ROWS
from utils import UserError

FOLDER = Path(__file__).parent
COLUMNS = (
    "", "peer", "peer (s)", "ours (s)", "ratio", "torch products", "at least / aim", "difference",
    "floor: GFLOP, GB", "at GFLOP/s, GB/s", "ours / floor", "aim",
)  # fmt: skip
SHOWN = 6  # operations of a profile


def run_row(row: Row, device: str, **settings: Any) -> dict[str, Any]:
    """Check that all ways agree, and time ours against the fastest peer.

    Raises:
        UserError: they do not agree.
    """
    case = row.make(device, **settings)
    difference = case.difference()
    if difference > row.tolerance:
        raise UserError(f"{row.title}: results differ by {difference:.1e}, more than {row.tolerance}")
    peer = fastest(case.peers)
    timing = alternate(case.ours, case.peers[peer], row.repeats, device, torch.bfloat16 if row.amp else torch.float32)
    facts = {"title": row.title, "peer": peer, "goal": row.goal, "floor aim": row.floor_aim, "difference": difference}
    return facts | summary(timing, case.floor, 2 if row.amp else 4)


def line(found: dict[str, Any]) -> str:
    """Return a row of the Markdown table."""
    cells = [
        found["title"],
        found["peer"],
        f"{found['theirs (s)']:.3f}",
        f"{found['ours (s)']:.3f}",
        f"**{found['ratio']:.2f}** ({found['lowest ratio']:.2f} to {found['highest ratio']:.2f})",
        f"{found['torch products']:.2f}",
        " / ".join(f"{value:g}" for value in found["goal"]),
        f"{found['difference']:.1e}",
        f"{found['floor (GFLOP)']:.0f}, {found['floor (GB)']:.1f}",
        f"{found[RATE]:.0f}, {found[BANDWIDTH]:.1f}",
        f"{found['times the floor']:.2f}",
        f"{found['floor aim']:g}",
    ]
    return "| " + " | ".join(cells) + " |"


def table(results: dict[str, dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the Markdown table with the machine's facts."""
    about = ", ".join(f"{name} {value}" for name, value in facts.items())
    head = (f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|")
    return "\n".join((f"Machine: {about}.", "", *head, *map(line, results.values())))


def save(results: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write rows to results.json and RESULTS.md; rows that were not run keep their last result."""
    path = FOLDER / "results.json"
    earlier = json.loads(path.read_text())["rows"] if path.is_file() else {}
    rows = {name: (earlier | results)[name] for name in ROWS if name in earlier | results}
    path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))
    write_section("Against the released algorithm and other libraries: `python -m benchmarks`", table(rows, facts))


def profile_row(row: Row, device: str) -> list[str]:
    """Return a paragraph and a table of the costliest operations of a row."""
    case: Case = row.make(device)
    case.ours()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=kinds) as found:
        case.ours()
    name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    times = sorted(((getattr(e, name) / 1e6, e) for e in found.key_averages()), key=lambda pair: -pair[0])
    total = sum(time for time, _ in times)
    lines = [f"**{row.title}**: {total:.2f} s with the profiler", "", "| operation | calls | s | share |"]
    lines.append("|---|---|---|---|")
    lines += [f"| {e.key} | {e.count} | {time:.3f} | {time / total:.0%} |" for time, e in times[:SHOWN]]
    return [*lines, ""]


def main() -> int:
    """Run or profile the rows and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows to run (default: all)")
    parser.add_argument("--profile", action="store_true", help="profile the rows instead of timing them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    facts, results, profiles = machine(args.device), {}, []
    for name in args.rows:
        try:
            if args.profile:
                profiles += profile_row(ROWS[name], args.device)
                print("\n".join(profiles[-SHOWN - 5 :]), flush=True)
            else:
                results[name] = run_row(ROWS[name], args.device)
                print(line(results[name]), flush=True)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        gc.collect()
    if args.profile:
        write_section("Where the time of a row goes: `python -m benchmarks --profile`", "\n".join(profiles))
    else:
        save(results, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
