"""Tell how well CapFilt's filter found the web texts of the miniature world that do not match their images.

    python -m demo.noise --results output/capfilt --world output/miniature
"""

import argparse
import json
import sys
from pathlib import Path

COUNTS = ("kept, matches", "kept, does not match", "dropped, matches", "dropped, does not match")


def count(results: Path, truth: dict[str, dict]) -> dict[str, dict[str, int]]:
    """Return counts of judgements of web texts, in all and by what a text is ("right", "spoilt", ...)."""
    found: dict[str, dict[str, int]] = {}
    for name, judgement in (("bootstrapped", "kept"), ("dropped", "dropped")):
        with open(results / f"{name}.jsonl", encoding="utf-8") as file:
            for row in map(json.loads, file):
                if row["source"] != "web":
                    continue
                fact = truth[row["image"]]
                key = f"{judgement}, {'matches' if fact['matches'] else 'does not match'}"
                for group in ("all", fact["kind"]):
                    counts = found.setdefault(group, dict.fromkeys(COUNTS, 0))
                    counts[key] += 1
    return found


def scores(counts: dict[str, int]) -> dict[str, float]:
    """Return precision, recall and F1 of dropping what does not match."""
    caught, missed = counts["dropped, does not match"], counts["kept, does not match"]
    precision = caught / max(caught + counts["dropped, matches"], 1)
    recall = caught / max(caught + missed, 1)
    return {"precision": precision, "recall": recall, "F1": 2 * precision * recall / max(precision + recall, 1e-12)}


def main() -> int:
    """Read the command line and print the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="output/capfilt", help="output folder of capfilt.py")
    parser.add_argument("--world", default="output/miniature", help="folder of the miniature world")
    args = parser.parse_args()
    rows = json.loads((Path(args.world) / "annotations" / "pretrain_web_truth.json").read_text())
    found = count(Path(args.results), {row["image"]: row for row in rows})
    for group, counts in sorted(found.items()):
        print(f"{group}: " + ", ".join(f"{number} {key}" for key, number in counts.items() if number))
    print("noise found: " + ", ".join(f"{name} {value:.3f}" for name, value in scores(found["all"]).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
