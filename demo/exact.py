"""Count the captions of miniature test images that name exactly the right shapes and colours.

    python -m demo.exact --results output/demo --world output/miniature
"""

import argparse
import sys
from pathlib import Path

import torch

from files import read_json
from miniature.scene import unseen_pairs
from miniature.text import caption_is_exact
from utils import run_command


def exact_shares(results: list[dict], scenes: dict[str, dict]) -> dict[str, tuple[int, int]]:
    """Return (exact, all) counts of test captions: for all images, and for those without and with an unseen pair."""
    counts = {"all test images": [0, 0], "pairs seen in training": [0, 0], "a pair never seen": [0, 0]}
    for row in results:
        items = scenes[f"images/test/{row['image_id']:07d}.jpg"]["items"]
        pairs = [(item["color"], item["shape"]) for item in items]
        group = "a pair never seen" if unseen_pairs() & set(pairs) else "pairs seen in training"
        for name in ("all test images", group):
            counts[name][0] += caption_is_exact(row["caption"], pairs)
            counts[name][1] += 1
    return {name: (right, total) for name, (right, total) in counts.items()}


def main() -> None:
    """Print the shares of the best epoch's captions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", required=True, help="output folder of train_caption.py")
    parser.add_argument("--world", required=True, help="folder of the miniature world")
    args = parser.parse_args()
    best = torch.load(Path(args.results) / "checkpoint_best.pth", map_location="cpu", weights_only=True)["epoch"]
    results = read_json(Path(args.results) / "result" / f"test_epoch{best}.json")
    scenes = read_json(Path(args.world) / "scenes.json")
    print("captions that name exactly the right shapes and colours:")
    for name, (right, total) in exact_shares(results, scenes).items():
        print(f"  {name.ljust(24)} {right}/{total} = {right / max(total, 1):.1%}")
    print(f"page: {Path(args.results) / 'report.html'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
