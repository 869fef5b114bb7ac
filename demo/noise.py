"""Measure how well CapFilt's filter finds the web texts of the miniature world that do not match their images.

    python -m demo.noise --results output/capfilt --world output/miniature
"""

import argparse
import sys
from pathlib import Path

from files import read_json, read_rows
from utils import run_command

COUNTS = ("kept, matches", "kept, does not match", "dropped, matches", "dropped, does not match")


def count(results: Path, truth: dict[str, dict]) -> dict[str, dict[str, int]]:
    """Return counts of judgements of web texts: all of them, and by kind of text ("right", "spoilt", ...)."""
    found: dict[str, dict[str, int]] = {}
    for name, judgement in (("bootstrapped", "kept"), ("dropped", "dropped")):
        for row in read_rows(results / f"{name}.jsonl"):
            if row["source"] == "web":
                fact = truth[row["image"]]
                key = f"{judgement}, {'matches' if fact['matches'] else 'does not match'}"
                for group in ("all", fact["kind"]):
                    found.setdefault(group, dict.fromkeys(COUNTS, 0))[key] += 1
    return found


def scores(counts: dict[str, int]) -> dict[str, float]:
    """Return precision, recall and F1 of dropping texts that do not match."""
    caught, missed = counts["dropped, does not match"], counts["kept, does not match"]
    precision = caught / max(caught + counts["dropped, matches"], 1)
    recall = caught / max(caught + missed, 1)
    return {"precision": precision, "recall": recall, "F1": 2 * precision * recall / max(precision + recall, 1e-12)}


def main() -> None:
    """Print counts and scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="output/capfilt", help="output folder of capfilt.py")
    parser.add_argument("--world", default="output/miniature", help="folder of the miniature world")
    args = parser.parse_args()
    rows = read_json(Path(args.world) / "annotations" / "pretrain_web_truth.json")
    found = count(Path(args.results), {row["image"]: row for row in rows})
    for group, counts in sorted(found.items()):
        print(f"{group}: " + ", ".join(f"{number} {key}" for key, number in counts.items() if number))
    print("noise found: " + ", ".join(f"{name} {value:.3f}" for name, value in scores(found["all"]).items()))


if __name__ == "__main__":
    sys.exit(run_command(main))
