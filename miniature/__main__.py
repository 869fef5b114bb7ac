"""Write the miniature world to a folder: images of coloured shapes, and annotations in every released file format.

    python -m miniature --output output/miniature --level 4 --seed 0

Some pairs of colour and shape (`miniature.scene.unseen_pairs`) occur in test images only.
"""

import argparse
import sys

from miniature.writing import write_miniature
from utils import run_command


def main() -> None:
    """Parse the command line and write the world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/miniature", help="folder to write (default: output/miniature)")
    parser.add_argument("--level", type=int, default=4, help="difficulty, 1 to 4 (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    defaults = {"train": 6000, "val": 300, "test": 500, "web": 6000}
    for split, count in defaults.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"{split} images (default: {count})")
    parser.add_argument("--videos", type=int, default=0, help="video clips (default: 0)")
    parser.add_argument("--image_size", type=int, default=64, help="side of the images in pixels (default: 64)")
    args = parser.parse_args()
    sizes = (args.train, args.val, args.test, args.web, args.videos, args.image_size)
    folder = write_miniature(args.output, args.level, args.seed, *sizes)
    print(f"wrote the miniature world, level {args.level}, to {folder}")


if __name__ == "__main__":
    sys.exit(run_command(main))
