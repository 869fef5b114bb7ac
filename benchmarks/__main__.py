"""Time ours beside the plain released algorithm and Hugging Face transformers, in turn and in one run.

python -m benchmarks                    every row; benchmarks/results.json and benchmarks/RESULTS.md
python -m benchmarks --rows reranking   one row, which takes the place of its last run
"""

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import BANDWIDTH, RATE, RATE_BF16, alternate, machine, summary
from benchmarks.results import write_section
from benchmarks.rows import ROWS, Row
from utils import UserError

FOLDER = Path(__file__).parent


def run_row(row: Row, device: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Check that both ways agree, and time them.

    Raises:
        UserError: they do not.
    """
    case = row.make(device)
    apart = case.difference()
    if apart > row.tolerance:
        raise UserError(f"{row.title}: the two ways differ by {apart:.1e}, more than {row.tolerance}")
    timing = alternate(case.ours, case.theirs, row.repeats)
    found = {"title": row.title, "at least": row.at_least, "aim": row.aim, "difference": apart}
    rate, width = (facts[RATE_BF16], 2) if row.amp else (facts[RATE], 4)
    return found | summary(timing, case.floor, rate, facts[BANDWIDTH], width)


def line(found: dict[str, Any]) -> str:
    """Return a row of the Markdown table."""
    spread = f"{found['lowest ratio']:.2f} to {found['highest ratio']:.2f}"
    cells = [
        found["title"],
        f"{found['theirs (s)']:.3f}",
        f"{found['ours (s)']:.3f}",
        f"**{found['ratio']:.2f}** ({spread})",
        f"{found['without oneDNN']:.2f}",
        f"{found['at least']} / {found['aim']}",
        f"{found['difference']:.1e}",
        f"{found['floor (GFLOP)']:.0f}, {found['floor (GB)']:.1f}",
        f"{found['floor (s)']:.3f}",
        f"{found['times the floor']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


MEASURED = ("theirs (s)", "ours (s)", "ratio", "without oneDNN", "at least / aim", "difference")
COLUMNS = ("", *MEASURED, "floor: GFLOP, GB", "floor (s)", "ours / floor")
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def table(results: dict[str, dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the Markdown table with what the machine is."""
    about = ", ".join(f"{name} {value}" for name, value in facts.items())
    return "\n".join((f"Machine: {about}.", "", HEAD, *(line(found) for found in results.values())))


def keep(results: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write rows to results.json and RESULTS.md; rows of earlier runs that were not run again stay."""
    path = FOLDER / "results.json"
    earlier = json.loads(path.read_text())["rows"] if path.is_file() else {}
    rows = {name: (earlier | results)[name] for name in ROWS if name in earlier | results}
    path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))
    write_section("Against the released algorithm and Hugging Face: `python -m benchmarks`", table(rows, facts))


def main() -> int:
    """Read the command line, run the rows, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows to run (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    facts, results = machine(args.device), {}
    for name in args.rows:
        try:
            results[name] = run_row(ROWS[name], args.device, facts)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(line(results[name]), flush=True)
        gc.collect()
    print(table(results, facts))
    keep(results, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
